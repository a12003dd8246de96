"""Running the library beside the oracle. The backends under test are listed here and nowhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map

from densecl_ops import Correspondence, MomentumQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce

BACKENDS = ("eager", "blockwise")
FUSED = ("blockwise",)  # everything but the materialising reference
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu"}  # default: cpu

HOUSE_FORM = re.compile(r"^[a-z_.]+(\[.*\])?(: [a-z_]+)?: got .+, expected |^key: got .* beside ", re.DOTALL)

EPS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of unit rows
GRADIENTS = ("query", "key", "negatives", "temperature", "weight")
LAYOUTS = ("contiguous", "channels_last", "tokens", "slice", "every_other", "swapped")
GUISES = (*LAYOUTS, "one image", "overlapping", "negative")
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "float32": lambda x: x.float(),
    "zeros": torch.zeros_like,
    "NaN": lambda x: x.index_fill(0, torch.tensor(0), np.nan),
    "inf": lambda x: x.index_fill(0, torch.tensor(len(x) - 1), np.inf),
    "huge": lambda x: x * 1e100,
    "tiny": lambda x: x * 1e-9,
}


def to_device(backend: str, *values: Any) -> Any:
    """With their strides, whatever tuples, dictionaries and namespaces (queues) hold them."""
    device = DEVICES.get(backend, "cpu")

    def move(x: Any) -> Any:
        if isinstance(x, SimpleNamespace):
            return SimpleNamespace(**tree_map(move, vars(x)))
        if not isinstance(x, (Tensor, torch.nn.Module)):
            return x
        moved = x.to(device)
        if isinstance(x, torch.nn.Module) or moved.stride() == x.stride():
            return moved
        # `to` closes gaps: what lies in a larger tensor would arrive contiguous. NaN keeps the gaps poisoned.
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.new_full((span,), float("nan"), device=device).as_strided(x.shape, x.stride()).copy_(x)

    return tree_map(move, values)


def info_nce(backend: str, *args: Any, **kwargs: Any) -> Any:
    """dense_info_nce on the device of the backend."""
    args, kwargs = to_device(backend, args, kwargs)
    return dense_info_nce(*args, backend=backend, **kwargs)


def match(backend: str, *args: Any, **kwargs: Any) -> Correspondence:
    """dense_correspondence on the device of the backend; the result comes back to the host."""
    result = dense_correspondence(*to_device(backend, *args), backend=backend, **kwargs)
    return Correspondence(*(x.cpu() for x in result))


def refused(call: Callable[[], Any], words: str = " ") -> pytest.ExceptionInfo[Exception]:
    """By an error that names the argument, what came and what was expected, in `words` (" ... ": anything)."""
    with pytest.raises((TypeError, ValueError), match=".*".join(map(re.escape, words.split(" ... ")))) as caught:
        call()
    assert HOUSE_FORM.match(str(caught.value)), str(caught.value)
    return caught


def deque_of(queue: MomentumQueue) -> oracle.Queue:
    """With the rows that a new queue starts from."""
    return oracle.Queue(queue.size, numpy64(queue.rows[: int(queue.count)]))


def check_queue(queue: MomentumQueue, model: oracle.Queue, eps: float) -> None:
    assert (int(queue.position), int(queue.count)) == (model.position, model.count)
    rows = model.rows().reshape(model.count, queue.dim)
    np.testing.assert_allclose(numpy64(queue.rows[: model.count]), rows, rtol=0, atol=eps)


def torchrun(script: str | Path, *arguments: str | Path, processes: int = 2) -> str:
    """What the processes write to standard error, in the directory of the script."""
    if not torch.distributed.is_available() or sys.platform == "win32":
        pytest.skip("torchrun")
    root, directory = str(Path(__file__).parents[1]), Path(script).parent
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [sys.executable, *launcher, script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with subprocess.Popen(command, env=environment, cwd=directory, stderr=subprocess.PIPE, text=True) as started:
        try:
            _, told = started.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            started.terminate()  # it then ends its processes, which would outlive kill()
            _, told = started.communicate()
    assert started.returncode == 0, told
    return told


def gloo_threads() -> list[str]:
    """Of this process: one that waits for the interpreter's lock when that ends takes the process down."""
    names = ["unknown"]
    for _ in range(100):  # one that has been joined is listed for a moment more
        with suppress(OSError):  # and may go while its name is read
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            names = [name for name in names if "gloo" in name]
        if not names:
            break
        time.sleep(0.05)
    return names


