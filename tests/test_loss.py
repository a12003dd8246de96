"""The loss and all its gradients against the float64 oracle: every argument, shape and layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import GRADIENTS, assert_close, check, expected, lay_out, make_case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densecl_ops._numerics import normalize_keys

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
GUISE = st.sampled_from(helpers.GUISES)
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: x,
    "float32": lambda x: x.float(),
    "bool": lambda x: x > 0.5,
    "with zeros": lambda x: x * (x > 0.5),
    "all zero": lambda x: x * 0,
}


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
        weight = torch.rand(shape, generator=generator, dtype=torch.float64)
        case.weight = WEIGHTS[draw(st.sampled_from([*WEIGHTS]))](weight)
    if draw(st.booleans()):
        case.valid = torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.7]))
    if draw(st.booleans()):
        case.exclude = torch.randint(negatives, (batch,), generator=generator)
    if draw(st.booleans()):
        case.count = draw(st.integers(0, negatives))
    case.negatives = lay_out(case.negatives[:, :, None, None], draw(GUISE)).flatten(1)
    if draw(st.booleans()):
        case.negatives = case.negatives.t().contiguous().t()  # (D, K) transposed
    return replace(case, query=lay_out(case.query, draw(GUISE)), key=lay_out(case.key, draw(GUISE)))


CASES = helpers.loss_cases(torch.float64)
CASES["many rows"] = make_case(2, batch=40, query_grid=(5, 6), negatives=70, exclude=torch.arange(40))


@pytest.mark.parametrize("name", CASES)
def test_every_option(backend: str, name: str) -> None:
    for wanted, rank in ((GRADIENTS, True), (("query",), False)):
        check(backend, CASES[name], wanted=wanted, rank=rank)


@settings(max_examples=120)
@given(case=cases(), wanted=st.sets(st.sampled_from(GRADIENTS)), rank=st.booleans())
def test_any_mixture_of_options(backend: str, case: helpers.Case, wanted: set[str], rank: bool) -> None:
    if case.weight is not None and case.weight.dtype != torch.float64:
        wanted = wanted - {"weight"}
    check(backend, case, wanted=tuple(wanted), rank=rank)
    # Logits up to 1 / t, each off by 1e-7; of D = 1 the gradient is nothing but that (eager: 2.6e-5).
    tolerance = 4e-5 if case.temperature > 0.05 else 2e-4
    check(backend, case.to(torch.float32), tolerance, tuple(wanted - {"temperature", "weight"}), rank)


@settings(max_examples=120)
@given(case=cases(), data=st.data())
def test_any_values(backend: str, case: helpers.Case, data: st.DataObject) -> None:
    """The loss, and the gradient to the query where everything is finite."""
    for name in ("query", "key", "negatives", *(() if case.weight is None else ("weight",))):
        x = getattr(case, name)
        kinds = [*helpers.VALUES] if x.is_floating_point() else ["as they are"]
        setattr(case, name, helpers.VALUES[data.draw(st.sampled_from(kinds), label=name)](x))
    case.temperature = data.draw(st.sampled_from([0.2, 0.01, 1e-18, 1e30, np.float32(0.5), 1, torch.tensor(0.3)]))
    seen = run(backend, case, ("query",), data.draw(st.booleans()))
    maps = case.query, case.key, case.negatives
    assert (seen.loss.dtype == torch.float64) == any(x.dtype == torch.float64 for x in maps)
    case.temperature = float(case.temperature)
    weight = torch.ones(case.index.shape) if case.weight is None else case.weight
    weight = weight if case.valid is None else weight.masked_fill(~case.valid, 0)
    if not weight.to(seen.loss.dtype).isfinite().all():
        assert not seen.loss.isfinite().all(), "weights beyond the dtype of the loss must show"
        return
    with np.errstate(all="ignore"):
        truth = expected(case)
    tolerance = 2e-5 if torch.float32 in (x.dtype for x in (*maps, weight)) else 1e-9
    finite = truth.margin[np.isfinite(truth.margin)] / case.temperature
    terms = max(1.0, float(np.abs(finite).max(initial=0)))  # a loss is a difference of such, times its weight
    if case.reduction != "mean":
        terms *= max(1.0, float(weight.max()))
    np.testing.assert_allclose(seen.loss.numpy(), truth.loss, rtol=tolerance, atol=terms * tolerance / 10)
    if terms > 1e9:  # such logits swallow the log of a number of ties, and the oracle's probabilities with it
        return
    lengths = np.linalg.norm(helpers.flat64(case.query), axis=1)
    # test_loss_numerics.py says which gradients NaN may reach.
    if all(x.isfinite().all() for x in maps) and np.abs(truth.query).max() < 1e38 and (lengths > 0).all():
        longest = np.linalg.norm(helpers.numpy64(case.negatives), axis=1).max()
        floor = 1e-2 * max(1.0, longest) / case.temperature / lengths.min()
        assert_close(seen.query, truth.query, tolerance, "gradient to query", floor)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_counts(backend: str, kind: torch.dtype) -> None:
    """Rows and a count of any integer dtype are all that the protocol of a queue asks for."""
    case = make_case(23, negatives=4)
    for count in range(5):
        queue = SimpleNamespace(rows=case.negatives, count=torch.tensor(count, dtype=kind))
        loss = helpers.info_nce(backend, case.query, case.key, *helpers.to_device(backend, queue), case.index)
        assert_close(loss, expected(replace(case, count=count)).loss, 1e-12)


ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# query and key, negatives, autocast
MIXTURES = [
    *((dtype, dtype, None) for dtype in ALL_DTYPES),
    (torch.bfloat16, torch.float32, None),
    *((torch.float32, rows, None) for rows in (torch.bfloat16, torch.float64)),
    (torch.float32, torch.float32, torch.bfloat16),
]


def alike(noise: float, size: int, mixture: Any) -> helpers.Case:
    """All vectors one direction, off by `noise` of their length."""
    dtype, rows, autocast = mixture
    vectors = torch.randn(64) + 8 * noise * torch.nn.functional.normalize(torch.randn(size + 1024, 64), dim=1)
    vectors = (3 * vectors).to(dtype)
    query, key = vectors[size:].view(2, 8, 64, 64).transpose(2, 3)
    return helpers.Case(query, key, normalize_keys(vectors[:size], rows), autocast=autocast)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scores", "rank"),
    [((0.5,), 0), ((0.5, 0.5), 1), ((0.5,) * 5, 2), ((0.75, 0.5, 0.0), 1), ((1.0, 0.5, 0.75, 0.5, 0.0), 3)],
)
def test_ties_count_half(backend: str, dtype: torch.dtype, scores: tuple[float, ...], rank: int) -> None:
    """A copy of the positive among the negatives costs nothing. Exactly representable cosines, the positive's 0.5."""
    negatives = torch.tensor([[score, 0.25, 0, 0] for score in scores])
    case = helpers.Case(torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 4), 0.5), negatives, temperature=0.25).to(dtype)
    assert expected(case).rank.tolist() == [[rank]]
    for wanted in (GRADIENTS, ()):
        assert run(backend, case, wanted).rank.tolist() == [[rank]]


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-3])
def test_collapse_ranks_half(backend: str, mixture: Any, noise: float) -> None:
    """The positive is one of K + 1 that are alike."""
    rank = run(backend, alike(noise, 2048, mixture), ()).rank.numpy()
    if noise == 0:
        assert (rank == 1024).all()
    assert abs(rank.mean() / 2048 - 0.5) < 4 * 0.29 / rank.size**0.5
    assert (rank < 5).mean() < 0.02


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_rank_of_clustered_rows(backend: str, mixture: Any) -> None:
    """Cosines so close that rounding them to bfloat16 moved a rank by 20 on average.

    A float32 norm rounds to another operand than a float64 norm once in 2^16 coordinates: such a row is off by a few.
    """
    case = alike(0.8, 4096, mixture)
    truth = expected(case).rank
    assert (truth > 0).mean() > 0.9
    assert np.abs(run(backend, case, ()).rank.numpy() - truth).mean() < 0.02


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("count", [None, 3])
def test_rank_and_nan(backend: str, dtype: torch.dtype, count: int | None) -> None:
    """A positive that is NaN ranks last, behind all rows; a negative that is NaN counts nothing."""
    case = make_case(14, count=count).to(dtype)
    case = replace(case, index=None, key=case.key.view_as(case.query))
    clean = run(backend, case, ()).rank
    for name in ("query", "key"):
        spoiled = getattr(case, name).clone()
        spoiled[1, 2, 0, 1] = math.nan
        rank = run(backend, replace(case, **{name: spoiled}), ()).rank
        assert rank[1, 1] == len(case.negatives)
        rank[1, 1] = clean[1, 1]
        assert torch.equal(rank, clean)
    case.negatives[1] = -case.negatives[1].abs()
    case.negatives[1, 0] = math.nan
    beaten = replace(case, exclude=torch.ones(3, dtype=torch.int64))
    assert torch.equal(run(backend, case, ()).rank, run(backend, beaten, ()).rank)
