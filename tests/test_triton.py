"""The Triton kernels against the oracle: on a GPU where there is one, else in Triton's interpreter on the CPU.

Every branch of every kernel is taken once: split and unsplit, no shift and running maximum, exclude, count, rank,
every layout, every gradient, one tile and many. tests/test_kernels.py shows how well they compile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import Case, assert_close, check, error, expected, flat64, lay_out, make_case, match, run
from torch import Tensor

triton = pytest.importorskip("triton")

from densecl_ops import _launch  # noqa: E402
from densecl_ops.functional import dense_info_nce  # noqa: E402
from densecl_ops.info_nce import triton_launch as fused  # noqa: E402

FLOAT32 = 5e-6  # relative error norm; eager float32 stays below 2e-6 on the same cases
LAYOUTS = ("contiguous", "channels_last", "tokens", "slice", "swapped")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not _launch.interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)


def case_of(**options: Any) -> Case:
    options = {"batch": 2, "channels": 24, "query_grid": (5, 7), "key_grid": (4, 4), "negatives": 150} | options
    return make_case(dtype=torch.float32, **options)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("temperature", [0.2, 0.01], ids=["no shift", "running max"])
@pytest.mark.parametrize("rank", [False, True])
def test_split_and_shift(monkeypatch: pytest.MonkeyPatch, splits: int, temperature: float, rank: bool) -> None:
    """A queue's rows are known to be unit vectors, so only a low temperature calls for the running maximum."""
    forward, grad = fused.forward, fused.grad_negatives
    monkeypatch.setattr(fused, "forward", lambda *args: forward(*args, splits=splits))
    monkeypatch.setattr(fused, "grad_negatives", lambda *args: grad(*args, splits=splits))
    case = case_of(temperature=temperature, count=130)
    check("triton", case, FLOAT32, wanted=("query", "key", "negatives"), rank=rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = case_of()
    case = replace(case, query=lay_out(case.query, layout), key=lay_out(case.key, layout))
    check("triton", case, FLOAT32)


def test_negatives_in_columns() -> None:
    """The official DenseCL keeps its queue as (D, K)."""
    case = case_of()
    check("triton", replace(case, negatives=case.negatives.t().contiguous().t()), FLOAT32)


@pytest.mark.parametrize("channels", [1, 16, 40, 64])
@pytest.mark.parametrize("negatives", [1, 64, 65])
def test_sizes(channels: int, negatives: int) -> None:
    check("triton", case_of(channels=channels, negatives=negatives, query_grid=(3, 3), count=negatives), FLOAT32)


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


def test_many_queries_share_a_key() -> None:
    case = case_of()
    check("triton", replace(case, index=torch.zeros_like(case.index)), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_low_precision(dtype: torch.dtype, temperature: float) -> None:
    """Against float64 on the same rounded inputs: at most twice the error of the eager form in the same dtype."""
    case = replace(case_of(temperature=temperature, count=150), reduction="none").to(dtype)
    truth, eager, seen = expected(case), run("eager", case), run("triton", case)
    for name in ("loss", "query", "key", "negatives"):
        wish = getattr(truth, name)
        assert error(getattr(seen, name), wish) <= 2 * error(getattr(eager, name), wish) + 1e-6, name


def test_zero_vectors_and_nan() -> None:
    case = case_of(reduction="none")
    case.query[0, :, 0, 0] = 0
    case.key[1, :, 0, 0] = 0
    check("triton", case, FLOAT32, wanted=("query", "key", "negatives"))
    case.query[0, 0, 1, 1] = float("nan")
    seen = run("triton", case, wanted=("query",))
    assert torch.equal(seen.loss.isnan().nonzero(), torch.tensor([[0, 8]], device=seen.loss.device))
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
    per_split = fused.plan_split(items=1568, length=65536, block=128, step=128, slots=132)
    assert per_split % 128 == 0
    assert 13 * -(-65536 // per_split) in range(125, 133)
    assert fused.plan_split(items=12544, length=65536, block=128, step=128, slots=132) == 65536 // 4
    assert fused.plan_split(items=50176, length=65536, block=128, step=128, slots=132) == 65536
    assert fused.plan_split(items=64, length=100, block=128, step=128, slots=132) == 128


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


def test_too_old_a_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    with pytest.raises(ValueError, match=r"it needs triton 3\.6, and 3\.2 is installed"):
        run("triton", case_of())


@pytest.mark.parametrize("backend", ["eager", "blockwise", "triton"])
def test_squares_that_overflow_give_nan(backend: str) -> None:
    """A vector of 1e20 has a direction, but float32 cannot square it: NaN shows that, a zero vector would hide it."""
    case = case_of(reduction="none")
    case.query[0, :, 0, 0] = 1e20
    assert torch.equal(run(backend, case, wanted=()).loss.isnan().nonzero().cpu(), torch.tensor([[0, 0]]))
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
