"""The loss and all its gradients against the float64 oracle: every argument, shape and layout."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import GRADIENTS, LAYOUTS, assert_close, check, lay_out, loss_cases, make_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densecl_ops import Correspondence, DenseInfoNCELoss, MomentumQueue
from densecl_ops._numerics import normalize_keys

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
LAYOUT = st.sampled_from(LAYOUTS)


@st.composite
def cases(draw: st.DrawFn) -> helpers.Case:
    batch, negatives = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 37, 130, 1300]))
    case = make_case(
        seed=draw(st.integers(0, 10**6)),
        batch=batch,
        channels=draw(st.sampled_from([1, 2, 3, 8, 16, 33])),
        query_grid=draw(GRIDS),
        key_grid=draw(GRIDS),
        negatives=negatives,
        temperature=draw(st.sampled_from([0.01, 0.07, 0.2, 1.0])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )
    shape, generator = case.index.shape, torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        case.weight = torch.rand(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        case.valid = torch.rand(shape, generator=generator) < 0.7
    if draw(st.booleans()):
        case.exclude = torch.randint(negatives, (batch,), generator=generator)
    if draw(st.booleans()):
        case.count = draw(st.integers(0, negatives))
    case.negatives = lay_out(case.negatives[:, :, None, None], draw(LAYOUT)).flatten(1)
    if draw(st.booleans()):
        case.negatives = case.negatives.t().contiguous().t()  # (D, K) transposed
    return replace(case, query=lay_out(case.query, draw(LAYOUT)), key=lay_out(case.key, draw(LAYOUT)))


CASES = loss_cases(torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_every_option(backend: str, name: str) -> None:
    for wanted, rank in ((GRADIENTS, True), (("query",), False)):
        check(backend, CASES[name], wanted=wanted, rank=rank)


@pytest.mark.parametrize("wanted", [(), ("query",), GRADIENTS], ids=["forward", "query", "all"])
@given(case=cases(), rank=st.booleans())
def test_any_mixture_of_options(backend: str, wanted: tuple[str, ...], case: helpers.Case, rank: bool) -> None:
    check(backend, case, wanted=wanted, rank=rank)
    # Logits up to 1 / t, each off by 1e-7; of D = 1 the gradient is nothing but that (eager: 2.6e-5).
    tolerance = 4e-5 if case.temperature > 0.05 else 2e-4
    check(backend, case.to(torch.float32), tolerance, wanted[:3], rank)


def test_many_tiles_of_the_queue(backend: str) -> None:
    """Four tiles and a remainder, negatives of norm 0.01 to 40: shifted, rescaled, excluded, counted."""
    case = make_case(3, negatives=4500, temperature=0.1)
    case.negatives *= torch.logspace(-2, 1.6, 4500, dtype=torch.float64)[torch.randperm(4500), None]
    case.exclude = torch.tensor([0, 1024, 4499])
    for count in (None, 4400, 1024, 1025, 1, 0):
        for wanted in (("query",), helpers.GRADIENTS):
            for rank in (True, False):
                check(backend, replace(case, count=count), wanted=wanted, rank=rank)


def test_image_level_vectors(backend: str) -> None:
    """(B, D) vectors: MoCo's loss, and `none` returns (B, 1)."""
    case = make_case(6, query_grid=(1, 1), key_grid=(1, 1))
    query, key = case.query[:, :, 0, 0], case.key[:, :, 0, 0]
    rows = helpers.info_nce(backend, query, key, case.negatives, reduction="none")
    positive = torch.cosine_similarity(query, key, dim=1)[:, None]
    logits = torch.cat([positive, torch.nn.functional.normalize(query, dim=1) @ case.negatives.t()], 1)
    moco = torch.nn.functional.cross_entropy(logits / 0.2, torch.zeros(3, dtype=torch.long), reduction="none")
    assert rows.shape == (3, 1)
    assert_close(rows[:, 0], moco, 1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_counts_of_a_queue_of_ones_own(backend: str, dtype: torch.dtype) -> None:
    """Rows and a count are all that the protocol asks for."""
    case = make_case(23, negatives=4)
    for count in range(5):
        rows, written = helpers.to_device(backend, case.negatives, torch.tensor(count, dtype=dtype))
        queue = SimpleNamespace(rows=rows, count=written)
        loss = helpers.info_nce(backend, case.query, case.key, queue, case.index)
        assert_close(loss, helpers.expected(replace(case, count=count)).loss, 1e-9)


def test_momentum_queue_as_negatives(backend: str) -> None:
    queue = MomentumQueue(size=9, dim=6, init="empty", dtype=torch.float64)
    queue.enqueue(torch.randn(4, 6))
    case = make_case(16)
    loss = helpers.info_nce(backend, case.query, case.key, queue, case.index)
    assert isinstance(loss, Tensor)
    assert_close(loss, helpers.expected(replace(case, negatives=queue.rows.clone(), count=4)).loss, 1e-12)


# ---- weights, validity, reductions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["float", "bool", "with zeros", "all zero", "float32"])
@pytest.mark.parametrize("invalid", ["none", "some", "all"])
def test_weights(backend: str, reduction: str, kind: str, invalid: str) -> None:
    case = make_case(10, reduction=reduction)
    weight = torch.rand(case.index.shape, dtype=torch.float64)
    case.weight = {
        "float": weight,
        "float32": weight.float(),
        "bool": weight > 0.5,
        "with zeros": weight * (weight > 0.5),
        "all zero": weight * 0,
    }[kind]
    if invalid != "none":
        case.valid = (torch.rand(case.index.shape) > 0.5) & (invalid == "some")
    wanted = ("query", "key", "negatives", "temperature") + (("weight",) if kind == "float" else ())
    check(backend, case, wanted=wanted)


# ---- the rank -------------------------------------------------------------------------------------------------------


ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# query and key, negatives, autocast
MIXTURES = [
    *((dtype, dtype, None) for dtype in ALL_DTYPES),
    (torch.bfloat16, torch.float32, None),
    (torch.float32, torch.bfloat16, None),
    (torch.float32, torch.float32, torch.bfloat16),
]


def ranks(
    backend: str, query: Tensor, key: Tensor, rows: Tensor, autocast: torch.dtype | None = None, **options: Any
) -> Tensor:
    with torch.autocast(helpers.DEVICES.get(backend, "cpu"), autocast or torch.bfloat16, enabled=autocast is not None):
        return helpers.info_nce(backend, query, key, rows, return_rank=True, **options)[1].cpu()


def exact_rank_case(scores: tuple[float, ...] = (1.0, 0.5, 0.75, 0.5, 0.0)) -> helpers.Case:
    """Exactly representable cosines; the positive's is 0.5."""
    negatives = torch.tensor([[score, 0.25, 0, 0] for score in scores])
    return helpers.Case(torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 4), 0.5), negatives, temperature=0.25)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(
    ("scores", "rank"),
    [((0.5,), 0), ((0.5, 0.5), 1), ((0.5,) * 5, 2), ((0.75, 0.5, 0.0), 1), ((1.0, 0.5, 0.75, 0.5, 0.0), 3)],
)
def test_ties_count_half(backend: str, dtype: torch.dtype, scores: tuple[float, ...], rank: int) -> None:
    """A copy of the positive among the negatives costs nothing."""
    case = exact_rank_case(scores).to(dtype)
    assert helpers.expected(case).rank.tolist() == [[rank]]
    for wanted in (helpers.GRADIENTS, ()):
        assert helpers.run(backend, case, wanted).rank.tolist() == [[rank]]


