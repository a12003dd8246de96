"""The Triton kernels against the oracle: on a GPU where there is one, else in Triton's interpreter on the CPU.

Every branch of every kernel is taken once: split and unsplit, no shift and running maximum, exclude, count, rank,
every layout, every gradient, one tile and many. tests/test_kernels.py shows how well they compile.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import helpers
import numpy as np
import oracle
import pytest
import torch
from helpers import (
    LAYOUTS,
    Case,
    assert_close,
    check,
    error,
    expected,
    flat64,
    lay_out,
    loss_cases,
    make_case,
    match,
    run,
)
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")

from densecl_ops import _backends, _checks, _triton, selftest  # noqa: E402
from densecl_ops.correspondence import triton_launch as fused_matching  # noqa: E402
from densecl_ops.functional import dense_correspondence, dense_info_nce  # noqa: E402
from densecl_ops.info_nce import triton_launch as fused  # noqa: E402
from densecl_ops.info_nce import triton_plan  # noqa: E402
from densecl_ops.info_nce.problem import Problem  # noqa: E402

FLOAT32 = 2e-6  # relative error norm; at most 4e-7 over 12 seeds
# At t = 0.01 the gradient to the negatives is off by up to 5.4e-6 in the interpreter and 4.9e-6 as PTX, with a rank and
# without one. The kernel's arithmetic is the cause: exp(s - L) of float32 logits up to 74. The oracle with s and L
# rounded to float32, and nothing else, is off by 2.6e-6. All other results stay below 7e-7.
COLD = 8e-6
DEVICE = torch.device(helpers.DEVICES["triton"])

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not _triton.interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)


def case_of(**options: Any) -> Case:
    options = {"batch": 2, "channels": 24, "query_grid": (5, 7), "key_grid": (4, 4), "negatives": 150} | options
    return make_case(dtype=torch.float32, **options)


@pytest.fixture(params=["pointers", "descriptor"])
def loaded_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """How whole tiles of the queue come. `descriptor` is what a test expects; on a GPU float32 takes pointers."""
    if request.param == "descriptor" and os.environ.get("PTX_TARGET") == "80":
        pytest.skip("no tensor copies before sm_90")
    expected = SimpleNamespace(descriptor=request.param == "descriptor")
    choose, built = triton_plan.choose, mock.Mock(wraps=fused.TensorDescriptor)
    field = {"descriptor": expected.descriptor}
    monkeypatch.setattr(triton_plan, "choose", lambda *arguments: choose(*arguments)._replace(**field))
    monkeypatch.setattr(fused, "TensorDescriptor", built)
    yield expected
    assert built.called == expected.descriptor or os.environ.get("TRITON_INTERPRET") != "1"


@pytest.fixture(params=[1, 3], ids=["whole", "3 splits"])
def _splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward", "grad_negatives"):
        monkeypatch.setattr(fused, name, functools.partial(getattr(fused, name), splits=request.param))


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "tolerance"), [(0.2, FLOAT32), (0.01, COLD)], ids=["no shift", "running max"])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.usefixtures("loaded_by", "_splits")
def test_split_and_shift(temperature: float, tolerance: float, rank: bool) -> None:
    """A queue's rows are known to be unit vectors, so only a low temperature calls for the running maximum."""
    case = case_of(temperature=temperature, count=130)
    case.negatives[130:] = torch.nan
    check("triton", case, tolerance, wanted=("query", "key", "negatives"), rank=rank)


