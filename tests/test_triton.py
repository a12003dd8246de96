"""The Triton kernels against the oracle: on a GPU where there is one, else in Triton's interpreter on the CPU.

Every branch of every kernel is taken once: split and unsplit, no shift and running maximum, exclude, count, rank,
every layout, every gradient, one tile and many. tests/test_kernels.py shows how well they compile.
"""

from __future__ import annotations

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
from helpers import Case, assert_close, check, error, expected, flat64, lay_out, make_case, match, run
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")

from densecl_ops import _backends, _triton, selftest  # noqa: E402
from densecl_ops.correspondence import triton_launch as fused_matching  # noqa: E402
from densecl_ops.functional import dense_correspondence, dense_info_nce  # noqa: E402
from densecl_ops.info_nce import triton_launch as fused  # noqa: E402
from densecl_ops.info_nce import triton_plan  # noqa: E402
from densecl_ops.info_nce.problem import Problem  # noqa: E402

FLOAT32 = 8e-6  # relative error norm; eager float32 stays below 2e-6 on the same cases
LAYOUTS = ("contiguous", "channels_last", "tokens", "slice", "swapped")

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


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("temperature", [0.2, 0.01], ids=["no shift", "running max"])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.usefixtures("loaded_by")
def test_split_and_shift(monkeypatch: pytest.MonkeyPatch, splits: int, temperature: float, rank: bool) -> None:
    """A queue's rows are known to be unit vectors, so only a low temperature calls for the running maximum."""
    forward, grad = fused.forward, fused.grad_negatives
    monkeypatch.setattr(fused, "forward", lambda *args: forward(*args, splits=splits))
    monkeypatch.setattr(fused, "grad_negatives", lambda *args: grad(*args, splits=splits))
    case = case_of(temperature=temperature, count=130)
    case.negatives[130:] = torch.nan
    check("triton", case, FLOAT32, wanted=("query", "key", "negatives"), rank=rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = case_of()
    case = replace(case, query=lay_out(case.query, layout), key=lay_out(case.key, layout))
    check("triton", case, FLOAT32)


def test_a_layout_outlives_the_way_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of maps, and of a queue's rows: on the CPU nothing moves, so only a GPU would show it."""
    monkeypatch.setitem(helpers.DEVICES, "triton", "meta")
    for layout in LAYOUTS:
        x = lay_out(torch.randn(2, 3, 4, 5), layout)
        moved, queue = helpers.to_device("triton", x, SimpleNamespace(rows=x, count=torch.tensor(2)))
        for there in (moved, queue.rows):
            assert (there.device.type, there.shape, there.stride()) == ("meta", x.shape, x.stride())
        assert queue.count.device.type == "meta"


@pytest.mark.parametrize("layout", ["columns", "slice", "unaligned"])
def test_layouts_of_the_negatives(layout: str, loaded_by: SimpleNamespace) -> None:
    """The official DenseCL keeps its queue as (D, K). A descriptor needs rows that start at multiples of 16 bytes."""
    case = case_of()
    negatives = {
        "columns": case.negatives.t().contiguous().t(),
        "slice": torch.cat([case.negatives.new_full((150, 3), torch.nan), case.negatives], 1)[:, 3:],
        "unaligned": torch.cat([case.negatives.new_zeros(1), case.negatives.flatten()])[1:].view(150, 24),
    }[layout]
    check("triton", replace(case, negatives=negatives), FLOAT32)
    loaded_by.descriptor &= layout != "unaligned"


@pytest.mark.parametrize("channels", [1, 16, 40, 64])
@pytest.mark.parametrize("negatives", [1, 64, 65])
def test_sizes(channels: int, negatives: int, loaded_by: SimpleNamespace) -> None:
    loaded_by.descriptor &= channels > 1
    check("triton", case_of(channels=channels, negatives=negatives, query_grid=(3, 3), count=negatives), FLOAT32)


@pytest.mark.usefixtures("loaded_by")
def test_exclude_weight_and_validity() -> None:
    case = case_of(exclude=torch.tensor([70, 3]), reduction="mean")
    weight = torch.rand(2, 35)
    weight[0, :4] = 0
    check("triton", replace(case, weight=weight, valid=torch.rand(2, 35) < 0.7), FLOAT32)


def test_nothing_left() -> None:
    """An empty queue, and in-batch negatives of a single image: loss 0, gradient 0."""
    alone = make_case(batch=1, channels=16, negatives=1, dtype=torch.float32, exclude=torch.tensor([0]))
    for case in (replace(alone, exclude=None, count=0), alone):
        seen = run("triton", case)
        for value in (seen.loss, seen.rank, seen.query, seen.key, seen.negatives, seen.temperature):
            assert not value.any()


def test_no_correspondence_and_vectors() -> None:
    check("triton", replace(case_of(key_grid=(5, 7)), index=None), FLOAT32)
    vectors = case_of(query_grid=(1, 1), key_grid=(1, 1))
    check("triton", replace(vectors, query=vectors.query[..., 0], key=vectors.key[..., 0], index=None), FLOAT32)


def test_indices_of_any_strides() -> None:
    """The identity as an expanded arange, a transposed index, a column of a table; and an upstream gradient."""
    case = case_of(exclude=torch.tensor([70, 3]), reduction="none")
    for index in (torch.arange(35)[None].expand(2, 35) % 16, case.index.t().contiguous().t()):
        for exclude in (torch.tensor([[70, 1], [3, 2]])[:, 0], torch.tensor([3]).expand(2)):
            check("triton", replace(case, index=index, exclude=exclude), FLOAT32)
    check("triton", replace(case, index=torch.arange(16).repeat(2, 3)[:, :35], exclude=None), FLOAT32)
    check("triton", replace(case, index=torch.arange(35).expand(2, 35) // 3, upstream=torch.rand(35, 2).t()), FLOAT32)


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_small_losses(backend: str) -> None:
    """log(1 + x) for x from 1e-4 to 0.4: 1 + x in float32 keeps 11 to 22 bits of x."""
    query, negatives = torch.eye(4)[:1], torch.eye(4)[1:2]
    for temperature in torch.linspace(0.108, 1.0, 60):
        case = Case(query, query, negatives, temperature=float(temperature), reduction="none")
        np.testing.assert_allclose(run(backend, case, wanted=()).loss.cpu().numpy(), expected(case).loss, rtol=3e-6)


def test_many_queries_share_a_key() -> None:
    case = case_of()
    check("triton", replace(case, index=torch.zeros_like(case.index)), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.usefixtures("loaded_by")
def test_low_precision(dtype: torch.dtype, temperature: float) -> None:
    """Against float64 on the same rounded inputs: at most twice the error of the eager form in the same dtype."""
    case = replace(case_of(temperature=temperature, count=150), reduction="none").to(dtype)
    truth, eager, seen = expected(case), run("eager", case), run("triton", case)
    for name in ("loss", "query", "key", "negatives"):
        wish = getattr(truth, name)
        assert error(getattr(seen, name), wish) <= 2 * error(getattr(eager, name), wish) + 1e-6, name


def test_float32_queue_under_autocast() -> None:
    """What MomentumQueue() is in mixed precision; the products run in bfloat16, and so does the eager form's error."""
    case = replace(case_of(count=150), reduction="none")
    halves = replace(case, query=case.query.bfloat16(), key=case.key.bfloat16())
    truth = expected(halves)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast(helpers.DEVICES["triton"], torch.bfloat16):
        eager, seen = (run(name, halves, wanted=("query", "negatives")) for name in ("eager", "triton"))
    for name in ("loss", "query", "negatives"):
        wish = getattr(truth, name)
        assert error(getattr(seen, name), wish) <= 2 * error(getattr(eager, name), wish) + 1e-6, name


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ties_count_half(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, splits: int) -> None:
    """Not in bfloat16, to which the interpreter cuts where a GPU rounds."""
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *args: forward(*args, splits=splits))
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


def test_an_index_out_of_range_gives_the_row_nan() -> None:
    """Only where the host cannot look, hence straight to the backend: nothing is read there, no other row changes."""
    case, device = case_of(), "cuda" if torch.cuda.is_available() else "cpu"
    query, key = (x.flatten(2).to(device) for x in (case.query, case.key))
    index = case.index.to(device)
    float32 = torch.float32
    problem = Problem(query, key, case.negatives.to(device), 5.0, None, index, None, None, True, float32, float32)
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


def test_grids_end_at_65535_programs_but_for_the_first_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    images, grids = 65536, []

    class Seen:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda **_: None

    for kernels in (fused.kernels, fused_matching.kernels):
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Seen())
    for positions in (1, 65):  # one tile, and several
        maps = torch.zeros(1, 1, 1).expand(images, 1, positions)
        fused_matching.match(maps, maps, False)
        fused.grad_key(
            maps, maps, torch.zeros(1, 1, dtype=torch.int64).expand(images, positions), maps[:, 0], torch.float32
        )
    assert all(grid[0] >= images for grid in grids)
    assert all(size <= 65535 for grid in grids for size in grid[1:])
    assert len(grids) == 6


def test_zero_vectors_and_nan() -> None:
    case = case_of(reduction="none")
    case.query[0, :, 0, 0] = 0
    case.key[1, :, 0, 0] = 0
    check("triton", case, FLOAT32, wanted=("query", "key", "negatives"))
    case.query[0, 0, 1, 1] = float("nan")
    seen = run("triton", case, wanted=("query",))
    assert torch.equal(seen.loss.isnan().nonzero(), torch.tensor([[0, 8]]))
    assert torch.equal(seen.query.isnan().flatten(2).any(1), seen.loss.isnan())


def test_repeats_bit_by_bit() -> None:
    case = case_of()
    first, second = run("triton", case), run("triton", case)
    for name in ("loss", "query", "key", "negatives", "temperature"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_plan_uses_the_device() -> None:
    """13 blocks of rows leave 119 of 132 multiprocessors idle; ten parts of the queue leave 2.

    98 blocks leave 34 idle; four parts of the queue are 392 programs, three rounds of 132 but for 4.
    """
    per_split = triton_plan.plan_split(items=1568, length=65536, block=128, step=128, slots=132)
    assert per_split % 128 == 0
    assert 13 * -(-65536 // per_split) in range(125, 133)
    assert triton_plan.plan_split(items=12544, length=65536, block=128, step=128, slots=132) == 65536 // 4
    assert triton_plan.plan_split(items=50176, length=65536, block=128, step=128, slots=132) == 65536
    assert triton_plan.plan_split(items=64, length=100, block=128, step=128, slots=132) == 128


# ---- matching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("grids", [((7, 7), (7, 7)), ((10, 9), (7, 12)), ((1, 1), (9, 9))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matching(dtype: torch.dtype, grids: tuple[tuple[int, int], tuple[int, int]], mutual: bool) -> None:
    query, key = (torch.randn(2, 70, *grid).to(dtype) for grid in grids)
    truth = oracle.match(flat64(query), flat64(key), mutual=mutual)
    seen = match("triton", query, key, mutual=mutual)
    assert np.array_equal(seen.index.numpy(), truth.index)
    assert np.array_equal(seen.valid.numpy(), truth.valid)
    assert_close(seen.score, truth.score, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matching_layouts(layout: str) -> None:
    query, key = lay_out(torch.randn(2, 130, 7, 7), layout), lay_out(torch.randn(2, 130, 6, 8), layout)
    truth = oracle.match(flat64(query), flat64(key))
    assert np.array_equal(match("triton", query, key).index.numpy(), truth.index)


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
def test_an_infinite_feature_matches_inside_the_grid(
    grids: tuple[tuple[int, int], tuple[int, int]], mutual: bool
) -> None:
    """Every key is negative in its channel: -inf is below the nothing beyond the grid, if that is inf * 0 = NaN."""
    query, key = torch.randn(2, 16, *grids[0]), torch.randn(2, 16, *grids[1])
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


def test_the_selftest_runs_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()

    class Noted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launched.add(self.name)
            return self.kernel[grid]

    names = set()
    for kernels in (fused.kernels, fused_matching.kernels):
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            names.add(name)
            monkeypatch.setattr(kernels, name, Noted(name, getattr(kernels, name)))
    assert selftest.main(["--small"]) == 0
    assert launched == names


# ---- registration --------------------------------------------------------------------------------------------------


def test_operators() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.randn(2, 16, 9, device=device)
    negatives = torch.nn.functional.normalize(torch.randn(70, 16, device=device), dim=1)
    index = torch.randint(9, (2, 9), device=device)
    problem = (query, query, negatives, 5.0, None, index, None, None, False, torch.float32, torch.float32)
    rows = torch.rand(2, 9, device=device)
    torch.library.opcheck(torch.ops.densecl_ops.info_nce, (*problem, True, True, "triton"))
    torch.library.opcheck(torch.ops.densecl_ops.info_nce, (*problem, False, False, "triton"))
    torch.library.opcheck(torch.ops.densecl_ops.info_nce_grad_negatives, (*problem, rows, rows, "triton"))
    inputs = (query, query, index, rows, torch.float32, "triton")
    torch.library.opcheck(torch.ops.densecl_ops.info_nce_grad_key, inputs)
    torch.library.opcheck(torch.ops.densecl_ops.match, (query, query, True, "triton"))


def test_compiled_call_equals_eager_call() -> None:
    case = case_of()

    def loss(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        return dense_info_nce(query, key, negatives, case.index.to(query.device), backend="triton")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = [x.to(device).requires_grad_() for x in (case.query, case.key, case.negatives)]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_it_cannot_serve_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'triton'.*up to 512 channels, not 513"):
        run("triton", case_of(channels=513, negatives=2, query_grid=(1, 1)))
    with pytest.raises(ValueError, match=r"backend: got 'triton'.*float64"):
        run("triton", make_case())


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


def test_kernels_that_fail_are_a_warning_under_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning and one try for each kind of call; then blockwise serves, forward and backward."""
    monkeypatch.setattr(_backends, "_failed", set())
    monkeypatch.setattr(_backends, "choose", lambda requested, *_: "auto" if requested == "auto" else requested)
    _backends._warn_slow.cache_clear()
    tried: list[str] = []

    def fails(name: str) -> Callable[..., Any]:
        def launch(*_: Any) -> Any:
            tried.append(name)
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

        return launch

    for module, name in ((fused, "forward"), (fused, "grad_key"), (fused, "grad_negatives"), (fused_matching, "match")):
        monkeypatch.setattr(module, name, fails(name))
    case = case_of()

    def everything(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.negatives)]
        loss = dense_info_nce(*leaves, case.index, backend=backend)
        return [
            loss.detach(),
            *torch.autograd.grad(loss, leaves),
            dense_correspondence(*leaves[:2], backend=backend).index,
        ]

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = [everything("auto") for _ in range(3)]
    assert sorted(tried) == ["forward", "grad_key", "grad_negatives", "match"]
    messages = [str(warning.message) for warning in seen if "slower 'blockwise'" in str(warning.message)]
    assert len(messages) == 4
    assert all("OutOfResources: out of resource: shared memory" in message for message in messages)
    for result in results:
        for ours, theirs in zip(result, everything("blockwise"), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        everything("triton")


def test_compiled_code_falls_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_failed", set())
    monkeypatch.setattr(_backends, "choose", lambda *_: "auto")
    monkeypatch.setattr(fused, "forward", None)
    _backends._warn_slow.cache_clear()
    case = case_of()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(query: Tensor) -> Tensor:
        return dense_info_nce(query, case.key, case.negatives, case.index)

    query = case.query.requires_grad_()
    with pytest.warns(UserWarning, match="its kernels failed .info_nce.forward, torch.float32, D = 24.: TypeError"):
        seen = loss(query)
    assert_close(torch.autograd.grad(seen, query)[0], expected(case_of()).query, FLOAT32)


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

    def match(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(fused_matching, "match", match)
    with pytest.raises(type(error), match=re.escape(str(error))):
        _backends.call("auto", "correspondence", "match", (), torch.device("cpu"))
    assert not _backends._failed


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


def test_too_old_a_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    with pytest.raises(ValueError, match=r"it needs triton 3\.6, and 3\.2 is installed"):
        run("triton", case_of())


def test_rows_that_are_not_declared_to_be_unit_rows_may_be_long() -> None:
    """Without a running maximum their logits of 5 x 100 would overflow."""
    case = case_of(count=20)
    rows = case.negatives * 100
    queue = SimpleNamespace(rows=rows, count=torch.tensor(20))
    seen, wish = (helpers.info_nce(name, case.query, case.key, queue, case.index).cpu() for name in ("triton", "eager"))
    assert_close(seen, wish, FLOAT32)


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


def test_nan_in_a_row_left_out() -> None:
    case = case_of(weight=torch.ones(2, 35))
    case.weight[0, 8] = 0
    case.query[0, 0, 1, 1] = float("nan")
    seen = run("triton", case, wanted=("query", "key", "negatives"))
    for value in (seen.loss, seen.query, seen.key, seen.negatives):
        assert value.isfinite().all()
