"""Every refusal names the argument, what came and what was expected.

One row for each mistake, and for each function or module that can be given it; test_fuzz.py brings every other guise.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import BACKENDS

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

LONG, META = torch.int64, torch.device("meta")
MAP, TURNED, WHOLE = (torch.ones(2, 4, *grid) for grid in ((2, 3), (3, 2), (4, 4)))
HEAD = DenseProjectionHead(4, 4, 4)
ROWS = torch.nn.functional.normalize(torch.ones(5, 4), dim=1)
INDEX, SCORE, VALID = torch.zeros(2, 6, dtype=LONG), torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool)
FLIP = torch.ones(2, dtype=torch.bool)
BOXES = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])


def loss(**changes: Any) -> Any:
    arguments = {"query": MAP, "key": torch.ones(2, 4, 3, 3), "negatives": ROWS, "correspondence": INDEX}
    return dense_info_nce(**(arguments | changes))


def triple(**changes: Any) -> Correspondence:
    return Correspondence(**({"index": INDEX, "score": SCORE, "valid": VALID} | changes))


def loss_of_match(**changes: Any) -> Any:
    return loss(correspondence=triple(**changes))


def score_of_match(**changes: Any) -> Any:
    return match_score(triple(**changes))


def matching(**changes: Any) -> Any:
    return dense_correspondence(**({"query_features": MAP, "key_features": torch.ones(2, 4, 3, 3)} | changes))


def location(**changes: Any) -> Any:
    return location_correspondence(**({"query_boxes": BOXES, "key_boxes": BOXES, "query_grid": 2} | changes))


def enqueue(keys: Any) -> None:
    """Writes nothing when it raises."""
    queue = MomentumQueue(5, 3)
    before = copy.deepcopy(queue.state_dict())
    try:
        queue.enqueue(keys)
    finally:
        assert all(torch.equal(x, before[name]) for name, x in queue.state_dict().items())


def index_with(value: int) -> torch.Tensor:
    index = INDEX.clone()
    index[1, 4] = value
    return index


def test_the_unchanged_calls_are_accepted() -> None:
    assert torch.isfinite(loss())
    assert torch.isfinite(loss_of_match())
    assert matching().index.shape == (2, 6)
    assert location().index.shape == (2, 4)
    assert score_of_match() == 1
    enqueue(torch.ones(0, 3))


T, V = TypeError, ValueError
EACH = [partial(loss, backend=backend) for backend in BACKENDS]  # errors do not depend on the backend
LEARNED = partial(DenseInfoNCELoss, learnable_temperature=True)
POOLED, POOLED_HEAD = partial(matching, grid_size=2), DenseProjectionHead(4, 4, 4, grid_size=2)
SHARE = partial(mutual_share, query_features=MAP, key_features=MAP, grid_size=2)
IN_BATCH = partial(in_batch_negatives, torch.ones(2, 3))
ACCURACY = partial(contrastive_accuracy, INDEX)

MAPS = [
    (T, "list, expected a torch.Tensor", [1.0]),
    (T, "torch.int64, expected float16, bfloat16, float32 or float64", MAP.long()),
    (V, "shape (4,), expected (B, C, H, W), (B, C, P) or (B, C)", torch.ones(4)),
    (V, "an empty tensor of shape (2, 4, 0, 3), expected every size above 0", torch.ones(2, 4, 0, 3)),
]
PARTNERS = [
    (V, "3 images of 4 channels, expected 2", torch.ones(3, 4, 3, 3)),
    (V, "2 images of 5 channels, expected 2 of 4", torch.ones(2, 5, 3, 3)),
    (V, "meta, expected cpu", MAP.to(META)),
]
NO_MAPS = [(V, f"shape {shape}, expected a (B, C, H, W) map", torch.ones(shape)) for shape in ((2, 4, 6), (2, 4))]
NEGATIVES = [
    (T, "Linear", torch.nn.Linear(4, 5)),
    (T, "torch.int64", ROWS.long()),
    (V, "shape (4,), expected (K, 4) with K at least 1", torch.ones(4)),
    (V, "(0, 4)", torch.ones(0, 4)),
    (V, "(9, 3)", MomentumQueue(9, 3)),
    (V, "meta", MomentumQueue(5, 4).to(META)),
    (T, "SimpleNamespace, expected a (K, D) tensor or a MomentumQueue", SimpleNamespace(rows=ROWS, count=5)),
]
INDICES = [
    (T, "torch.float32, expected an integer dtype", torch.zeros(2, 6)),
    (V, "shape (2, 9), expected (2, 6)", torch.zeros(2, 9, dtype=LONG)),
    (V, "meta", INDEX.to(META)),
    (V, "values from 0 to 9, expected them within 0 to 8", index_with(9)),
    (V, "-1 to 0", index_with(-1)),
]
MASKS = [
    (T, "torch.float32, expected torch.bool", SCORE),
    (V, "shape (2, 5), expected (2, 6)", VALID[:, :5]),
    (V, "meta", VALID.to(META)),
]
EXCLUDES = [
    (T, "torch.float32", torch.zeros(2)),
    (V, "shape (3,), expected (2,)", torch.zeros(3, dtype=LONG)),
    (V, "values from 0 to 5, expected them within 0 to 4", torch.tensor([0, 5])),
    (V, "meta", torch.zeros(2, dtype=LONG, device=META)),
]
WEIGHTS = [(T, "torch.int64", INDEX), (V, "(2, 1), expected (2, 6)", torch.ones(2, 1)), (V, "meta", SCORE.to(META))]
NUMBERS = [
    (V, "nan, expected a finite number", float("nan")),
    (V, "a number too large", 10**400),
    (T, "'0.2', expected a number", "0.2"),
    (T, "True", True),
]
TEMPERATURES = [*NUMBERS, (V, "0.0, expected a number above 0", 0), (V, "1e-19, expected at least 1e-18", 1e-19)]
SCALARS = [
    (V, "-1.0, expected a number above 0", torch.tensor(-1.0, requires_grad=True)),
    (V, "shape (1,), expected a number or a 0-d tensor", torch.tensor([0.2])),
    (T, "torch.int64", torch.tensor(1)),
    (V, "meta", torch.tensor(0.2, device=META)),
]
COSINES = [*NUMBERS, (V, "1.5, expected a cosine similarity within -1 to 1", 1.5), (T, "tensor", torch.tensor(0.9))]
FLAGS = [(T, "'no', expected a bool", "no"), (T, "0, expected a bool", 0)]  # `mutual="no"` used to mean yes
SIZES = [(V, "0, expected at least 1", 0), (T, "8.0, expected an int", 8.0), (T, "True", True)]
GRIDS = [
    (V, "0, expected at least 1", (0, 3)),
    (V, "(1, 2, 3), expected an int or a pair (height, width)", (1, 2, 3)),
    (T, "'7', expected an int", "7"),
    (T, "None, expected an int", (None, 2)),
]
PAIRS = [(T, "list", [[0, 0, 4, 4]]), (V, "shape (4,), expected (B, 4) with B at least 1", torch.ones(4))]
PAIRED = [(V, "(3, 4), expected (2, 4)", BOXES[[0, 0, 1]]), (V, "meta", BOXES.to(META))]
FLIPS = [(T, "torch.int64, expected torch.bool", FLIP.long()), (V, "(1,), expected (2,)", FLIP[:1])]
NORMS = [
    (T, "'batch', expected a callable such as torch.nn.BatchNorm2d", "batch"),
    (T, "a callable that returns NoneType, expected a torch.nn.Module", lambda channels: None),
]
KEYS = [
    (T, "torch.int64", torch.ones(2, 3, dtype=LONG)),
    (V, "shape (3,), expected (n, 3)", torch.ones(3)),
    (V, "meta", torch.ones(2, 3, device=META)),
]
RANKS = [
    (T, "torch.float32, expected an integer", SCORE),
    (V, "shape (1, 2, 6), expected (B, P)", INDEX[None]),
    (V, "shape (0, 6)", INDEX[:0]),
]

Mistake = tuple[type[Exception], str, Any]  # the error, some of its words, the value
MISTAKES: list[tuple[str, list[Callable[..., Any]], list[Mistake]]] = [
    ("query", [loss], MAPS),
    ("key", [loss], MAPS + PARTNERS),
    ("query_features", [matching, POOLED], MAPS),
    ("key_features", [matching, POOLED], MAPS + PARTNERS),
    ("query_features", [POOLED, SHARE], NO_MAPS),
    ("key_features", [POOLED], NO_MAPS),
    ("features", [POOLED_HEAD], NO_MAPS),
    ("features", [HEAD], [*MAPS, (V, "(2, 3, 6), expected 4 channels", torch.ones(2, 3, 6))]),
    ("negatives", [loss], NEGATIVES),
    ("exclude", EACH, EXCLUDES),
    ("weight", [loss], WEIGHTS),
    ("temperature", [loss, DenseInfoNCELoss, LEARNED], TEMPERATURES),
    ("temperature", [loss], SCALARS),
    ("correspondence.index", [loss_of_match], INDICES),
    ("correspondence.valid", [loss_of_match], MASKS),
    ("correspondence", EACH, INDICES),
    ("correspondence", [loss], [(T, "list", INDEX.tolist()), (T, "str", "identity"), (T, "tuple", (INDEX,) * 3)]),
    ("reduction", [loss, DenseInfoNCELoss], [(V, "'average', expected one of 'mean', 'sum', 'none'", "average")]),
    ("backend", [loss, matching, SHARE], [(V, "'cuda', expected one of 'auto', 'eager', 'blockwise'", "cuda")]),
    ("backend", [DenseInfoNCELoss, DenseCorrespondence], [(V, "None, expected one of 'auto', 'eager'", None)]),
    ("return_rank", [loss], FLAGS),
    ("learnable_temperature", [DenseInfoNCELoss], FLAGS),
    ("mutual", [matching, DenseCorrespondence], FLAGS),
    ("grid_size", [matching, DenseCorrespondence, DenseProjectionHead], GRIDS),
    ("min_score", [matching, DenseCorrespondence], COSINES),
    ("query_boxes", [location], PAIRS),
    ("key_boxes", [location], PAIRS + PAIRED),
    ("query_grid", [location], [*GRIDS, (T, "None", None)]),
    ("key_grid", [location], GRIDS),
    ("query_flip", [location], FLIPS),
    ("key_flip", [location], FLIPS),
    ("max_distance", [location], [*NUMBERS, (V, "-0.1", -0.1)]),
    ("hidden_channels", [DenseProjectionHead], SIZES),
    *((name, [DenseProjectionHead], [*SIZES, (T, "None", None)]) for name in ("in_channels", "out_channels")),
    *((name, [MomentumQueue], [*SIZES, (T, "None", None)]) for name in ("size", "dim")),
    ("norm_layer", [DenseProjectionHead], NORMS),
    ("init", [MomentumQueue], [(V, "'zeros', expected one of 'random', 'empty'", "zeros")]),
    ("dtype", [MomentumQueue], [(T, f"{x!r}, expected float16, bfloat16, float32", x) for x in (LONG, "float32")]),
    ("gather_distributed", [MomentumQueue, IN_BATCH], FLAGS),
    ("process_group", [MomentumQueue, IN_BATCH], [(T, "str, expected a torch.distributed.ProcessGroup", "gloo")]),
    ("keys", [enqueue], KEYS),
    ("keys", [in_batch_negatives], [KEYS[0], (V, "shape (3,), expected (B, D)", torch.ones(3))]),
    ("rank", [contrastive_accuracy], RANKS),
    ("top_k", [ACCURACY], SIZES),
    ("valid", [ACCURACY], MASKS),
    ("correspondence", [match_score], [(T, "Tensor, expected a Correspondence", SCORE)]),
    ("correspondence.score", [score_of_match], [(T, "torch.int64", INDEX), (V, "shape (6,)", SCORE[0])]),
    ("correspondence.valid", [score_of_match], MASKS),
]


@pytest.mark.parametrize(
    ("argument", "call", "error", "words", "value"),
    [(argument, call, *mistake) for argument, calls, mistakes in MISTAKES for call in calls for mistake in mistakes],
)
def test_mistakes(argument: str, call: Callable[..., Any], error: type[Exception], words: str, value: Any) -> None:
    caught = helpers.refused(lambda: call(**{argument.rpartition(".")[2]: value}))
    message = str(caught.value)
    assert caught.type is error, message
    assert message.startswith(f"{argument}: got"), message
    assert words in message, message


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing")
def test_triton_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (loss, matching):
        with pytest.raises(ValueError, match=r"backend: got 'triton', which cannot serve.*: \w+"):
            call(backend="triton")


def test_nothing_but_meta_tensors() -> None:
    """They agree among themselves, and hold no values to compute with."""
    query, key, negatives, index = (x.to(META) for x in (MAP, MAP, ROWS, INDEX))
    calls = partial(dense_info_nce, query, key, negatives, index), partial(dense_correspondence, query, key)
    for call in calls:
        assert re.match("query(_features)?: got a tensor on meta", str(helpers.refused(call).value))


def test_duck_queues(backend: str) -> None:
    """A count outside 0 to K was taken as it came: -1 of 5 meant four rows to one backend and none to another."""
    counts = [
        *map(torch.tensor, (-1, 6, 2**40, [3], [[1]], 1.5, True)),
        torch.tensor(3, device=META),
        np.array(3),
        3,
        None,
    ]
    strange = [None, ROWS.numpy(), ROWS[0], ROWS.int(), ROWS.to_sparse(), ROWS.to(META)]
    for rows, count in [(ROWS, count) for count in counts] + [(x, torch.tensor(1)) for x in strange]:
        helpers.refused(partial(loss, negatives=SimpleNamespace(rows=rows, count=count), backend=backend))


NO_NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.InstanceNorm2d)


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: dense_info_nce(MAP, MAP, ROWS, dense_correspondence(WHOLE, WHOLE)), "same grid_size"),
        (lambda: dense_info_nce(MAP, MAP, ROWS, dense_correspondence(TURNED, TURNED)), "a 3 x 2 grid .* same"),
        (lambda: dense_cosine(MAP, MAP, dense_correspondence(TURNED, TURNED)), "a 3 x 2 grid .* same"),
        (lambda: dense_info_nce(MAP, TURNED, ROWS), r"key: got shape \(2, 4, 3, 2\) .*expected the same grid"),
        (lambda: dense_info_nce(MAP[..., 0, 0], TURNED, ROWS), "expected the same grid"),
        (lambda: dense_info_nce(MAP, MAP, ROWS, index_with(-1)), "`valid` leaves out"),
        (lambda: MomentumQueue(8, 4).enqueue(MAP), "`pooled`"),
        (lambda: dense_info_nce(MAP.permute(0, 2, 3, 1), MAP.permute(0, 2, 3, 1), ROWS), r"\.permute\(0, 3, 1, 2\)"),
        (lambda: dense_info_nce(MAP, MAP, ROWS.T), r"\.T$"),
        (lambda: HEAD(WHOLE.permute(0, 2, 3, 1)[:, :3]), r"\.permute\(0, 3, 1, 2\)"),
        (lambda: HEAD(torch.ones(2, 9, 4)), r"\.transpose\(1, 2\)"),
        (lambda: HEAD({"p2": MAP, "p3": MAP}), "pick one of its tensors"),
        (lambda: HEAD([MAP, MAP]), "pick one of its tensors"),
        (lambda: HEAD(SimpleNamespace(last_hidden_state=MAP)), r"\.last_hidden_state\[:, 1:\]\.transpose\(1, 2\)"),
        (lambda: HEAD(MAP.half()), r"torch\.float32, .*torch\.autocast"),
        (lambda: HEAD(MAP.to("meta")), "meta, expected cpu"),
        (lambda: DenseProjectionHead(4, norm_layer=torch.nn.BatchNorm2d(4)), "expected what makes one"),
        *((partial(DenseProjectionHead, 4, norm_layer=norm), r"GroupNorm\(1, channels\)") for norm in NO_NORMS),
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
    assert location_correspondence(BOXES, BOXES, (2, 3)).grids == ((2, 3), (2, 3))
    assert torch.isfinite(dense_info_nce(MAP, MAP, ROWS, match._replace(index=index * 0)))
