"""Use that nobody would call fair: thousands of random operations, arguments of every wrong kind, threads, copies.

The rule for every call: a TypeError or ValueError in the house form, or exactly the oracle's number. Nothing between.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import pickle
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import BACKENDS, assert_close, flat64, numpy64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densecl_ops import Correspondence, DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import (
    boxes_from_kornia,
    boxes_from_torchvision,
    dense_correspondence,
    dense_info_nce,
    location_correspondence,
)

# ---- soak: a queue against a deque ----------------------------------------------------------------------------------

EPS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(EPS)


class Model:
    """Unit rows, oldest first, each with the error that its dtypes allow it."""

    def __init__(self, queue: MomentumQueue) -> None:
        count = int(queue.count)
        self.size, self.dtype, self.written = queue.size, queue.rows.dtype, 0
        self.rows = deque(zip(numpy64(queue.rows[:count]), [0.0] * count, strict=True), maxlen=queue.size)

    def enqueue(self, keys: Tensor) -> None:
        eps = max(EPS[self.dtype], 1e-6 if keys.dtype != torch.float64 else 0)
        units = oracle.unit(numpy64(keys), 1)[0]
        self.rows.extend((row, eps) for row in units)
        self.written += len(keys)

    def to(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows = deque([(row, eps + EPS[dtype]) for row, eps in self.rows], maxlen=self.size)

    def check(self, queue: MomentumQueue) -> None:
        count, position = len(self.rows), self.written % self.size
        assert (int(queue.count), int(queue.position), queue.rows.dtype) == (count, position, self.dtype)
        rows = np.array([row for row, _ in self.rows]).reshape(count, queue.dim)
        eps = np.array([eps for _, eps in self.rows])
        turn = position if count == self.size else 0  # a full ring holds its oldest row at the position
        off = np.abs(numpy64(queue.rows[:count]) - np.roll(rows, turn, 0)).max(1, initial=0)
        assert (off <= np.roll(eps, turn)).all()


def fresh(queue: MomentumQueue, init: str) -> MomentumQueue:
    return MomentumQueue(queue.size, queue.dim, init=init, dtype=queue.rows.dtype)


def saved_and_loaded(queue: MomentumQueue, rng: np.random.Generator) -> MomentumQueue:
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other = fresh(queue, str(rng.choice(["random", "empty"])))
    other.load_state_dict(torch.load(file, weights_only=True), assign=bool(rng.integers(2)))
    return other


def random_keys(rng: np.random.Generator, n: int, dim: int) -> Tensor:
    """Any dtype, any strides, with or without gradient, now and then with a zero row or repeated rows."""
    keys = torch.tensor(rng.standard_normal((n, dim)) * 3, dtype=DTYPES[rng.integers(len(DTYPES))])
    if n and rng.random() < 0.1:
        keys[rng.integers(n)] = 0
    layout = rng.integers(6)
    if layout == 1:
        keys = keys.t().contiguous().t()
    elif layout == 2:
        keys = torch.cat([keys, keys.flip(0)], 1)[:, :dim]
    elif layout == 3:
        keys = keys.repeat_interleave(2, 0)[::2]
    elif layout == 4 and n:
        keys = keys[:1].expand(n, -1)
    elif layout == 5:
        keys = nn.Parameter(keys) * 1
    return keys


def soak(seed: int, init: str, operations: int) -> None:
    rng = np.random.default_rng(seed)
    size, dim = (int(x) for x in rng.integers(1, (12, 6)))
    queue = MomentumQueue(size, dim, init=init)
    model = Model(queue)
    for step in range(operations):
        name = str(
            rng.choice(["enqueue"] * 10 + ["own rows", "refused", "save", "copy", "pickle", "to", "half", "clear"])
        )
        try:
            if name == "enqueue":
                keys = random_keys(rng, int(rng.integers(0, 3 * size + 1)), dim)
                queue.enqueue(keys)
                model.enqueue(keys.detach())
            elif name == "own rows":
                keys = queue.rows[int(rng.integers(size)) :]
                model.enqueue(keys.clone())
                queue.enqueue(keys)
            elif name == "refused":
                with pytest.raises((TypeError, ValueError), match=r"^keys: got"):
                    queue.enqueue([torch.ones(2, dim + 1), torch.ones(dim), torch.ones(2, dim).int()][rng.integers(3)])
            elif name == "save":
                queue = saved_and_loaded(queue, rng)
            elif name == "copy":
                queue = copy.deepcopy(queue)
            elif name == "pickle":
                queue = pickle.loads(pickle.dumps(queue))
            elif name == "to":
                dtype = DTYPES[rng.integers(len(DTYPES))]
                queue.to(dtype)
                model.to(dtype)
            elif name == "half":
                queue.half().float()
                model.to(torch.float16)
                model.to(torch.float32)
            elif name == "clear":  # there is no method for it: the state of a new queue does it
                empty = fresh(queue, str(rng.choice(["random", "empty"])))
                queue.load_state_dict(empty.state_dict())
                model = Model(empty)
            model.check(queue)
        except AssertionError as failure:
            raise AssertionError(f"seed {seed}, init {init}, size {size}, step {step}: {name}") from failure


@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("seed", range(5))
def test_soak_of_the_queue(seed: int, init: str) -> None:
    """2 x 5 x 1,000 operations; a failure names seed and step."""
    soak(seed, init, 1000)


# ---- fuzz: an error in the house form, or the oracle's number -------------------------------------------------------

HOUSE = re.compile(r"^[a-z_.]+(\[.*\])?(: [a-z_]+)?: got .+, expected |^key: got .* beside ", re.DOTALL)

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
FLAGS = ["no", "", 0, 1, None, np.True_, torch.tensor(True), [True]]
NUMBERS = ["0.2", None, True, 0.2j, float("nan"), float("inf"), -float("inf"), 10**400, [0.2], np.array([0.2])]
NAMES = ["", "Mean", None, 3, ["mean"], np.array(["mean", "sum"]), b"mean", torch.tensor(1)]


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert HOUSE.match(str(caught.value)), str(caught.value)


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
    finite = truth.negative[np.isfinite(truth.negative)]
    terms = max(1.0, float(np.abs(finite).max(initial=0)))  # a loss is a difference of such, times its weight
    if made["weight"] is not None and made["reduction"] != "mean":
        terms *= max(1.0, float(made["weight"].max()))
    np.testing.assert_allclose(numpy64(loss), truth.loss, rtol=tolerance, atol=terms * tolerance / 10)
    lengths = np.linalg.norm(flat64(made["query"]), axis=1)
    if temperature < 1e-9:  # 1 / t swallows the log of a number of ties, and the oracle's probabilities with it
        return
    if not all(made[x].isfinite().all() for x in ("query", "key", "negatives")):
        return  # test_loss_adversarial.py says which gradients NaN may reach
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
    if made["grid_size"] is not None:
        grid = (2, 2) if made["grid_size"] == 2 else tuple(made["grid_size"])
        pooled = [torch.tensor(oracle.adaptive_pool(numpy64(x), grid)) for x in maps.values()]
    else:
        pooled = list(maps.values())
    with np.errstate(all="ignore"):
        truth = oracle.match(*map(flat64, pooled), made["mutual"], made["min_score"])
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
    "query_grid": ([2, (1, 2), [2, 1]], [None, 0, (0, 2), (1, 2, 3), "7", 2.0, True, np.int64(2)]),
    "key_grid": ([None, 1, (2, 1)], [0, -3, (), (1, 2, 3), "7", 2.5, True]),
    "max_distance": ([None, 0, 0.7, 10**300, Fraction(1, 3)], [*(x for x in NUMBERS if x is not None), -0.1]),
}
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
        made[name] = made[name].to(data.draw(st.sampled_from([torch.int64, torch.uint8, *DTYPES]), label="dtype"))
    seen, made = location_correspondence(**made), plain(made)
    wanted = made["query_grid"], made["key_grid"] or made["query_grid"]
    grids = tuple((g, g) if isinstance(g, int) else tuple(g) for g in wanted)
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
    for convert in (boxes_from_torchvision, boxes_from_kornia):
        try:
            boxes = convert(params)
        except (TypeError, ValueError) as error:
            assert str(error).startswith(("params", "augmentation")), error  # noqa: PT017
            assert "expected" in str(error), error  # noqa: PT017
        else:
            assert boxes.dtype == torch.float32
            assert boxes.ndim == 2
            assert boxes.shape[1] == 4


HEAD_OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    **{name: ([3, 5], [0, -1, 2.0, "8", None, True, [3]]) for name in ("hidden_channels", "out_channels")},
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
    grid = {2: (2, 2)}.get(made["grid_size"]) if isinstance(made["grid_size"], int) else made["grid_size"]
    params = {name: numpy64(p) for name, p in head.named_parameters()}
    with np.errstate(all="ignore"):
        truth = oracle.head(params, numpy64(x.detach().resolve_neg()), None if grid is None else tuple(grid))
    for actual, wish in ((seen.image, truth.image), (seen.dense.flatten(2), truth.dense), (seen.pooled, truth.pooled)):
        rows = np.isfinite(wish).reshape(len(wish), -1).all(1)
        assert_close(actual[torch.tensor(rows)], wish[rows], 1e-5 if x.dtype == torch.float32 else 1e-9)


def test_nothing_but_meta_tensors() -> None:
    """They agree among themselves, and hold no values to compute with."""
    tensors = {name: x.to("meta") for name, x in loss_tensors(0).items()}
    refused(lambda: dense_info_nce(**tensors))  # type: ignore[call-overload]
    refused(lambda: dense_correspondence(tensors["query"], tensors["key"]))


@pytest.mark.parametrize("value", FLAGS, ids=repr)
def test_flags_are_bools(value: Any) -> None:
    """`mutual="no"` used to mean yes."""
    refused(lambda: DenseCorrespondence(mutual=value))
    refused(lambda: DenseInfoNCELoss(learnable_temperature=value))
    x = torch.randn(2, 4)
    refused(lambda: DenseInfoNCELoss()(x, x, x, return_rank=value))


class DuckQueue:
    """Rows and a count, as the protocol asks, and nothing of a MomentumQueue."""

    def __init__(self, rows: Any, count: Any) -> None:
        self.rows, self.count = rows, count


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_duck_queues(backend: str, dtype: torch.dtype) -> None:
    """A count outside 0 to K was taken as it came: -1 of 4 meant three rows to one backend and none to another."""
    tensors = loss_tensors(1)
    query, key, index = tensors["query"], tensors["key"], tensors["correspondence"]
    rows = torch.tensor(oracle.unit(np.random.default_rng(1).standard_normal((4, 4)), 1)[0])

    def loss(rows: Any, count: Any) -> Tensor:
        return dense_info_nce(query, key, DuckQueue(rows, count), index, backend=backend)

    for count in range(5):
        truth = oracle.info_nce(flat64(query), flat64(key), rows.numpy(), index.numpy(), count=count)
        assert_close(loss(rows, torch.tensor(count, dtype=dtype)), truth.loss, 1e-9)
    for count in (-1, 5, 2**40, [3], 1.5, True):
        refused(lambda count=count: loss(rows, torch.tensor(count)))  # type: ignore[misc]
    for strange in (3, None, torch.tensor(3, device="meta"), torch.tensor([[1]]), np.array(3)):
        refused(lambda strange=strange: loss(rows, strange))  # type: ignore[misc]
    for strange in (None, rows.numpy(), rows[0], rows.int(), rows.to_sparse(), rows.to("meta")):
        refused(lambda strange=strange: loss(strange, torch.tensor(1)))  # type: ignore[misc]


def test_inference_mode_keys(fused: str) -> None:
    """inference_mode instead of no_grad around the key encoder: torch saves no such tensor, and none has to be."""
    tensors = {
        name: x for name, x in loss_tensors(0).items() if name in ("query", "key", "negatives", "correspondence")
    }
    with torch.inference_mode():
        key = tensors["key"] * 1
    query = tensors["query"].requires_grad_()
    dense_info_nce(query, key, tensors["negatives"], tensors["correspondence"], backend=fused).backward()
    truth = oracle.info_nce(flat64(query), flat64(key), *map(torch.Tensor.numpy, list(tensors.values())[2:]))
    assert_close(query.grad, truth.query, 1e-9)


# ---- memory ---------------------------------------------------------------------------------------------------------

STATM = Path("/proc/self/statm")


def resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
def test_memory_does_not_grow_over_ten_thousand_steps() -> None:
    """Backend, gradients, rank and reduction differ from step to step. One leaked loss row a step would be 8 MiB."""
    shape, size = (2, 8, 10, 10), 64
    queue, matches = MomentumQueue(size, 8), [DenseCorrespondence(backend=b, mutual=b == "eager") for b in BACKENDS]
    criteria = [DenseInfoNCELoss(0.2, r, r == "sum", backend=b) for b in BACKENDS for r in ("mean", "sum")]
    maps = torch.randn(4, *shape)

    def steps(count: int) -> None:
        for step in range(count):
            query = maps[0].clone().requires_grad_()
            key = maps[1].clone().requires_grad_(step % 5 == 0)
            match = matches[step % 2](maps[2], maps[3])
            loss = criteria[step % 4](query, key, queue, match, return_rank=step % 3 == 0)
            (loss[0] if isinstance(loss, tuple) else loss).backward()
            queue.enqueue(key.mean((2, 3)))

    steps(500)
    tensors, before = live_tensors(), resident()
    steps(10_000)
    assert live_tensors() <= tensors  # what earlier tests left may go meanwhile
    assert resident() - before < 4 * 2**20


# ---- threads --------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """Head, rule, loss and queue as one model, with a learned temperature."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.head = DenseProjectionHead(6, 8, 5)
        self.match = DenseCorrespondence(mutual=True, backend=backend)
        self.criterion = DenseInfoNCELoss(0.2, "sum", learnable_temperature=True, backend=backend)
        self.frozen = DenseInfoNCELoss(0.1, "sum", backend=backend)
        self.queue = MomentumQueue(40, 5)

    def forward(self, features_q: Tensor, features_k: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the keys to enqueue."""
        query, key = self.head(features_q), self.head(features_k)
        dense = self.criterion(query.dense, key.dense, self.queue, self.match(features_q, features_k))
        return dense + self.frozen(query.image, key.image, self.queue), key.pooled.detach()


def views(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(2, batch, 6, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def replicate(module: nn.Module) -> nn.Module:
    """What nn.DataParallel does on GPUs: shallow copies that hold (copies of) the one set of parameters."""
    replica: nn.Module = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
        if child is not None and not isinstance(replica, nn.Sequential):
            setattr(replica, name, replica._modules[name])
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1)  # the broadcast, through which gradients return
    return replica


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_data_parallel_replicas(backend: str) -> None:
    """Eight threads, forward and backward each, ten times over: the gradients of one thread on the whole batch."""
    torch.manual_seed(0)
    model, maps = Step(backend).double(), views(16)
    loss, keys = model(*maps)
    loss.backward()
    expected = gradients(model)
    assert len(expected) == 9

    def one(replica: nn.Module, part: Tensor) -> tuple[Tensor, Tensor]:
        loss, keys = replica(*part)
        loss.backward()
        return loss.detach(), keys

    rows = model.queue.rows.clone()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            model.zero_grad()
            results = list(pool.map(one, [replicate(model) for _ in range(8)], maps.chunk(8, 1)))
            assert_close(sum(loss for loss, _ in results), loss, 1e-12)
            assert_close(torch.cat([k for _, k in results]), keys, 1e-12)
            for name, grad in gradients(model).items():
                assert_close(grad, expected[name], 1e-11, name)
    assert torch.equal(model.queue.rows, rows)


RACE = """
import sys, threading
import torch
from densecl_ops.functional import dense_correspondence, dense_info_nce, location_correspondence

boxes = torch.tensor([[0.0, 0, 9, 9], [1, 2, 8, 8]])

def work(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 8, 4, 4, generator=generator)
    negatives = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    q = query.clone().requires_grad_()
    match = dense_correspondence(query, key, mutual=True, backend=backend)
    place = location_correspondence(boxes, boxes.flip(0), 4)
    loss = dense_info_nce(q, key, negatives, match._replace(valid=match.valid & place.valid), backend=backend)
    loss.backward()
    return loss.detach(), q.grad

def racer(i, backend):
    barrier.wait()
    try:
        for _ in range(rounds):
            results[i] = work(backend, i)
    except BaseException as error:
        results[i] = error

backends = sys.argv[1].split(",")
rounds = int(sys.argv[2])
barrier, results = threading.Barrier(len(backends)), [None] * len(backends)
threads = [threading.Thread(target=racer, args=pair) for pair in enumerate(backends)]
for thread in threads: thread.start()
for thread in threads: thread.join(100)
for i, result in enumerate(results):
    assert isinstance(result, tuple), (backends[i], result)
    for seen, wish in zip(result, work("eager", i)):
        assert torch.dist(seen, wish) <= 1e-5 * wish.norm(), backends[i]
print("alike")
"""


def run_race(backends: str, rounds: int, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE, backends, str(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout == "alike\n", done.stderr


def test_first_calls_race() -> None:
    """In a new process thirteen threads make their first call at once, and go on, each with its own backend.

    One of them, where there is Triton, in its interpreter, which keeps global state and would not bear a second.
    """
    triton = ["triton"] if find_spec("triton") else []
    run_race(",".join(triton + ["eager", "blockwise", "auto"] * 4), 10, TRITON_INTERPRET="1")


# ---- copies in the middle of training -------------------------------------------------------------------------------

SEEN: list[str] = []


def record(module: nn.Module, arguments: object, output: object) -> None:
    """A forward hook; at module level, so that pickle finds it."""
    SEEN.append(type(module).__name__)


def train(model: Step, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss, keys = model(*views(3, seed))
        loss.backward()
        optimizer.step()
        model.queue.enqueue(keys)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def through_file(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("duplicate", list(DUPLICATES.values()), ids=list(DUPLICATES))
def test_copies_in_mid_training(duplicate: Callable[[Any], Any], backend: str) -> None:
    """Between backward and step, gradients and hooks in place. Both go on alike, and neither feels the other."""
    torch.manual_seed(0)
    model = Step(backend).double()
    for module in (model.head, model.match, model.criterion):
        module.register_forward_hook(record)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, range(3))
    model(*views(3, 3))[0].backward()  # on top of the gradients of the last step

    twin, its_optimizer = duplicate((model, optimizer))
    assert same(state(model), state(twin))
    assert not gradients(twin)  # torch copies no gradients: a copy starts at none
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.data_ptr() != q.data_ptr()

    before = state(model)
    SEEN.clear()
    train(twin, its_optimizer, range(10, 14))
    assert SEEN == ["DenseProjectionHead", "DenseProjectionHead", "DenseCorrespondence", "DenseInfoNCELoss"] * 4
    assert same(before, state(model))
    train(model, optimizer, range(10, 14))
    assert same(state(model), state(twin))
    assert not same(before, state(model))
    train(twin, its_optimizer, range(20, 21))
    assert not same(state(model), state(twin))


# ---- worker processes -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_matching_by_place_in_data_loader_workers(context: str) -> None:
    """The Correspondence comes back from the worker as it would have been made here."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [2, 1, 9, 9]])
    samples = [boxes + torch.tensor([x, 0, x, 0]) for x in range(5)]
    rule = functools.partial(location_correspondence, key_boxes=boxes, query_grid=3)
    loader = torch.utils.data.DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=rule,
        num_workers=1,
        multiprocessing_context=context,
    )
    for seen, sample in zip(loader, samples, strict=True):
        assert isinstance(seen, Correspondence)
        assert all(map(torch.equal, seen, rule(sample)))