class NoFloat64(TorchDispatchMode):
    """Stands for a device without float64, such as MPS: an operation that makes such a tensor raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(getattr(x, "dtype", None) == torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"{func}: no float64 on this device")
        return out


def numpy64(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().resolve_neg().numpy()


def flat64(x: Tensor) -> np.ndarray:
    """(B, C, ...) -> float64 (B, C, P)."""
    x = numpy64(x)
    return x.reshape(*x.shape[:2], -1)


def error(actual: Any, expected: Any, floor: float = 0.0) -> float:
    """Relative error norm of a whole tensor, or relative to a larger `floor`; absolute where nothing is expected."""
    actual = numpy64(actual) if isinstance(actual, Tensor) else np.asarray(actual)
    expected = numpy64(expected) if isinstance(expected, Tensor) else np.asarray(expected)
    assert actual.size == expected.size, (actual.shape, expected.shape)
    difference = np.linalg.norm(actual.ravel() - expected.ravel())
    size = max(float(np.linalg.norm(expected.ravel())), floor)
    return float(difference / size if size > 0 else difference)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "", floor: float = 0.0) -> None:
    off = error(actual, expected, floor)
    assert off <= tolerance, f"{what}: relative error {off:.3g} above {tolerance:.3g}"


def assert_same(seen: Any, wanted: Any) -> None:
    """Names, types, shapes and bits of nested dictionaries."""
    seen, wanted = ({keystr(path): x for path, x in tree_leaves_with_path(tree)} for tree in (seen, wanted))
    assert seen.keys() == wanted.keys()
    for name, x in wanted.items():
        if isinstance(x, Tensor):
            assert (seen[name].dtype, seen[name].shape) == (x.dtype, x.shape), name
            assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (seen[name], x))), name
        else:
            assert seen[name] == x, name


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same (B, C, H, W) values with other strides, as a leaf. "tokens" is (B, C, P) seen through (B, P, C).

    "one image" and "overlapping" hold fewer values than elements: what is returned counts.
    """
    batch, channels, height, width = x.shape
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "tokens":
        x = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slice":
        big = x.new_full((batch + 1, channels + 2, height + 1, width + 3), float("nan"))
        inside = big[1:, 1:-1, :-1, 2:-1]
        x = inside.copy_(x)
    elif layout == "every_other":
        x = x.new_full((batch, channels, height, 2 * width), float("nan"))[..., ::2].copy_(x)
    elif layout == "swapped":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "one image":
        x = x[:1].expand_as(x)
    elif layout == "overlapping":
        x = x.contiguous().as_strided(x.shape, (1,) * 4)
    elif layout == "negative":
        x = torch._neg_view(-x)
    return x.detach()


@dataclass
class Case:
    """Arguments of one loss call; maps are (B, D, H, W)."""

    query: Tensor
    key: Tensor
    negatives: Tensor
    index: Tensor | None = None
    valid: Tensor | None = None
    weight: Tensor | None = None
    exclude: Tensor | None = None
    count: int | None = None
    temperature: float = 0.2
    reduction: str = "mean"
    upstream: Tensor | None = None
    autocast: torch.dtype | None = None

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), negatives=self.negatives.to(dtype))