@pytest.mark.parametrize(("exclude", "count", "rank"), [(0, None, 2), (1, None, 2), (4, 4, 3), (0, 2, 0), (4, 0, 0)])
def test_rank_leaves_out_excluded_and_unfilled_rows(backend: str, exclude: int, count: int | None, rank: int) -> None:
    case = replace(exact_rank_case(), exclude=torch.tensor([exclude]), count=count)
    assert helpers.expected(case).rank.tolist() == helpers.run(backend, case).rank.tolist() == [[rank]]


@pytest.mark.parametrize(("query", "rows", "autocast"), MIXTURES)
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-3])
def test_collapse_ranks_half(
    backend: str, query: torch.dtype, rows: torch.dtype, autocast: torch.dtype | None, noise: float
) -> None:
    """All vectors one direction, off by `noise` of their length: the positive is one of K + 1 that are alike."""
    size, positions = 2048, 256
    vectors = torch.randn(64) + 8 * noise * torch.nn.functional.normalize(torch.randn(size + 2 * positions, 64), dim=1)
    vectors = (3 * vectors).to(query)
    q, k = vectors[size:].view(2, 4, -1, 64).transpose(2, 3)
    rank = ranks(backend, q, k, normalize_keys(vectors[:size], rows), autocast)
    if noise == 0:
        assert (rank == size // 2).all()
    assert abs(rank.double().mean() / size - 0.5) < 4 * 0.29 / positions**0.5
    assert (rank < 5).double().mean() < 0.02


def test_collapse_of_the_published_setting(backend: str) -> None:
    vector, rows = torch.ones(1, 128), torch.full((65536, 128), 128**-0.5)
    assert ranks(backend, vector, vector, rows).tolist() == [[32768]]


@pytest.mark.parametrize(("query", "rows", "autocast"), MIXTURES)
def test_rank_of_clustered_rows(
    backend: str, query: torch.dtype, rows: torch.dtype, autocast: torch.dtype | None
) -> None:
    """Cosines so close that rounding them to bfloat16 moved a rank by 20 on average.

    A float32 norm rounds to another operand than a float64 norm once in 2^16 coordinates: such a row is off by a few.
    """
    vectors = (torch.randn(64) + 0.8 * torch.randn(4096 + 2 * 392, 64)).to(query)
    q, k = vectors[4096:].view(2, 8, 49, 64).transpose(2, 3)
    case = helpers.Case(q, k, normalize_keys(vectors[:4096], rows))
    truth = helpers.expected(case, autocast).rank
    assert (truth > 0).mean() > 0.9
    assert np.abs(ranks(backend, q, k, case.negatives, autocast).numpy() - truth).mean() < 0.02


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("count", [None, 3])
def test_rank_and_nan(backend: str, dtype: torch.dtype, count: int | None) -> None:
    """A positive that is NaN ranks last, behind all rows; a negative that is NaN counts nothing."""
    case = make_case(14, count=count).to(dtype)
    case = replace(case, index=None, key=case.key.view_as(case.query))
    clean = helpers.run(backend, case, ()).rank
    for name in ("query", "key"):
        spoiled = getattr(case, name).clone()
        spoiled[1, 2, 0, 1] = math.nan
        rank = helpers.run(backend, replace(case, **{name: spoiled}), ()).rank
        assert rank[1, 1] == len(case.negatives)
        rank[1, 1] = clean[1, 1]
        assert torch.equal(rank, clean)
    case.negatives[1] = -case.negatives[1].abs()
    case.negatives[1, 0] = math.nan
    beaten = replace(case, exclude=torch.ones(3, dtype=torch.int64))
    assert torch.equal(helpers.run(backend, case, ()).rank, helpers.run(backend, beaten, ()).rank)


def test_rank_of_every_row(backend: str) -> None:
    case = make_case(13, batch=4, negatives=2100, channels=12, weight=torch.zeros(4, 6), valid=torch.zeros(4, 6) > 0)
    truth = helpers.expected(case)
    assert (truth.rank > 0).mean() > 0.9
    for wanted in ((), helpers.GRADIENTS):  # the rank of a row does not depend on its weight
        assert helpers.run(backend, case, wanted=wanted).rank.tolist() == truth.rank.tolist()


# ---- the module -----------------------------------------------------------------------------------------------------


def test_module_equals_function(backend: str) -> None:
    case = make_case(14, temperature=0.1, reduction="sum", exclude=torch.tensor([1, 2, 3]))
    case.valid, case.weight = torch.rand(3, 6) < 0.7, torch.rand(3, 6)
    criterion = DenseInfoNCELoss(0.1, "sum", backend=backend)
    match = Correspondence(case.index, torch.zeros(3, 6), case.valid)
    args = helpers.to_device(backend, case.query, case.key, case.negatives, match)
    weight, exclude = helpers.to_device(backend, case.weight, case.exclude)
    loss, rank = criterion(*args, weight=weight, exclude=exclude, return_rank=True)
    truth = helpers.expected(case)
    assert_close(loss, truth.loss, 1e-12)
    assert rank.tolist() == truth.rank.tolist()


@pytest.mark.parametrize("learnable", [False, True])
def test_module_copies(learnable: bool) -> None:
    case = make_case(27, temperature=0.13).to(torch.float32)
    args = (case.query, case.key, case.negatives, case.index)
    criterion = DenseInfoNCELoss(0.13, "none", learnable)
    other = DenseInfoNCELoss(0.5 if learnable else 0.13, "none", learnable)
    other.load_state_dict(criterion.state_dict())
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), other, criterion.to(torch.float32)):
        assert torch.equal(twin(*args), criterion(*args))
        assert len(list(twin.parameters())) == int(learnable)
    assert_close(criterion(*args), helpers.expected(replace(case, reduction="none")).loss, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "0.13" in repr(criterion)


def test_correspondence_survives_pickle() -> None:
    match = Correspondence(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(match, pickle.loads(pickle.dumps(match)), strict=True))
