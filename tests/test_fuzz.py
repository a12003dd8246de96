"""Arguments of every right kind give the oracle's number; test_errors.py has the wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import oracle
import torch
from helpers import BACKENDS, HOUSE_FORM, Case, assert_close, expected, flat64, numpy64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densecl_ops.functional import (
    boxes_from_albumentations,
    boxes_from_kornia,
    boxes_from_matrix,
    boxes_from_torchvision,
    dense_correspondence,
    dense_info_nce,
)

# The same values in another guise, or other values that are as good: the oracle reads them from the result.
BENIGN: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "requires grad": lambda x: x.detach().requires_grad_(x.is_floating_point()),
    "parameter": lambda x: nn.Parameter(x) if x.is_floating_point() else x,
    "transposed strides": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "first image expanded": lambda x: x[:1].expand_as(x),
    "overlapping memory": lambda x: x.contiguous().as_strided(x.shape, (1,) * x.ndim),
    "negative view": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
}

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x.float(),
    "zeros": torch.zeros_like,
    "NaN": lambda x: x.index_fill(0, torch.tensor([0]), float("nan")),
    "inf": lambda x: x.index_fill(0, torch.tensor([1]), float("inf")),
    "huge": lambda x: x * 1e100,
    "tiny": lambda x: x * 1e-9,
}


def arguments(draw: Any, tensors: dict[str, Tensor], options: dict[str, list[Any]]) -> dict[str, Any]:
    """Each tensor in a guise of its own, and one of the values of each option."""
    made: dict[str, Any] = {}
    for name, x in tensors.items():
        guises = BENIGN | (VALUES if x.is_floating_point() else {})
        made[name] = guises[draw(st.sampled_from([*guises]), label=name)](x)
    return made | {name: draw(st.sampled_from(values), label=name) for name, values in options.items()}


LOSS_OPTIONS = {
    "temperature": [0.2, 0.01, 1e-18, 1e30, np.float32(0.5), 1, torch.tensor(0.3)],
    "reduction": ["mean", "sum", "none"],
    "return_rank": [False, True],
    "backend": [*BACKENDS, "auto"],
}


def loss_tensors(seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        "query": torch.tensor(rng.standard_normal((2, 4, 2, 3))),
        "key": torch.tensor(rng.standard_normal((2, 4, 3, 2))),
        "negatives": torch.tensor(oracle.unit(rng.standard_normal((2, 4)), 1)[0]),
        "correspondence": torch.tensor(rng.integers(0, 6, (2, 6))),
        "weight": torch.tensor(rng.random((2, 6))),
        "exclude": torch.tensor([1, 0]),
    }


def plain(made: dict[str, Any]) -> dict[str, Any]:
    """What numpy can read: without gradient, without lazy negation."""
    return {name: x.detach().resolve_neg() if isinstance(x, Tensor) else x for name, x in made.items()}


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_fuzz_the_loss(seed: int, data: st.DataObject) -> None:
    """Loss, and the gradient to the query where everything is finite."""
    made = arguments(data.draw, loss_tensors(seed), LOSS_OPTIONS)
    for name in ("weight", "exclude"):
        if data.draw(st.booleans(), label=f"without {name}"):
            made[name] = None
    made["query"] = made["query"].detach().requires_grad_()
    got = dense_info_nce(**made)
    loss = got[0] if made["return_rank"] else got
    loss.sum().backward()
    gradient = made["query"].grad
    assert (loss.dtype == torch.float64) == any(made[x].dtype == torch.float64 for x in ("query", "key", "negatives"))

    made = plain(made)
    if made["weight"] is not None and not made["weight"].to(loss.dtype).isfinite().all():
        assert not loss.isfinite().all(), "weights beyond the dtype of the loss must show"
        return
    made["temperature"], made["index"] = float(made["temperature"]), made.pop("correspondence")
    case = Case(**{name: x for name, x in made.items() if name not in ("return_rank", "backend")})
    with np.errstate(all="ignore"):
        truth = expected(case)
    single = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in made.values())
    tolerance = 2e-5 if single else 1e-9
    finite = truth.margin[np.isfinite(truth.margin)] / case.temperature
    terms = max(1.0, float(np.abs(finite).max(initial=0)))  # a loss is a difference of such, times its weight
    if made["weight"] is not None and made["reduction"] != "mean":
        terms *= max(1.0, float(made["weight"].max()))
    np.testing.assert_allclose(numpy64(loss), truth.loss, rtol=tolerance, atol=terms * tolerance / 10)
    lengths = np.linalg.norm(flat64(made["query"]), axis=1)
    if case.temperature < 1e-9:  # 1 / t swallows the log of a number of ties, and the oracle's probabilities with it
        return
    if not all(made[x].isfinite().all() for x in ("query", "key", "negatives")):
        return  # test_loss_numerics.py says which gradients NaN may reach
    if np.abs(truth.query).max() < 1e38 and np.isfinite(truth.loss).all() and (lengths > 0).all():
        longest = np.linalg.norm(numpy64(made["negatives"]), axis=1).max()
        floor = 1e-2 * max(1.0, longest) / case.temperature / lengths.min()
        assert_close(gradient, truth.query, tolerance, "gradient to query", floor)


MATCH_OPTIONS = {
    "grid_size": [None, 2, (2, 3), [3, 1]],
    "mutual": [False, True],
    "min_score": [None, -1, 0.1, 1.0, np.float32(0.2), Fraction(1, 3)],
    "backend": [*BACKENDS, "auto"],
}


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_fuzz_the_matching(seed: int, data: st.DataObject) -> None:
    """Ties and NaN apart."""
    rng = np.random.default_rng(seed)
    maps = {name: torch.tensor(rng.standard_normal((2, 5, 3, 4))) for name in ("query_features", "key_features")}
    made = arguments(data.draw, maps, MATCH_OPTIONS)
    seen = dense_correspondence(**made)
    maps = plain({name: made[name] for name in maps})
    pooled, grid = [numpy64(x) for x in maps.values()], made["grid_size"]
    if grid is not None:
        pooled = [oracle.adaptive_pool(x, (grid, grid) if isinstance(grid, int) else grid) for x in pooled]
    with np.errstate(all="ignore"):
        truth = oracle.match(*(x.reshape(2, 5, -1) for x in pooled), made["mutual"], made["min_score"])
        far = np.abs(truth.score - (-np.inf if made["min_score"] is None else float(made["min_score"]))) > 1e-5
    tolerance = 1e-5  # scores are float32
    ordinary = np.isfinite(truth.similarity).all((1, 2))
    np.testing.assert_allclose(seen.score.numpy()[ordinary], truth.score[ordinary], atol=tolerance)
    chosen = np.take_along_axis(truth.similarity, seen.index.numpy()[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(chosen[ordinary], truth.score[ordinary], atol=tolerance)
    gaps = [np.diff(np.sort(truth.similarity, axis), axis=axis).take(-1, axis) > tolerance for axis in (2, 1)]
    clear = ordinary & gaps[0].all(1) & gaps[1].all(1)
    np.testing.assert_array_equal(seen.index.numpy()[clear], truth.index[clear])
    clear &= far.all(1)
    np.testing.assert_array_equal(seen.valid.numpy()[clear], truth.valid[clear])
    assert (torch.isnan(seen.score).any(1).numpy() | ordinary).all(), "NaN must show"


TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.uint8]),
)
FIELDS = st.sampled_from(["top", "left", "height", "width", "needs_pad"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | TENSORS,
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(FIELDS, inner, min_size=3),
    max_leaves=12,
)


@settings(max_examples=200)
@given(params=JUNK | TENSORS)
def test_fuzz_crop_parameters(params: Any) -> None:
    """Junk gives an error or, where it has the form of parameters by chance, (B, 4) numbers."""
    readers = boxes_from_torchvision, boxes_from_kornia, partial(boxes_from_matrix, size=8)
    for convert in (*readers, partial(boxes_from_albumentations, image_size=(8, 8))):
        try:
            boxes = convert(params)
        except (TypeError, ValueError) as error:
            assert HOUSE_FORM.match(str(error)), error  # noqa: PT017
        else:
            assert (boxes.dtype, boxes.ndim, boxes.shape[1]) == (torch.float32, 2, 4)