def make_case(
    seed: int = 0,
    batch: int = 3,
    channels: int = 6,
    query_grid: tuple[int, int] = (2, 3),
    key_grid: tuple[int, int] = (3, 2),
    negatives: int = 17,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    rng = np.random.default_rng(seed)
    positions, keys = query_grid[0] * query_grid[1], key_grid[0] * key_grid[1]
    return Case(
        query=torch.tensor(rng.standard_normal((batch, channels, *query_grid)), dtype=dtype),
        key=torch.tensor(rng.standard_normal((batch, channels, *key_grid)), dtype=dtype),
        negatives=torch.tensor(oracle.unit(rng.standard_normal((negatives, channels)), 1)[0], dtype=dtype),
        index=torch.tensor(rng.integers(0, keys, (batch, positions))),
        upstream=torch.tensor(rng.standard_normal((batch, positions)), dtype=dtype),
        **options,
    )


def loss_cases(dtype: torch.dtype) -> dict[str, Case]:
    """Options, forms, layouts and sizes of the loss, by name: for every backend."""
    sizes: dict[str, Any] = {"batch": 2, "query_grid": (5, 7), "key_grid": (4, 4), "negatives": 150, "dtype": dtype}
    case = make_case(channels=24, **sizes, reduction="none")
    alone = make_case(batch=1, channels=16, negatives=1, dtype=dtype, exclude=torch.tensor([0]))
    vectors = make_case(channels=24, query_grid=(1, 1), key_grid=(1, 1), dtype=dtype)
    query, key, rows, index = case.query, case.key, case.negatives, case.index
    thirds = torch.arange(70.0, dtype=dtype).view(2, 35) % 4 / 3
    zero_query, zero_key, zero_rows = query.clone(), key.clone(), rows.clone()
    zero_query[0, :, 0, 0] = zero_key[1, :, 0, 0] = zero_rows[3] = 0
    options: dict[str, dict[str, Any]] = {
        "exclude": {"exclude": torch.tensor([70, 3]), "weight": thirds, "valid": thirds < 1, "reduction": "mean"},
        "identity": {"key": query.flip(3), "index": None},
        "tokens": {"query": query.flatten(2), "key": key.flatten(2)},
        "a map and tokens": {"key": key.flatten(2)},
        "one key for all": {"index": torch.zeros_like(index)},
        "zero vectors": {"query": zero_query, "key": zero_key, "negatives": zero_rows},
        "expanded indices": {"index": index[:1].expand(2, 35), "exclude": torch.tensor([3]).expand(2)},
        "expanded weights": {"weight": thirds[:, 1:2].expand(2, 35)},
        "expanded maps": {"query": query[:1].expand(2, -1, -1, -1), "key": key[:, :, :1].expand(-1, -1, 4, -1)},
        "transposed indices": {"index": index.t().contiguous().t(), "exclude": torch.tensor([[70, 1], [3, 2]])[:, 0]},
        "transposed upstream": {"upstream": torch.rand(35, 2, dtype=dtype).t()},
        "narrow indices": {"index": index.to(torch.uint8), "exclude": torch.tensor([3, 149], dtype=torch.int16)},
        # The official DenseCL keeps its queue as (D, K).
        "transposed negatives": {"negatives": rows.t().contiguous().t()},
        "slice negatives": {"negatives": torch.cat([torch.full((150, 3), torch.nan, dtype=dtype), rows], 1)[:, 3:]},
        "unaligned negatives": {"negatives": torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(150, 24)},
        "every other row": {"negatives": rows.repeat_interleave(2, 0)[::2]},
        "every other column": {"negatives": rows.repeat_interleave(2, 1)[:, ::2]},
        "expanded negatives": {"negatives": rows[:1].expand(150, -1)},
    }
    for layout in LAYOUTS:
        options[f"{layout} maps"] = {"query": lay_out(query, layout), "key": lay_out(key, layout)}
    for count in (0, 1, 64, 130, 150):  # rows beyond it may hold anything
        beyond = torch.arange(150)[:, None] >= count
        options[f"count {count}"] = {"negatives": torch.where(beyond, 1e3 * rows, rows), "count": count}
    cases = {name: replace(case, **changes) for name, changes in options.items()}
    cases["no negatives"], cases["only itself"] = replace(alone, exclude=None, count=0), alone
    cases["vectors"] = replace(vectors, query=vectors.query[..., 0], key=vectors.key[..., 0], index=None)
    for channels in (1, 16, 40, 64):
        for size in (1, 64, 65):
            cases[f"{channels} channels {size} negatives"] = make_case(
                channels=channels, **sizes | {"query_grid": (3, 3), "negatives": size}, count=size
            )
    return cases


def tie_width(*tensors: Tensor) -> float:
    return 2.0**-46 if any(x.dtype == torch.float64 for x in tensors) else 2.0**-18


def expected(case: Case) -> oracle.LossResult:
    def array(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return numpy64(x) if x.is_floating_point() else x.cpu().numpy()

    tie = tie_width(case.query, case.key, case.negatives)
    given = {name: array(x) for name, x in vars(case).items()} | {"query": flat64(case.query), "key": flat64(case.key)}
    operand = given.pop("autocast") or torch.promote_types(case.query.dtype, case.negatives.dtype)
    dtypes = {"to_row": case.negatives.dtype, "to_operand": torch.float64 if tie < 2.0**-18 else operand}
    roundings = {name: lambda x, to=to: torch.tensor(x).to(to).double().numpy() for name, to in dtypes.items()}
    return oracle.info_nce(**given, tie=tie, **roundings)


def run(backend: str, case: Case, wanted: tuple[str, ...] = GRADIENTS, rank: bool = True) -> SimpleNamespace:
    """Loss, rank and the wanted gradients of one call, all on the host."""
    leaves = {name: getattr(case, name) for name in GRADIENTS if getattr(case, name) is not None}
    leaves["temperature"] = torch.as_tensor(case.temperature, dtype=torch.float64)
    leaves = {name: x.detach().requires_grad_(name in wanted and x.is_floating_point()) for name, x in leaves.items()}
    negatives: Any = leaves["negatives"]
    if case.count is not None:
        negatives = SimpleNamespace(rows=negatives, count=torch.tensor(case.count), unit_rows=True)
    correspondence: Any = case.index
    if case.valid is not None:
        correspondence = Correspondence(case.index, torch.zeros(case.index.shape), case.valid)
    options = {
        "temperature": leaves["temperature"] if "temperature" in wanted else case.temperature,
        "reduction": case.reduction,
        "weight": leaves.get("weight"),
        "exclude": case.exclude,
        "return_rank": rank,
    }
    with torch.autocast(DEVICES.get(backend, "cpu"), case.autocast or torch.bfloat16, enabled=bool(case.autocast)):
        result = info_nce(backend, leaves["query"], leaves["key"], negatives, correspondence, **options)
    loss, ranks = result if rank else (result, None)
    if wanted and loss.requires_grad:
        upstream = torch.ones_like(loss) if case.upstream is None else case.upstream.to(loss)
        loss.backward(upstream if case.reduction == "none" else None)
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    loss, ranks = (None if x is None else x.detach().cpu() for x in (loss, ranks))
    return SimpleNamespace(loss=loss, rank=ranks, **{name: gradients.get(name) for name in GRADIENTS})


def check(
    backend: str, case: Case, tolerance: float = 1e-9, wanted: tuple[str, ...] = GRADIENTS, rank: bool = True
) -> None:
    """The loss, the rank and every wanted gradient of a call, which leaves its inputs alone, against the oracle.

    Losses and gradients can be 1e-80 where the terms they are differences of are 1 / t: below a hundredth of those
    terms, errors are measured against that hundredth. test_loss_numerics.py asks for more where more is due.
    """
    inputs = [x for x in vars(case).values() if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    truth, seen = expected(case), run(backend, case, wanted, rank)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0, equal_nan=True)
    norms = np.concatenate([np.linalg.norm(flat64(x), axis=1).ravel() for x in (case.query, case.key)])
    shortest = norms[norms > 0].min(initial=1.0)  # a zero vector has no gradient
    floor = 1e-2 / case.temperature
    floors = {"query": floor / shortest, "key": floor / shortest, "temperature": floor / case.temperature}
    assert seen.loss.shape == truth.loss.shape
    assert_close(seen.loss, truth.loss, tolerance, "loss", floor)
    if rank:
        low, high = oracle.rank_bounds(truth, tolerance, tie_width(case.query, case.key, case.negatives))
        assert seen.rank.dtype == torch.int64
        assert ((low <= seen.rank.numpy()) & (seen.rank.numpy() <= high)).all()
    for name in wanted:
        if getattr(truth, name) is None:
            continue
        actual, wish = getattr(seen, name), getattr(truth, name)
        assert actual is not None, f"no gradient to {name}"
        if name in ("query", "key", "negatives"):
            given = getattr(case, name)
            assert actual.shape == given.shape
            assert actual.dtype == given.dtype
        if name == "negatives" and case.count is not None:
            assert not actual[case.count :].any()
        if name == "weight":  # a row of weight 0 is left out, and whether its weight has a slope is not defined
            used = (case.weight != 0).numpy()
            actual, wish = numpy64(actual)[used], wish[used]
        assert_close(actual, wish, tolerance, f"gradient to {name}", floors.get(name, floor))
