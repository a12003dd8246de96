"""Arguments of every wrong kind, and of every right one.

The rule for every call: a TypeError or ValueError in the house form, or exactly the oracle's number. Nothing between.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import oracle
import torch
from helpers import BACKENDS, FLAGS, assert_close, flat64, numpy64, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseProjectionHead
from densecl_ops.functional import (
    boxes_from_albumentations,
    boxes_from_kornia,
    boxes_from_matrix,
    boxes_from_torchvision,
    dense_correspondence,
    dense_info_nce,
    location_correspondence,
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


# Never acceptable for a tensor argument of (B, ...) with B = 2.
HOSTILE: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "str": str,
    "number": lambda x: 1.0,
    "object": lambda x: object(),
    "complex": lambda x: x.to(torch.complex64),
    "8-bit float": lambda x: x.float().to(torch.float8_e4m3fn),
    "0-d": lambda x: x.flatten()[0],
    "no image": lambda x: x[:0],
    "one image": lambda x: x[:1],
    "three images": lambda x: x[[0, 1, 1]],
    "one dimension more": lambda x: x[None, None, None],
    "last size 0": lambda x: x[..., :0],
    "last size more": lambda x: torch.cat([x, x[..., :1]], -1),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(2, 2)], layout=torch.jagged),
}

NUMBERS = ["0.2", None, True, 0.2j, float("nan"), float("inf"), -float("inf"), 10**400, [0.2], np.array([0.2])]

NAMES = ["", "Mean", None, 3, ["mean"], np.array(["mean", "sum"]), b"mean", torch.tensor(1)]


# Guises that mean something else for one argument: any number of negatives will do, any key grid beside a
# correspondence, and what overlapping memory makes of boxes is no longer a crop of whole cells.
EXEMPT = {
    *(("negatives", "one image"), ("negatives", "three images"), ("key", "last size more")),
    *(("query_features", "last size more"), ("key_features", "last size more")),
    *(("query_boxes", "overlapping memory"), ("key_boxes", "overlapping memory")),
    *(("features", how) for how in ("one image", "three images", "last size more", "meta")),
}


def arguments(
    draw: Any, tensors: dict[str, Tensor], options: dict[str, tuple[list[Any], list[Any]]]
) -> tuple[dict[str, Any], bool]:
    """Arguments of a call, and whether one is hostile. `options` lists sound and hostile values of the others."""
    victim = draw(st.sampled_from(["nobody"] * len(tensors) + [*tensors, *options]), label="victim")
    made: dict[str, Any] = {}
    for name, x in tensors.items():
        guises: dict[str, Callable[[Tensor], Any]] = BENIGN | (VALUES if x.is_floating_point() else {})
        if name == victim:
            guises = HOSTILE
        made[name] = guises[draw(st.sampled_from([how for how in guises if (name, how) not in EXEMPT]), label=name)](x)
    for name, (sound, hostile) in options.items():
        made[name] = draw(st.sampled_from(hostile if name == victim else sound), label=name)
    return made, victim != "nobody"


LOSS_OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": (
        [0.2, 0.01, 1e-18, 1e30, np.float32(0.5), 1, torch.tensor(0.3)],
        [*NUMBERS, 0, -0.2, 1e-19, 1e-320],
    ),
    "reduction": (["mean", "sum", "none"], NAMES),
    "return_rank": ([False, True], FLAGS),
    "backend": ([*BACKENDS, "auto"], NAMES),
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


def pair(grid_size: Any) -> Any:
    """(H, W) of S too."""
    return (grid_size, grid_size) if isinstance(grid_size, int) else grid_size and tuple(grid_size)


def plain(made: dict[str, Any]) -> dict[str, Any]:
    """What numpy can read: without gradient, without lazy negation."""
    return {name: x.detach().resolve_neg() if isinstance(x, Tensor) else x for name, x in made.items()}


@settings(max_examples=600)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_fuzz_the_loss(seed: int, data: st.DataObject) -> None:
    """Loss, and the gradient to the query where everything is finite."""
    made, hostile = arguments(data.draw, loss_tensors(seed), LOSS_OPTIONS)
    if hostile:
        refused(lambda: dense_info_nce(**made))
        return
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
    temperature = float(made["temperature"])
    with np.errstate(all="ignore"):
        truth = oracle.info_nce(
            *(flat64(made[x]) for x in ("query", "key")),
            numpy64(made["negatives"]),
            made["correspondence"].numpy(),
            temperature=temperature,
            reduction=made["reduction"],
            weight=None if made["weight"] is None else numpy64(made["weight"]),
            exclude=None if made["exclude"] is None else made["exclude"].numpy(),
        )
    single = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in made.values())
    tolerance = 2e-5 if single else 1e-9
    finite = truth.margin[np.isfinite(truth.margin)] / temperature
    terms = max(1.0, float(np.abs(finite).max(initial=0)))  # a loss is a difference of such, times its weight
    if made["weight"] is not None and made["reduction"] != "mean":
        terms *= max(1.0, float(made["weight"].max()))
    np.testing.assert_allclose(numpy64(loss), truth.loss, rtol=tolerance, atol=terms * tolerance / 10)
    lengths = np.linalg.norm(flat64(made["query"]), axis=1)
    if temperature < 1e-9:  # 1 / t swallows the log of a number of ties, and the oracle's probabilities with it
        return
    if not all(made[x].isfinite().all() for x in ("query", "key", "negatives")):
        return  # test_loss_numerics.py says which gradients NaN may reach
    if np.abs(truth.query).max() < 1e38 and np.isfinite(truth.loss).all() and (lengths > 0).all():
        longest = np.linalg.norm(numpy64(made["negatives"]), axis=1).max()
        floor = 1e-2 * max(1.0, longest) / temperature / lengths.min()
        assert_close(gradient, truth.query, tolerance, "gradient to query", floor)


MATCH_OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "grid_size": (
        [None, 2, (2, 3), [3, 1]],
        [0, -1, (0, 2), (1, 2, 3), (), "7", 2.0, True, 10**400 * -1, np.array([2, 2])],
    ),
    "mutual": ([False, True], FLAGS),
    "min_score": (
        [None, -1, 0.1, 1.0, np.float32(0.2), Fraction(1, 3)],
        [*(x for x in NUMBERS if x is not None), 1.5, -2],
    ),
    "backend": ([*BACKENDS, "auto"], NAMES),
}


@settings(max_examples=400)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_fuzz_the_matching(seed: int, data: st.DataObject) -> None:
    """Functions and modules refuse the same; what they accept is the oracle's, ties and NaN apart."""
    rng = np.random.default_rng(seed)
    maps = {name: torch.tensor(rng.standard_normal((2, 5, 3, 4))) for name in ("query_features", "key_features")}
    made, hostile = arguments(data.draw, maps, MATCH_OPTIONS)
    options = {name: made[name] for name in MATCH_OPTIONS}
    if hostile:
        refused(lambda: dense_correspondence(**made))
        refused(lambda: DenseCorrespondence(**options)(made["query_features"], made["key_features"]))
        return
    seen = dense_correspondence(**made)
    maps = plain({name: made[name] for name in maps})
    pooled, grid = [numpy64(x) for x in maps.values()], pair(made["grid_size"])
    if grid is not None:
        pooled = [oracle.adaptive_pool(x, grid) for x in pooled]
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


