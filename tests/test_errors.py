"""Every refusal names the argument, what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from densecl_ops import (
    Correspondence,
    DenseCorrespondence,
    DenseInfoNCELoss,
    DenseProjectionHead,
    MomentumQueue,
    _checks,
)
from densecl_ops.functional import (
    dense_correspondence,
    dense_cosine,
    dense_info_nce,
    in_batch_negatives,
    location_correspondence,
)
from densecl_ops.info_nce import function
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share

INTS, LONG = torch.zeros(2, 6, dtype=torch.int32), torch.int64
MAP, TURNED, WHOLE = (torch.ones(2, 4, *grid) for grid in ((2, 3), (3, 2), (4, 4)))
HEAD = DenseProjectionHead(4, 4, 4)
ROWS = torch.nn.functional.normalize(torch.ones(5, 4), dim=1)


def refused(error: type[Exception], argument: str, came: str, call: Callable[[], Any], wish: str = "expected") -> None:
    """`argument: got ... came ..., expected ...`, as a TypeError or ValueError and nothing more exotic."""
    caught = helpers.refused(call)
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"{argument}: got"), message
    assert came in message, message
    assert wish in message, message


INDEX = torch.zeros(2, 6, dtype=LONG)


def loss(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "query": torch.ones(2, 4, 2, 3),
        "key": torch.ones(2, 4, 3, 3),
        "negatives": torch.ones(5, 4),
        "correspondence": torch.zeros(2, 6, dtype=LONG),
    }
    return lambda: dense_info_nce(**(arguments | changes))


def test_the_unchanged_call_is_accepted() -> None:
    assert torch.isfinite(loss()())
    assert matching()().index.shape == (2, 6)
    assert location()().index.shape == (2, 4)


# ---- query, key, negatives ------------------------------------------------------------------------------------------

MAPS = [
    (TypeError, "list", [1.0]),
    (TypeError, "NoneType", None),
    (TypeError, "torch.int64", torch.ones(2, 4, 2, 3, dtype=LONG)),
    (TypeError, "torch.complex64", torch.ones(2, 4, 2, 3, dtype=torch.complex64)),
    (TypeError, "torch.bool", torch.ones(2, 4, 2, 3, dtype=torch.bool)),
    (ValueError, "(4,)", torch.ones(4)),
    (ValueError, "()", torch.ones(())),
    (ValueError, "(2, 4, 1, 2, 3)", torch.ones(2, 4, 1, 2, 3)),
    (ValueError, "(0, 4, 2, 3)", torch.ones(0, 4, 2, 3)),
    (ValueError, "(2, 0, 2, 3)", torch.ones(2, 0, 2, 3)),
    (ValueError, "(2, 4, 0, 3)", torch.ones(2, 4, 0, 3)),
    (ValueError, "(0, 4)", torch.ones(0, 4)),
]


def cases(**tables: list[tuple[type[Exception], str, Any]]) -> pytest.MarkDecorator:
    """Per argument: the error, what came, and the value."""
    rows = [(name, *case) for name, table in tables.items() for case in table]
    return pytest.mark.parametrize(("name", "error", "came", "value"), rows)


@cases(
    query=MAPS,
    key=MAPS,
    negatives=[
        (TypeError, "list", [[1.0] * 4]),
        (TypeError, "NoneType", None),
        (TypeError, "Linear", torch.nn.Linear(4, 5)),
        (TypeError, "torch.int64", torch.ones(5, 4, dtype=LONG)),
        (ValueError, "(5, 3)", torch.ones(5, 3)),
        (ValueError, "(4, 5)", torch.ones(4, 5)),
        (ValueError, "(4,)", torch.ones(4)),
        (ValueError, "(1, 5, 4)", torch.ones(1, 5, 4)),
        (ValueError, "(0, 4)", torch.ones(0, 4)),
        (ValueError, "(9, 3)", MomentumQueue(9, 3)),
        (ValueError, "meta", torch.ones(5, 4, device="meta")),
        (ValueError, "meta", MomentumQueue(5, 4).to("meta")),
        (TypeError, "SimpleNamespace", SimpleNamespace(rows=torch.ones(5, 4))),
        (TypeError, "SimpleNamespace", SimpleNamespace(rows=torch.ones(5, 4), count=5)),
    ],
    exclude=[
        (TypeError, "list", [0, 1]),
        (TypeError, "int", 0),
        (TypeError, "torch.float32", torch.zeros(2)),
        (TypeError, "torch.bool", torch.zeros(2, dtype=torch.bool)),
        (ValueError, "(3,)", torch.zeros(3, dtype=LONG)),
        (ValueError, "(2, 1)", torch.zeros(2, 1, dtype=LONG)),
        (ValueError, "0 to 5", torch.tensor([0, 5])),
        (ValueError, "-1 to 4", torch.tensor([4, -1])),
        (ValueError, "meta", torch.zeros(2, dtype=LONG, device="meta")),
    ],
    weight=[
        (TypeError, "float", 0.5),
        (TypeError, "list", [[1.0] * 6] * 2),
        (TypeError, "torch.int64", torch.ones(2, 6, dtype=LONG)),
        (ValueError, "(2,)", torch.ones(2)),
        (ValueError, "(2, 1)", torch.ones(2, 1)),
        (ValueError, "(2, 2, 3)", torch.ones(2, 2, 3)),
        (ValueError, "meta", torch.ones(2, 6, device="meta")),
    ],
    temperature=[
        (ValueError, "0.0", torch.tensor(0.0)),
        (ValueError, "-1", torch.tensor(-1.0, requires_grad=True)),
        (ValueError, "nan", torch.tensor(float("nan"))),
        (ValueError, "inf", torch.tensor(float("inf"))),
        (ValueError, "(1,)", torch.tensor([0.2])),
        (ValueError, "(2, 6)", torch.full((2, 6), 0.2)),
        (ValueError, "(0,)", torch.ones(0)),
        (TypeError, "torch.int64", torch.tensor(1)),
        (TypeError, "torch.bool", torch.tensor(True)),
        (ValueError, "meta", torch.tensor(0.2, device="meta")),
    ],
)
def test_loss(name: str, error: type[Exception], came: str, value: Any) -> None:
    refused(error, name, came, loss(**{name: value}))


@pytest.mark.parametrize(
    ("query", "key"),
    [((2, 4, 2, 3), (2, 4, 3, 2)), ((2, 4, 2, 3), (2, 4, 2, 2)), ((2, 4, 6), (2, 4, 5)), ((2, 4), (2, 4, 2))],
)
def test_grids_that_differ_need_a_correspondence(query: tuple[int, ...], key: tuple[int, ...]) -> None:
    call = loss(query=torch.ones(query), key=torch.ones(key), correspondence=None)
    refused(ValueError, "key", str(key), call, "expected the same grid")


# ---- correspondence, exclude, weight --------------------------------------------------------------------------------


def triple(**changes: Any) -> Correspondence:
    fields = {
        "index": torch.zeros(2, 6, dtype=LONG),
        "score": torch.ones(2, 6),
        "valid": torch.ones(2, 6, dtype=torch.bool),
    }
    return Correspondence(**(fields | changes))


def index_with(value: int) -> torch.Tensor:
    index = torch.zeros(2, 6, dtype=LONG)
    index[1, 4] = value
    return index


INDICES = [
    (TypeError, "torch.float32", torch.zeros(2, 6)),
    (TypeError, "torch.bool", torch.zeros(2, 6, dtype=torch.bool)),
    (ValueError, "(12,)", torch.zeros(12, dtype=LONG)),
    (ValueError, "(2, 9)", torch.zeros(2, 9, dtype=LONG)),
    (ValueError, "(2, 2, 3)", torch.zeros(2, 2, 3, dtype=LONG)),
    (ValueError, "(1, 6)", torch.zeros(1, 6, dtype=LONG)),
    (ValueError, "meta", torch.zeros(2, 6, dtype=LONG, device="meta")),
    (ValueError, "0 to 9", index_with(9)),
    (ValueError, "-1 to 0", index_with(-1)),
]


@cases(
    index=INDICES,
    valid=[
        (TypeError, "torch.float32", torch.ones(2, 6)),
        (TypeError, "torch.uint8", torch.ones(2, 6, dtype=torch.uint8)),
        (ValueError, "(2, 5)", torch.ones(2, 5, dtype=torch.bool)),
        (ValueError, "(2, 1)", torch.ones(2, 1, dtype=torch.bool)),
        (ValueError, "meta", torch.ones(2, 6, dtype=torch.bool, device="meta")),
    ],
)
def test_correspondence(name: str, error: type[Exception], came: str, value: torch.Tensor) -> None:
    refused(error, f"correspondence.{name}", came, loss(correspondence=triple(**{name: value})))
    if name == "index":
        refused(error, "correspondence", came, loss(correspondence=value))


@pytest.mark.parametrize("value", [[[0] * 6] * 2, "identity", 3, (INTS, INTS, INTS)])
def test_correspondence_type(value: Any) -> None:
    refused(TypeError, "correspondence", type(value).__name__, loss(correspondence=value))


# ---- numbers and names ----------------------------------------------------------------------------------------------

NOT_A_TEMPERATURE = [
    (ValueError, "0.0", 0),
    (ValueError, "-0.2", -0.2),
    (ValueError, "nan", float("nan")),
    (ValueError, "inf", float("inf")),
    (ValueError, "-inf", float("-inf")),
    (TypeError, "True", True),
    (TypeError, "'0.2'", "0.2"),
    (TypeError, "None", None),
    (TypeError, "j", 0.2j),
]


@pytest.mark.parametrize(("error", "came", "value"), NOT_A_TEMPERATURE)
def test_temperature(error: type[Exception], came: str, value: Any) -> None:
    refused(error, "temperature", came, loss(temperature=value))
    refused(error, "temperature", came, lambda: DenseInfoNCELoss(value))
    refused(error, "temperature", came, lambda: DenseInfoNCELoss(value, learnable_temperature=True))


@pytest.mark.parametrize("value", ["average", "", None, 1, "Mean"])
def test_reduction(value: Any) -> None:
    refused(ValueError, "reduction", repr(value), loss(reduction=value), "'mean'")
    refused(ValueError, "reduction", repr(value), lambda: DenseInfoNCELoss(reduction=value), "'none'")


@pytest.mark.parametrize("value", ["cuda", None, 0, "Eager"])
def test_unknown_backend(value: Any) -> None:
    for call in (
        loss(backend=value),
        matching(backend=value),
        lambda: DenseInfoNCELoss(backend=value),
        lambda: DenseCorrespondence(backend=value),
    ):
        refused(ValueError, "backend", repr(value), call, "'blockwise'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing")
def test_triton_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (loss(backend="triton"), matching(backend="triton")):
        with pytest.raises(ValueError, match=r"backend: got 'triton', which cannot serve.*: \w+"):
            call()


# ---- matching -------------------------------------------------------------------------------------------------------


def matching(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {"query_features": torch.ones(2, 4, 2, 3), "key_features": torch.ones(2, 4, 3, 3)}
    return lambda: dense_correspondence(**(arguments | changes))


@pytest.mark.parametrize("grid_size", [None, 2])
@pytest.mark.parametrize("name", ["query_features", "key_features"])
@pytest.mark.parametrize(("error", "came", "value"), MAPS)
def test_features(name: str, error: type[Exception], came: str, value: Any, grid_size: int | None) -> None:
    refused(error, name, came, matching(**{name: value, "grid_size": grid_size}))
    other = torch.ones(2, 4, 3, 3)
    pair = (value, other) if name == "query_features" else (other, value)
    refused(error, name, came, lambda: DenseCorrespondence(grid_size)(*pair))


@pytest.mark.parametrize(
    ("value", "came", "wish"),
    [
        (torch.ones(3, 4, 3, 3), "3 images", "expected 2"),
        (torch.ones(2, 5, 3, 3), "5 channels", "4"),
        (torch.ones(2, 4, 3, 3, device="meta"), "meta", "cpu"),
    ],
)
def test_key_against_query(value: Any, came: str, wish: str) -> None:
    refused(ValueError, "key", came, loss(key=value), wish)
    refused(ValueError, "key_features", came, matching(key_features=value), wish)


NOT_A_GRID = [
    (ValueError, "0", 0),
    (ValueError, "-2", -2),
    (ValueError, "0", (0, 3)),
    (ValueError, "(1, 2, 3)", (1, 2, 3)),
    (ValueError, "()", ()),
    (TypeError, "2.0", 2.0),
    (TypeError, "True", True),
    (TypeError, "'7'", "7"),
    (TypeError, "2.5", (2, 2.5)),
    (TypeError, "None", (None, 2)),
]


@pytest.mark.parametrize(("error", "came", "value"), NOT_A_GRID)
def test_grid_size(error: type[Exception], came: str, value: Any) -> None:
    refused(error, "grid_size", came, matching(grid_size=value))
    refused(error, "grid_size", came, lambda: DenseCorrespondence(value))
    refused(error, "grid_size", came, lambda: DenseProjectionHead(grid_size=value))


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 4)])
def test_only_maps_can_be_pooled(shape: tuple[int, ...]) -> None:
    refused(ValueError, "query_features", str(shape), matching(query_features=torch.ones(shape), grid_size=2), "H, W")
    refused(ValueError, "key_features", str(shape), matching(key_features=torch.ones(shape), grid_size=2), "H, W")
    head = DenseProjectionHead(4, 4, 4, grid_size=2)
    refused(ValueError, "features", str(shape), lambda: head(torch.ones(shape)), "H, W")


@pytest.mark.parametrize(
    ("error", "came", "value"),
    [
        (ValueError, "1.5", 1.5),
        (ValueError, "-2", -2),
        (ValueError, "nan", float("nan")),
        (TypeError, "'0.9'", "0.9"),
        (TypeError, "True", True),
        (TypeError, "tensor", torch.tensor(0.9)),
    ],
)
def test_min_score(error: type[Exception], came: str, value: Any) -> None:
    refused(error, "min_score", came, matching(min_score=value))
    refused(error, "min_score", came, lambda: DenseCorrespondence(min_score=value))


# ---- matching by place ----------------------------------------------------------------------------------------------


def location(**changes: Any) -> Callable[[], Any]:
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])
    arguments: dict[str, Any] = {"query_boxes": boxes, "key_boxes": boxes, "query_grid": 2}
    return lambda: location_correspondence(**(arguments | changes))


BOXES = [
    (TypeError, "list", [[0, 0, 4, 4]]),
    (ValueError, "(4,)", torch.ones(4)),
    (ValueError, "(2, 5)", torch.ones(2, 5)),
    (ValueError, "(0, 4)", torch.ones(0, 4)),
    (ValueError, "(2, 2, 2)", torch.ones(2, 2, 2)),
]
FLIPS = [
    (TypeError, "bool", True),
    (TypeError, "list", [True, False]),
    (TypeError, "torch.int64", torch.ones(2, dtype=LONG)),
    (ValueError, "(3,)", torch.ones(3, dtype=torch.bool)),
    (ValueError, "(2, 1)", torch.ones(2, 1, dtype=torch.bool)),
    (ValueError, "meta", torch.ones(2, dtype=torch.bool, device="meta")),
]


@cases(
    query_boxes=BOXES,
    key_boxes=BOXES,
    query_grid=[*NOT_A_GRID, (TypeError, "None", None)],
    key_grid=NOT_A_GRID,
    query_flip=FLIPS,
    key_flip=FLIPS,
    max_distance=[
        (ValueError, "-0.1", -0.1),
        (ValueError, "nan", float("nan")),
        (TypeError, "'1'", "1"),
        (TypeError, "True", True),
    ],
)
def test_location(name: str, error: type[Exception], came: str, value: Any) -> None:
    refused(error, name, came, location(**{name: value}))


def test_key_boxes_against_query_boxes() -> None:
    refused(ValueError, "key_boxes", "(3, 4)", location(key_boxes=torch.ones(3, 4)), "(2, 4)")
    refused(ValueError, "key_boxes", "meta", location(key_boxes=torch.ones(2, 4, device="meta")), "cpu")


# ---- head and queue -------------------------------------------------------------------------------------------------

NOT_A_SIZE = [
    (ValueError, "0", 0),
    (ValueError, "-1", -1),
    (TypeError, "8.0", 8.0),
    (TypeError, "'8'", "8"),
    (TypeError, "True", True),
]
NONE = (TypeError, "None", None)  # which hidden_channels takes


@cases(
    hidden_channels=NOT_A_SIZE, **{name: [*NOT_A_SIZE, NONE] for name in ("in_channels", "out_channels", "size", "dim")}
)
def test_sizes(name: str, error: type[Exception], came: str, value: Any) -> None:
    module = DenseProjectionHead if "channels" in name else MomentumQueue
    refused(error, name, came, lambda: module(**{name: value}))


def test_head_norm_layer() -> None:
    refused(TypeError, "norm_layer", "'batch'", lambda: DenseProjectionHead(4, 4, 4, norm_layer="batch"))
    refused(TypeError, "norm_layer", "NoneType", lambda: DenseProjectionHead(4, 4, 4, norm_layer=lambda channels: None))


@pytest.mark.parametrize(("error", "came", "value"), MAPS)
def test_head_features(error: type[Exception], came: str, value: Any) -> None:
    head = DenseProjectionHead(4, 4, 4)
    refused(error, "features", came, lambda: head(value))


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 3, 6), (2, 3), (2, 7, 7, 4)])
def test_head_channels(shape: tuple[int, ...]) -> None:
    head = DenseProjectionHead(4, 4, 4)
    refused(ValueError, "features", str(shape), lambda: head(torch.ones(shape)), "4 channels")


@pytest.mark.parametrize("value", ["zeros", None, True])
def test_queue_init(value: Any) -> None:
    refused(ValueError, "init", repr(value), lambda: MomentumQueue(4, 4, init=value), "'empty'")


@pytest.mark.parametrize("value", [torch.int64, torch.bool, torch.complex64, "float32", 32])
def test_queue_dtype(value: Any) -> None:
    refused(TypeError, "dtype", repr(value), lambda: MomentumQueue(4, 4, dtype=value), "float32")


@pytest.mark.parametrize(
    ("error", "came", "value"),
    [
        (TypeError, "list", [[1.0] * 3]),
        (TypeError, "torch.int64", torch.ones(2, 3, dtype=LONG)),
        (ValueError, "(3,)", torch.ones(3)),
        (ValueError, "(2, 4)", torch.ones(2, 4)),
        (ValueError, "(3, 2)", torch.ones(3, 2)),
        (ValueError, "(2, 3, 1, 1)", torch.ones(2, 3, 1, 1)),
        (ValueError, "(0,)", torch.ones(0)),
        (ValueError, "meta", torch.ones(2, 3, device="meta")),
    ],
)
def test_enqueue_keys(error: type[Exception], came: str, value: Any) -> None:
    queue = MomentumQueue(5, 3)
    before = queue.rows.clone()
    refused(error, "keys", came, lambda: queue.enqueue(value))
    assert torch.equal(queue.rows, before)
    assert int(queue.position) == 0


def test_errors_do_not_depend_on_the_backend() -> None:
    for backend in ("eager", "blockwise", "auto"):
        refused(ValueError, "exclude", "0 to 5", loss(exclude=torch.tensor([0, 5]), backend=backend))
        refused(ValueError, "correspondence", "0 to 9", loss(correspondence=index_with(9), backend=backend))


# ---- in-batch negatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "name", "came", "arguments"),
    [
        (TypeError, "keys", "list", {"keys": [[1.0]]}),
        (TypeError, "keys", "dtype torch.int64", {"keys": torch.ones(2, 3).long()}),
        (ValueError, "keys", "shape (2, 3, 4), expected (B, D)", {"keys": torch.ones(2, 3, 4)}),
        (ValueError, "keys", "shape (3,), expected (B, D)", {"keys": torch.ones(3)}),
        (TypeError, "gather_distributed", "1", {"keys": torch.ones(2, 3), "gather_distributed": 1}),
        (TypeError, "process_group", "str", {"keys": torch.ones(2, 3), "process_group": "gloo"}),
    ],
)
def test_in_batch_negatives(error: type[Exception], name: str, came: str, arguments: dict[str, Any]) -> None:
    refused(error, name, came, lambda: in_batch_negatives(**arguments))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("group", [3, "gloo", object()])
def test_process_group(group: object) -> None:
    refused(TypeError, "process_group", type(group).__name__, lambda: MomentumQueue(2, 2, process_group=group))


# ---- metrics --------------------------------------------------------------------------------------------------------

RANK = torch.zeros(2, 3, dtype=LONG)
SCORE, VALID = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "name", "came", "call"),
    [
        (TypeError, "rank", "list, expected a torch.Tensor", lambda: contrastive_accuracy([0])),
        (TypeError, "rank", "dtype torch.float32, expected an integer", lambda: contrastive_accuracy(SCORE)),
        (TypeError, "rank", "dtype torch.bool", lambda: contrastive_accuracy(VALID)),
        (ValueError, "rank", "shape (1, 2, 3), expected (B, P)", lambda: contrastive_accuracy(RANK[None])),
        (ValueError, "rank", "shape (0, 3)", lambda: contrastive_accuracy(RANK[:0])),
        (ValueError, "top_k", "0, expected at least 1", lambda: contrastive_accuracy(RANK, 0)),
        (TypeError, "top_k", "True, expected an int", lambda: contrastive_accuracy(RANK, True)),
        (TypeError, "valid", "dtype torch.float32", lambda: contrastive_accuracy(RANK, valid=SCORE)),
        (ValueError, "valid", "shape (3,), expected (2, 3)", lambda: contrastive_accuracy(RANK, valid=VALID[0])),
        (ValueError, "valid", "a tensor on meta", lambda: contrastive_accuracy(RANK, valid=VALID.to("meta"))),
        (TypeError, "correspondence", "Tensor, expected a Correspondence", lambda: match_score(SCORE)),
        (TypeError, "correspondence.score", "dtype", lambda: match_score(Correspondence(RANK, RANK, VALID))),
        (TypeError, "correspondence.valid", "dtype", lambda: match_score(Correspondence(RANK, SCORE, SCORE))),
        (ValueError, "correspondence.score", "shape", lambda: match_score(Correspondence(RANK, SCORE[0], VALID))),
        (ValueError, "correspondence.valid", "shape", lambda: match_score(Correspondence(RANK, SCORE, VALID[:1]))),
        (ValueError, "backend", "'fast'", lambda: mutual_share(SCORE, SCORE, backend="fast")),
        (ValueError, "query_features", "shape", lambda: mutual_share(SCORE, SCORE, 2)),
    ],
)
def test_metrics(error: type[Exception], name: str, came: str, call: Callable[[], Any]) -> None:
    refused(error, name, came, call)


# ---- everywhere -----------------------------------------------------------------------------------------------------


def test_nothing_but_meta_tensors() -> None:
    """They agree among themselves, and hold no values to compute with."""
    query, key, negatives = (torch.ones(shape, device="meta") for shape in ((2, 4, 6), (2, 4, 9), (5, 4)))
    refused(
        ValueError, "query", "meta", loss(query=query, key=key, negatives=negatives, correspondence=INDEX.to("meta"))
    )
    refused(ValueError, "query_features", "meta", matching(query_features=query, key_features=key))


@pytest.mark.parametrize("value", helpers.FLAGS, ids=repr)
def test_flags_are_bools(value: Any) -> None:
    """`mutual="no"` used to mean yes."""
    refused(TypeError, "mutual", "", lambda: DenseCorrespondence(mutual=value))
    refused(TypeError, "learnable_temperature", "", lambda: DenseInfoNCELoss(learnable_temperature=value))
    refused(TypeError, "return_rank", "", loss(return_rank=value))


def test_duck_queues(backend: str) -> None:
    """A count outside 0 to K was taken as it came: -1 of 5 meant four rows to one backend and none to another."""
    rows, one = torch.ones(5, 4), torch.tensor(1)
    counts = [*map(torch.tensor, (-1, 6, 2**40, [3], 1.5, True)), 3, None]
    counts += [torch.tensor(3, device="meta"), torch.tensor([[1]]), np.array(3)]
    strange = [None, rows.numpy(), rows[0], rows.int(), rows.to_sparse(), rows.to("meta")]
    for pair in [(rows, count) for count in counts] + [(x, one) for x in strange]:
        helpers.refused(loss(negatives=SimpleNamespace(rows=pair[0], count=pair[1]), backend=backend))


# ---- common mistakes: the message says what to do -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: dense_info_nce(MAP, MAP, ROWS, dense_correspondence(WHOLE, WHOLE)), "same grid_size"),
        (
            lambda: dense_info_nce(MAP, MAP, ROWS, dense_correspondence(TURNED, TURNED)),
            "a 3 x 2 grid .* same",
        ),
        (lambda: dense_cosine(MAP, MAP, dense_correspondence(TURNED, TURNED)), "a 3 x 2 grid .* same"),
        (lambda: dense_info_nce(MAP, MAP, ROWS, index_with(-1)), "`valid` leaves out"),
        (lambda: MomentumQueue(8, 4).enqueue(MAP), "`pooled`"),
        (lambda: dense_info_nce(MAP.permute(0, 2, 3, 1), MAP.permute(0, 2, 3, 1), ROWS), r"\.permute\(0, 3, 1, 2\)"),
        (lambda: dense_info_nce(MAP, MAP, ROWS.T), r"\.T$"),
        (lambda: HEAD(WHOLE.permute(0, 2, 3, 1)[:, :3]), r"\.permute\(0, 3, 1, 2\)"),
        (lambda: HEAD(torch.ones(2, 9, 4)), r"\.transpose\(1, 2\)"),
        (lambda: HEAD({"p2": MAP, "p3": MAP}), "pick one of its levels"),
        (lambda: HEAD(SimpleNamespace(last_hidden_state=MAP)), r"\.last_hidden_state\[:, 1:\]\.transpose\(1, 2\)"),
        (lambda: HEAD(MAP.half()), r"torch\.float32, .*torch\.autocast"),
        (lambda: HEAD(MAP.to("meta")), "meta, expected cpu"),
        (lambda: DenseProjectionHead(4, norm_layer=torch.nn.BatchNorm2d(4)), "expected what makes one"),
        (lambda: DenseProjectionHead(4, norm_layer=torch.nn.LayerNorm), "GroupNorm"),
    ],
)
def test_common_mistakes(call: Callable[[], Any], advice: str) -> None:
    assert re.search(advice, str(helpers.refused(call).value))


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: DenseInfoNCELoss(temperature=5.0), "was 1 / t meant"),
        (lambda: dense_info_nce(MAP, MAP.clone().requires_grad_(), MomentumQueue(8, 4)), r"torch\.no_grad\(\)"),
        (lambda: [dense_info_nce(MAP, MAP, queue) for queue in [MomentumQueue(8, 4, init="empty")] * 2], "enqueue"),
    ],
)
def test_likely_mistakes_are_warned_of_once(call: Callable[[], Any], advice: str) -> None:
    for warned in (_checks._warn_of_high, function._warn_of_key_gradient, function._warn_of_empty):
        warned.cache_clear()
    with pytest.warns(UserWarning, match=advice) as seen:
        call(), call()
    assert len(seen) == 1


def test_a_match_carries_its_grids_and_still_unpacks() -> None:
    match = dense_correspondence(TURNED, WHOLE)
    index, _, valid = match
    assert match.grids == ((3, 2), (4, 4))
    assert match._replace(valid=~valid).grids is None
    assert dense_correspondence(TURNED, WHOLE, grid_size=2).grids == ((2, 2), (2, 2))
    assert location_correspondence(torch.ones(2, 4).cumsum(1), torch.ones(2, 4).cumsum(1), (2, 3)).grids == (
        (2, 3),
        (2, 3),
    )
    assert torch.isfinite(dense_info_nce(MAP, MAP, ROWS, (match._replace(index=index * 0))))