CASES = loss_cases(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_loss(name: str, loaded_by: SimpleNamespace) -> None:
    """A descriptor needs rows that start at multiples of 16 bytes."""
    check("triton", CASES[name], FLOAT32)
    loaded_by.descriptor &= not name.startswith(("unaligned", "1 channels"))


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_small_losses(backend: str) -> None:
    """log(1 + x) for x from 5e-5 to 0.4: 1 + x in float32 keeps 10 to 22 bits. Rounded logits of 10 cost 3.3e-6."""
    angle = torch.linspace(0, 1.14, 60)
    query = torch.stack([angle.cos(), angle.sin()], 1)
    case = Case(query, query, torch.tensor([[0.0, 1.0]]), temperature=0.1, reduction="none")
    np.testing.assert_allclose(run(backend, case, wanted=()).loss.numpy(), expected(case).loss, rtol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("temperature", "queue"), [(0.07, None), (0.2, None), (0.2, torch.float32)])
@pytest.mark.usefixtures("loaded_by")
def test_low_precision(dtype: torch.dtype, temperature: float, queue: torch.dtype | None) -> None:
    """Against float64 on the same rounded inputs: at most twice the error of the eager form in the same dtype.

    A float32 queue under autocast is what MomentumQueue() is in mixed precision.
    """
    case = replace(case_of(temperature=temperature, count=150), reduction="none").to(dtype)
    case = case if queue is None else replace(case, negatives=case.negatives.to(queue))
    with torch.autocast("cpu", dtype, queue is not None), torch.autocast(DEVICE.type, dtype, queue is not None):
        truth, eager, seen = expected(case), run("eager", case), run("triton", case)
    for name in ("loss", "query", "key", "negatives"):
        wish = getattr(truth, name)
        assert error(getattr(seen, name), wish) <= 2 * error(getattr(eager, name), wish) + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("_splits")
def test_ties_count_half(dtype: torch.dtype) -> None:
    """Not in bfloat16, to which the interpreter cuts where a GPU rounds."""
    case = case_of(count=130, reduction="none").to(dtype)
    match = case.key[0].flatten(1)[:, case.index[0, 0]]
    case.query[0, :, 0, 0] = 0.5 * match + 0.1 * case.query[0, :, 0, 0]
    case.query[1, 0, 1, 1] = torch.nan
    ranks = []
    for sign in (-1, 1):  # a row that scores below the positive, and a copy of it, cost the same
        case.negatives[7] = sign * match.float() / match.float().norm()
        ranks.append(run("triton", case, wanted=()).rank)
    assert ranks[0][0, 0] == ranks[1][0, 0] <= 1
    assert ranks[0][1, 8] == 150
    collapsed = replace(case, query=torch.ones_like(case.query), key=torch.ones_like(case.key))
    collapsed.negatives[:] = 24**-0.5
    assert (run("triton", collapsed, wanted=()).rank == 130 // 2).all()


def test_nan_stays_in_its_row() -> None:
    """Also in one that is left out, whose NaN reaches nothing."""
    case = case_of(reduction="none")
    case.query[0, 0, 1, 1] = torch.nan
    for weight, reached in ((1, [[0, 8]]), (0, [])):
        case.weight = torch.ones(2, 35)
        case.weight[0, 8] = weight
        seen = run("triton", case, wanted=("query", "key", "negatives"))
        assert seen.loss.isnan().nonzero().tolist() == reached
        assert torch.equal(seen.query.isnan().flatten(2).any(1), seen.loss.isnan())
        assert seen.key.isnan().any() == seen.negatives.isnan().any() == weight


def test_an_index_out_of_range_gives_the_row_nan() -> None:
    """Only where the host cannot look, hence straight to the backend: nothing is read there, no other row changes."""
    case = case_of()
    query, key = (x.flatten(2).to(DEVICE) for x in (case.query, case.key))
    index, float32 = case.index.to(DEVICE), torch.float32
    problem = Problem(query, key, case.negatives.to(DEVICE), 5.0, None, index, None, None, True, float32, float32)
    whole = fused.forward(problem, True, False)
    for wrong in (-1, 16, 2**40):
        broken = index.clone()
        broken[1, 3] = wrong
        result = fused.forward(problem._replace(matches=broken), True, False)
        for name in ("loss", "log_sum_exp", "pull", "grad_query", "grad_scale"):
            seen, wish = getattr(result, name), getattr(whole, name).clone()
            if name != "log_sum_exp":  # of the negatives alone
                wish[1, 3] = float("nan")
            torch.testing.assert_close(seen, wish, rtol=0, atol=0, equal_nan=True, msg=name)
        grad = fused.grad_key(query, key, broken, result.pull, torch.float32)
        assert grad[1].isnan().any()
        assert torch.equal(grad[0], fused.grad_key(query, key, index, whole.pull, torch.float32)[0])


def test_rows_that_are_not_declared_to_be_unit_rows_may_be_long() -> None:
    """Without a running maximum their logits of 5 x 100 would overflow."""
    case = case_of(count=20)
    case.negatives *= 100
    queue = SimpleNamespace(rows=case.negatives, count=torch.tensor(20))
    _checks.warn_once.cache_clear()  # it warns once a process
    with pytest.warns(UserWarning, match="not of length 1"):
        loss = helpers.info_nce("triton", case.query, case.key, queue, case.index)
    assert_close(loss, expected(case).loss, FLOAT32)


def test_plan_uses_the_device() -> None:
    """13 blocks of rows leave 119 of 132 multiprocessors idle; ten parts of the queue leave 2.

    98 blocks leave 34 idle; four parts of the queue are 392 programs, three rounds of 132 but for 4.
    """
    plan = functools.partial(triton_plan.plan_split, block=128, step=128, slots=132)
    per_split = plan(items=1568, length=65536)
    assert per_split % 128 == 0
    assert 13 * -(-65536 // per_split) in range(125, 133)
    assert plan(items=12544, length=65536) == 65536 // 4
    assert plan(items=50176, length=65536) == 65536
    assert plan(items=64, length=100) == 128


def test_products_follow_the_float32_setting_of_torch() -> None:
    """Both interfaces of torch; in a process of its own, since torch refuses to mix them."""
    program = """
import torch
from densecl_ops import _triton
from densecl_ops.info_nce import triton_plan
from densecl_ops.info_nce.problem import Problem
_triton.describe = lambda device: _triton.Device("sm_90", 132)
query, negatives = torch.zeros(1, 16, 4), torch.zeros(8, 16)
problem = Problem(query, query, negatives, 5.0, None, None, None, None, False, torch.float32, torch.float32)
found = [triton_plan.precision(problem)]
for setting in ("high", "medium", "highest"):
    torch.set_float32_matmul_precision(setting)
    found.append(triton_plan.precision(problem))
torch.backends.cuda.matmul.allow_tf32 = True
found.append(triton_plan.precision(problem))
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    for owner, setting in ((torch.backends.cuda.matmul, "ieee"), (torch.backends.cuda.matmul, "tf32")):
        owner.fp32_precision = setting
        found.append(triton_plan.precision(problem))
found.append(triton_plan.precision(problem._replace(matmul_dtype=torch.bfloat16)))
print(*found)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    new = ["tf32x3", "tf32"] if hasattr(torch.backends.cuda.matmul, "fp32_precision") else []
    assert printed == ["tf32x3", "tf32", "tf32", "tf32x3", "tf32", *new, "ieee"]


# ---- matching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("grids", [((7, 7), (7, 7)), ((10, 9), (7, 12)), ((1, 1), (9, 9))], ids=str)
@pytest.mark.parametrize(
    ("layout", "dtype"), list(zip(LAYOUTS, 4 * [torch.float32] + [torch.bfloat16, torch.float16], strict=True))
)
def test_matching(layout: str, dtype: torch.dtype, grids: tuple[tuple[int, int], ...], mutual: bool) -> None:
    query, key = (lay_out(torch.randn(2, 70, *grid).to(dtype), layout) for grid in grids)
    truth = oracle.match(flat64(query), flat64(key), mutual=mutual)
    seen = match("triton", query, key, mutual=mutual)
    assert np.array_equal(seen.index.numpy(), truth.index)
    assert np.array_equal(seen.valid.numpy(), truth.valid)
    assert_close(seen.score, truth.score, 1e-6)


@pytest.mark.parametrize("positions", [9, 100], ids=["one tile", "many tiles"])
def test_matching_ties_and_nan(positions: int) -> None:
    """Ties go to the lowest index, within a tile and across; NaN wins over everything and shows in the score."""
    key = torch.ones(1, 16, positions)
    query = torch.ones(1, 16, positions)
    assert not match("triton", query, key).index.any()
    key[0, 2, 70 % positions] = float("nan")
    seen = match("triton", query, key)
    assert (seen.index == 70 % positions).all()
    assert seen.score.isnan().all()
    query[0, 0, 3] = float("nan")
    key[0, 2, 70 % positions] = 1
    seen = match("triton", query, key)
    assert not seen.index.any()
    assert torch.equal(seen.score.isnan().nonzero(), torch.tensor([[0, 3]]))


@pytest.mark.parametrize("grids", [((7, 7), (7, 7)), ((3, 3), (14, 14))], ids=str)
@pytest.mark.parametrize("mutual", [False, True])
def test_an_infinite_feature_matches_inside_the_grid(grids: tuple[tuple[int, int], ...], mutual: bool) -> None:
    """Every key is negative in its channel: -inf is below the nothing beyond the grid, if that is inf * 0 = NaN."""
    query, key = (torch.randn(2, 16, *grid) for grid in grids)
    key[:, 5] = -key[:, 5].abs()
    finite = match("triton", query, key)
    query[1, 5, 1, 2] = float("inf")
    where = grids[0][1] + 2
    seen = match("triton", query, key, mutual=mutual)
    assert seen.index.max() < key[0, 0].numel()
    assert seen.score[1, where].isnan()
    finite.index[1, where] = seen.index[1, where]
    assert torch.equal(seen.index, finite.index)


# ---- both ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "blockwise", "triton"])
def test_squares_that_overflow_give_nan(backend: str) -> None:
    """A vector of 1e20 has a direction, but float32 cannot square it: NaN shows that, a zero vector would hide it."""
    case = case_of(reduction="none")
    case.query[0, :, 0, 0] = 1e20
    assert torch.equal(run(backend, case, wanted=()).loss.isnan().nonzero(), torch.tensor([[0, 0]]))
    for side in (3, 10):  # one tile and many
        key = torch.randn(1, 16, side, side)
        key[0, :, 0, 0] = 1e20
        assert match(backend, torch.randn(1, 16, side, side), key).score.isnan().all()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """Grids of the launches of every kernel."""
    grids: dict[str, list[tuple[int, ...]]] = {}

    class Noted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.kernel, self.grids = kernel, grids.setdefault(name, [])

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            self.grids.append(grid)
            return self.kernel[grid] if max(grid) < 65536 else lambda **_: None

    for kernels in (fused.kernels, fused_matching.kernels):
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Noted(name, getattr(kernels, name)))
    return grids


def test_the_selftest_runs_every_kernel(launches: dict[str, list[tuple[int, ...]]]) -> None:
    assert selftest.main(["--small"]) == 0
    assert all(launches.values())


def test_grids_end_at_65535_programs_but_for_the_first_axis(launches: dict[str, list[tuple[int, ...]]]) -> None:
    images = 65536
    for positions in (1, 65):  # one tile, and several
        maps = torch.zeros(1, 1, 1).expand(images, 1, positions)
        index = torch.zeros(1, 1, dtype=torch.int64).expand(images, positions)
        fused_matching.match(maps, maps, False)
        fused.grad_key(maps, maps, index, maps[:, 0], torch.float32)
    grids = [grid for kernel in launches.values() for grid in kernel]
    assert len(grids) == 6
    assert all(grid[0] >= images > max(grid[1:], default=0) for grid in grids)


def test_operators() -> None:
    query = torch.randn(2, 16, 9, device=DEVICE)
    negatives = torch.nn.functional.normalize(torch.randn(70, 16, device=DEVICE), dim=1)
    index = torch.randint(9, (2, 9), device=DEVICE)
    problem = (query, query, negatives, 5.0, None, index, None, None, False, torch.float32, torch.float32)
    rows, operators = torch.rand(2, 9, device=DEVICE), torch.ops.densecl_ops
    for operator, arguments in (
        (operators.info_nce, (*problem, True, True)),
        (operators.info_nce, (*problem, False, False)),
        (operators.info_nce_grad_negatives, (*problem, rows, rows)),
        (operators.info_nce_grad_key, (query, query, index, rows, torch.float32)),
        (operators.match, (query, query, True)),
    ):
        torch.library.opcheck(operator, (*arguments, "triton"))


# ---- when they cannot serve ----------------------------------------------------------------------------------------


def test_what_it_cannot_serve_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend: got 'triton'.*up to 512 channels, not 513"):
        run("triton", case_of(channels=513, negatives=2, query_grid=(1, 1)))
    with pytest.raises(ValueError, match=r"backend: got 'triton'.*float64"):
        run("triton", make_case())
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    with pytest.raises(ValueError, match=r"it needs triton 3\.6, and 3\.2 is installed"):
        run("triton", case_of())


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    device = property(lambda self: torch.device("cuda"))


@pytest.mark.parametrize(
    ("architecture", "chosen"), [("sm_75", "blockwise"), ("gfx1100", "blockwise"), ("sm_90", "auto")]
)
def test_an_architecture_that_was_never_compiled_for(
    monkeypatch: pytest.MonkeyPatch, architecture: str, chosen: str
) -> None:
    monkeypatch.setattr(_triton, "describe", lambda device: _triton.Device(architecture, 40))
    tensor = torch.zeros(1).as_subclass(OnGpu)
    _backends._warn_slow.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [_backends.choose("auto", tensor, torch.float32, 128) for _ in range(2)] == [chosen] * 2
    assert [architecture in str(warning.message) for warning in seen] == [True] * (chosen == "blockwise")
    if chosen == "blockwise":
        with pytest.raises(ValueError, match=rf"backend: got 'triton'.*never compiled for {architecture}"):
            _backends.choose("triton", tensor, torch.float32, 128)
        with pytest.raises(ValueError, match=rf"never compiled for {architecture}"):  # from compiled code
            fused_matching.choose(architecture, torch.float32, 49)


def everything(backend: str, compiled: bool = False) -> list[Tensor]:
    """The loss, its gradients and the matches of one case."""
    case = case_of()
    leaves = [x.to(DEVICE).requires_grad_() for x in (case.query, case.key, case.negatives)]

    def loss(*leaves: Tensor) -> Tensor:
        return dense_info_nce(*leaves, case.index.to(DEVICE), backend=backend)

    value = (torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss)(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return [value.detach(), *gradients, dense_correspondence(*leaves[:2], backend=backend).index]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_that_fail_are_a_warning_under_auto(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """One warning and one try for each kind of call; then blockwise serves, forward and backward."""
    for ours, theirs in zip(everything("triton", compiled), everything("triton"), strict=True):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(_backends, "_failed", set())
    monkeypatch.setattr(_backends, "choose", lambda requested, *_: requested)
    _backends._warn_slow.cache_clear()
    tried: list[str] = []

    def fails(name: str, *_: Any) -> None:
        tried.append(name)
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    for module, name in ((fused, "forward"), (fused, "grad_key"), (fused, "grad_negatives"), (fused_matching, "match")):
        monkeypatch.setattr(module, name, functools.partial(fails, name))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = [everything("auto", compiled) for _ in range(2)]
    assert sorted(tried) == ["forward", "grad_key", "grad_negatives", "match"]
    messages = [str(warning.message) for warning in seen if "slower 'blockwise'" in str(warning.message)]
    assert len(messages) == 4
    assert all("OutOfResources: out of resource: shared memory" in message for message in messages)
    for result in results:
        for ours, theirs in zip(result, everything("blockwise"), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        everything("triton")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 80 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [HIP]:  Code: 2, Message: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
    ids=str,
)
def test_what_is_no_fault_of_the_kernels_does_not_retire_them(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A passing lack of memory, or an error of the user's own kernels that the driver tells at our launch."""
    monkeypatch.setattr(_backends, "_failed", set())
    monkeypatch.setattr(fused_matching, "match", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        _backends.call("auto", "correspondence", "match", (), torch.device("cpu"))
    assert not _backends._failed