PLACE_OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "query_grid": ([2, (1, 2), [2, 1]], [None, 0, (0, 2), (1, 2, 3), "7", 2.0, True]),
    "key_grid": ([None, 1, (2, 1)], [0, -3, (), (1, 2, 3), "7", 2.5, True]),
    "max_distance": ([None, 0, 0.7, 10**300, Fraction(1, 3)], [*(x for x in NUMBERS if x is not None), -0.1]),
}

BOX_DTYPES = [torch.int64, torch.uint8, torch.float64, torch.float32, torch.float16, torch.bfloat16]
BAD_BOXES: dict[str, Callable[[Tensor], Any]] = {
    "zeros": torch.zeros_like,
    "NaN": VALUES["NaN"],
    "inf": VALUES["inf"],
    "too far apart": lambda x: torch.tensor([[-1e308, 0, 1e308, 1]] * 2, dtype=torch.float64),
    "bool": lambda x: x.bool(),
}


@settings(max_examples=300)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_fuzz_matching_by_place(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 25, (2, 2, 2))
    boxes = np.concatenate([corners, corners + 2 * rng.integers(1, 6, (2, 2, 2))], 2)
    tensors = {"query_boxes": torch.tensor(boxes[0]), "key_boxes": torch.tensor(boxes[1])}
    tensors |= {"query_flip": torch.tensor(rng.random(2) < 0.5), "key_flip": torch.tensor(rng.random(2) < 0.5)}
    made, hostile = arguments(data.draw, tensors, PLACE_OPTIONS)
    name = data.draw(st.sampled_from(["nobody", "nobody", "query_boxes", "key_boxes"]), label="bad box")
    if not hostile and name != "nobody":
        made[name] = BAD_BOXES[data.draw(st.sampled_from(sorted(BAD_BOXES)), label="how")](made[name].double())
    if hostile or name != "nobody":
        refused(lambda: location_correspondence(**made))
        return
    for name in ("query_boxes", "key_boxes"):
        made[name] = made[name].to(data.draw(st.sampled_from(BOX_DTYPES), label="dtype"))
    seen, made = location_correspondence(**made), plain(made)
    grids = pair(made["query_grid"]), pair(made["key_grid"] or made["query_grid"])
    boxes = tuple(made[x].long().numpy() for x in ("query_boxes", "key_boxes"))  # type: ignore[assignment]
    flips = made["query_flip"].numpy(), made["key_flip"].numpy()
    distance = made["max_distance"]
    truth = oracle.location_match(boxes, grids, flips, distance)  # type: ignore[arg-type]
    np.testing.assert_allclose(seen.score.numpy(), truth.score, atol=1e-5)
    chosen = np.take_along_axis(truth.similarity, seen.index.numpy()[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(chosen, truth.score, atol=1e-9)
    clear = np.ones(chosen.shape, bool) if distance is None else np.abs(truth.score + distance) > 1e-9
    np.testing.assert_array_equal(seen.valid.numpy()[clear], truth.valid[clear])


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.tuples(st.text(max_size=3), st.dictionaries(st.sampled_from(["src", "dst", "batch_prob"]), inner))
        | st.dictionaries(st.sampled_from(["src", "dst", "batch_prob", "forward_input_shape"]), inner, max_size=4)
    ),
    max_leaves=12,
)

TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.uint8]),
)

FIELDS = st.fixed_dictionaries(
    {"batch_prob": TENSORS, "forward_input_shape": TENSORS | st.just(torch.tensor([2, 3, 8, 8]))},
    optional={"src": TENSORS, "dst": TENSORS, "padding_size": TENSORS},
)


@settings(max_examples=400)
@given(params=JUNK | TENSORS | FIELDS | st.lists(st.tuples(st.text(max_size=3), FIELDS), max_size=3))
def test_fuzz_crop_parameters(params: Any) -> None:
    """Junk gives an error or, where it has the form of parameters by chance, (B, 4) numbers."""
    readers = boxes_from_torchvision, boxes_from_kornia, partial(boxes_from_matrix, size=8)
    for convert in (*readers, partial(boxes_from_albumentations, image_size=(8, 8))):
        try:
            boxes = convert(params)
        except (TypeError, ValueError) as error:
            assert str(error).startswith(("params", "augmentation", "matrix", "replay")), error  # noqa: PT017
            assert "expected" in str(error), error  # noqa: PT017
        else:
            assert boxes.dtype == torch.float32
            assert boxes.ndim == 2
            assert boxes.shape[1] == 4


HEAD_OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "hidden_channels": ([3, None], [0, -1, 2.0, "8", True, [3]]),
    "out_channels": ([3, 5], [0, -1, 2.0, "8", None, True, [3]]),
    "grid_size": MATCH_OPTIONS["grid_size"],
    "norm_layer": ([None], ["batch", 3, True]),
}


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_fuzz_the_head(seed: int, data: st.DataObject) -> None:
    features = {"features": torch.tensor(np.random.default_rng(seed).standard_normal((2, 5, 3, 4)))}
    made, hostile = arguments(data.draw, features, HEAD_OPTIONS)
    x = made.pop("features")
    if hostile:
        refused(lambda: DenseProjectionHead(5, **made)(x))
        return
    head = DenseProjectionHead(5, **made).to(x.dtype)
    seen = head(x)
    params = {name: numpy64(p) for name, p in head.named_parameters()}
    with np.errstate(all="ignore"):
        truth = oracle.head(params, numpy64(x.detach().resolve_neg()), pair(made["grid_size"]))
    for actual, wish in ((seen.image, truth.image), (seen.dense.flatten(2), truth.dense), (seen.pooled, truth.pooled)):
        rows = np.isfinite(wish).reshape(len(wish), -1).all(1)
        assert_close(actual[torch.tensor(rows)], wish[rows], 1e-5 if x.dtype == torch.float32 else 1e-9)
