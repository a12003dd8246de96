"""Every refusal names the argument, what came and what was expected: each kind of wrong value for every argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HOUSE_FORM, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import densecl_ops
from densecl_ops import Correspondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue, _checks, functional
from densecl_ops.functional import (
    dense_correspondence,
    dense_cosine,
    dense_info_nce,
    gather_matches,
    in_batch_negatives,
)
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share

LONG, META = torch.int64, torch.device("meta")
MAP, KEY, TURNED, WHOLE = (torch.ones(2, 4, *grid) for grid in ((2, 3), (3, 3), (3, 2), (4, 4)))
ROWS = nn.functional.normalize(torch.ones(5, 4), dim=1)
INDEX, SCORE, VALID = torch.zeros(2, 6, dtype=LONG), torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool)
BOXES, FLIP = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]]), torch.ones(2, dtype=torch.bool)
HEAD, QUEUE, SHORT = DenseProjectionHead(4, 4, 4), MomentumQueue(5, 4), MomentumQueue(5, 4)
SHORT.rows.data.mul_(0.5)  # as ema-pytorch averages: .data leaves no version


def loss(negatives: Any = ROWS, correspondence: Any = INDEX, **options: Any) -> Any:
    return dense_info_nce(MAP, KEY, negatives, correspondence, **options)


def match_of(**changes: Any) -> Correspondence:
    return Correspondence(**({"index": INDEX, "score": SCORE, "valid": VALID} | changes))


matching = partial(dense_correspondence, query_features=MAP, key_features=KEY)
a_head = partial(DenseProjectionHead, 4)


# Of a tensor (B, ...) with B = 2.
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
    "meta": lambda x: x.to(META),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(2, 2)], layout=torch.jagged),
}
NUMBERS = ["0.2", True, 0.2j, float("nan"), float("inf"), -float("inf"), 10**400, [0.2], np.array([0.2])]
TEMPERATURES = [*NUMBERS, None, 0, -0.2, 1e-19, 1e-320, torch.tensor(-1.0), torch.tensor([0.2]), torch.tensor(1)]
NAMES = ["", "Mean", None, 3, ["mean"], np.array(["mean", "sum"]), b"mean", torch.tensor(1)]
FLAGS = ["no", "", 0, 1, None, torch.tensor(True), [True]]
SIZES = [0, -1, 2.0, "8", True, [3], torch.tensor(8)]
GRIDS = [0, -1, (0, 2), (1, 2, 3), (), (None, 2), "7", 2.0, True, -(10**400), np.array([2, 2])]
COUNTS = [*map(torch.tensor, (-1, 6, 2**40, [3], 1.5, True)), torch.tensor(3, device=META), np.array(3), 3, None]
STRANGE = [None, ROWS.numpy(), ROWS[0], ROWS.int(), ROWS.to_sparse(), ROWS.to(META)]
QUEUES = [SimpleNamespace(rows=ROWS, count=count) for count in COUNTS]
QUEUES += [SimpleNamespace(rows=rows, count=torch.tensor(1)) for rows in STRANGE]
NORMS = ["batch", lambda channels: None, nn.BatchNorm2d(3), nn.BatchNorm1d, nn.LayerNorm, nn.InstanceNorm2d]
OUTSIDE = [INDEX + 9, INDEX - 1]
BAD_BOXES = [
    BOXES * torch.tensor([1, 0, 0, 1]),
    BOXES * torch.inf,
    BOXES.bool(),
    torch.tensor([[-1e308, 0, 1e308, 1]] * 2).double(),
]

PAIRS = {"query": MAP, "key": KEY, "correspondence": INDEX, "weight": SCORE}
MATCH = {"index": INDEX, "valid": VALID}
MAPS = {"query_features": MAP, "key_features": MAP}
BOXED = {"query_boxes": BOXES, "key_boxes": BOXES}
LOSS = {"temperature": TEMPERATURES, "reduction": NAMES, "backend": NAMES}
MATCHING = {"grid_size": GRIDS, "mutual": FLAGS, "min_score": [*NUMBERS, 1.5, -2], "backend": NAMES}
PLACES = {"query_grid": [*GRIDS, None], "key_grid": GRIDS, "max_distance": [*NUMBERS, -0.1]}
SIDES = {"hidden_channels": SIZES, "out_channels": [*SIZES, None], "grid_size": GRIDS, "norm_layer": NORMS}
STORE = {"size": [*SIZES, None], "dim": [*SIZES, None], "init": NAMES, "dtype": [LONG, "float32"]}
GATHERING = {"gather_distributed": FLAGS, "process_group": ["gloo"]}

Calls = dict[str, tuple[Callable[..., Any], dict[str, Tensor], dict[str, list[Any]]]]
CALLS: Calls = {  # a call, its tensors, and what else it refuses
    "loss": (
        dense_info_nce,
        PAIRS | {"negatives": ROWS[:2], "exclude": torch.tensor([1, 0])},
        LOSS | {"return_rank": FLAGS, "negatives": QUEUES, "correspondence": OUTSIDE},
    ),
    "loss of a match": (lambda **x: loss(ROWS, match_of(**x)), MATCH, {"index": OUTSIDE}),
    "loss module": (DenseInfoNCELoss, {}, LOSS | {"learnable_temperature": FLAGS}),
    "cosine": (dense_cosine, PAIRS, {"reduction": NAMES, "correspondence": OUTSIDE}),
    "cosine of a match": (lambda **x: dense_cosine(MAP, KEY, match_of(**x)), MATCH, {"index": OUTSIDE}),
    "gathering": (gather_matches, {"key": KEY, "correspondence": INDEX}, {"correspondence": [None, *OUTSIDE]}),
    "matching": (dense_correspondence, MAPS, MATCHING),
    "matching module": (densecl_ops.DenseCorrespondence, {}, MATCHING),
    "matching by place": (
        partial(functional.location_correspondence, query_grid=2),
        BOXED | {"query_flip": FLIP, "key_flip": FLIP},
        PLACES | dict.fromkeys(BOXED, BAD_BOXES),
    ),
    "head": (HEAD, {"features": MAP}, {}),
    "making a head": (a_head, {}, SIDES),
    "making a queue": (partial(MomentumQueue, size=5), {}, STORE | GATHERING),
    "enqueue": (QUEUE.enqueue, {"keys": ROWS}, {"keys": [ROWS.long()]}),
    "in-batch negatives": (in_batch_negatives, {"keys": ROWS}, GATHERING | {"keys": [ROWS.long()]}),
    "accuracy": (contrastive_accuracy, {"rank": INDEX, "valid": VALID}, {"top_k": SIZES}),
    "match score": (lambda **x: match_score(match_of(**x)), {"score": SCORE, "valid": VALID}, {}),
    "mutual share": (mutual_share, MAPS, {"grid_size": GRIDS, "backend": NAMES}),
}
ANY_NUMBER = {"no image", "one image", "three images"}
ACCEPTED = {
    ("loss", "negatives"): {"one image", "three images"},
    ("head", "features"): {"one image", "three images", "last size more"},
    ("enqueue", "keys"): ANY_NUMBER,
    ("in-batch negatives", "keys"): ANY_NUMBER | {"last size 0", "last size more", "meta"},
    ("gathering", "correspondence"): {"last size more"},
    **{(call, "key"): {"last size more"} for call in ("loss", "cosine", "gathering")},
    **{(call, name): {"last size more"} for call in ("matching", "mutual share") for name in MAPS},
}


PARTNERS = {  # of two tensors that do not fit, the second is named
    **{"query": "key|correspondence", "query_features": "key_features", "query_boxes": "key_boxes"},
    **{"rank": "valid", "score": "valid", "key": "correspondence"},
}
KINDS = {"numpy", "list", "str", "number", "object", "complex", "8-bit float", "sparse", "nested"}


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_wrong_value(name: str) -> None:
    """A TypeError for another kind of thing, a ValueError for what does not fit; its argument is named."""
    call, sound, others = CALLS[name]
    call(**sound)
    wrong = [(argument, how, guise(x)) for argument, x in sound.items() for how, guise in HOSTILE.items()]
    wrong += [(argument, "", value) for argument, values in others.items() for value in values]
    before = QUEUE.rows.clone()
    for argument, how, value in wrong:
        if how in ACCEPTED.get((name, argument), ()):
            continue
        caught = refused(partial(call, **sound | {argument: value}))
        assert how == "" or (caught.type is TypeError) == (how in KINDS), caught.value
        named = rf"(correspondence\.|negatives\.)?({argument}|{PARTNERS.get(argument, argument)})\b"
        assert re.match(named, str(caught.value)), caught.value
    assert torch.equal(QUEUE.rows, before)


T, V = TypeError, ValueError

# Where the words help more than name, value and expectation do: a call, the error, and words (" ... ": anything).
WORDS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: loss(ROWS.T), V, "expected (K, 4) ... a (D, K) queue, as MoCo stores it, is passed as .T"),
    (lambda: dense_info_nce(*[MAP.permute(0, 2, 3, 1)] * 2, ROWS), V, "looks like ... pass .permute(0, 3, 1, 2)"),
    (lambda: dense_info_nce(*[MAP.flatten(2).mT] * 2, ROWS), V, "query, (2, 6, 4), looks like (B, P, C) tokens: pass"),
    (lambda: dense_info_nce(MAP, TURNED, ROWS), V, "key: got shape (2, 4, 3, 2) ... expected the same grid, since"),
    (lambda: dense_info_nce(MAP[..., 0, 0], TURNED, ROWS), V, "key: got shape (2, 4, 3, 2) ... expected the same grid"),
    (lambda: dense_info_nce(*[MAP.to(META)] * 2, ROWS.to(META)), V, "query: got a tensor on meta, expected a device"),
    (lambda: loss(ROWS, INDEX[:, :4]), V, "expected (2, 6), ... give matching and head the same grid_size"),
    (lambda: loss(ROWS, dense_correspondence(KEY, MAP)), V, "it looks like a match from key to query"),
    (lambda: dense_info_nce(ROWS, ROWS, ROWS, INDEX[:1].expand(5, 6)), V, "of (B, D) vectors, takes no correspondence"),
    (lambda: dense_info_nce(MAP.flatten(2), KEY, ROWS, INDEX[:, :4]), V, "of (B, P, C) tokens that is .transpose("),
    (lambda: loss(in_batch_negatives(ROWS)), T, "got tuple, ... a pair: negatives, own = in_batch_neg"),
    (lambda: loss(match_of()), T, "got Correspondence, ... the order is query, key, negatives, correspondence"),
    (lambda: in_batch_negatives(MAP), V, "expected (B, D); of a Projection pass `pooled`"),
    (lambda: loss(ROWS, INDEX - 1), V, "got values from -1 to -1 ... a position without a match is one that"),
    (lambda: loss(ROWS, match_of(index=INDEX + 9)), V, "correspondence.index: got values from 9 to 9, expected"),
    (lambda: loss(ROWS, dense_correspondence(TURNED, WHOLE)), V, "from a 3 x 2 grid into 4 x 4, expected (2, 3) and"),
    (lambda: dense_cosine(MAP, MAP, dense_correspondence(TURNED, TURNED)), V, "a match from a 3 x 2 grid into 3 x 2"),
    (lambda: loss(exclude=torch.tensor([0, 5])), V, "exclude: got values from 0 to 5, expected them within 0 to 4"),
    (lambda: DenseInfoNCELoss()(MAP, KEY, ROWS, temperature=1), T, "temperature: got one in the call, expected it"),
    (lambda: loss(temperature=torch.tensor(0.0)), V, "got 0.0 ... not initialised needs reset_parameters()"),
    (lambda: matching(grid_size=(1, 2, 3)), V, "grid_size: got (1, 2, 3), expected an int or a pair (height, width)"),
    (lambda: matching(key_features=KEY.flatten(2), grid_size=2), V, "key_features: ... expected a (B, C, H, W) map"),
    (lambda: match_score(SCORE), T, "correspondence: got Tensor, expected a Correspondence"),
    (lambda: HEAD(WHOLE.permute(0, 2, 3, 1)[:, :3]), V, "pass .permute(0, 3, 1, 2)"),
    (lambda: HEAD(torch.ones(2, 9, 4)), V, "pass .transpose(1, 2)"),
    (lambda: HEAD(torch.ones(4, 7, 9)), V, "a (C, H, W) map of one image: pass .unsqueeze(0)"),
    (lambda: HEAD(torch.ones(2, 9, 7, 7)), V, "expected 4 channels (in_channels), or a head with in_channels=9"),
    (lambda: HEAD({"p2": MAP, "p3": MAP}), T, "features: got dict, expected a torch.Tensor; pick one of its tensors"),
    (lambda: HEAD(SimpleNamespace(last_hidden_state=MAP)), T, "take .last_hidden_state[:, 1:].transpose(1, 2)"),
    (lambda: HEAD(MAP.half()), T, "expected torch.float32, which the head has, or a call under torch.autocast"),
    (lambda: HEAD(MAP.to(META)), V, "features: got a tensor on meta, expected cpu, where the head is"),
    (lambda: a_head(norm_layer="batch"), T, "norm_layer: got 'batch', expected what makes a norm of (B, C, H, W) maps"),
    (lambda: a_head(norm_layer=nn.GroupNorm), T, "or lambda channels: torch.nn.GroupNorm(1, channels)"),
    (lambda: QUEUE.enqueue(MAP), V, "keys: got shape (2, 4, 2, 3), expected (n, 4); of a Projection enqueue `pooled`"),
]


@pytest.mark.parametrize(("call", "error", "words"), WORDS, ids=[words for *_, words in WORDS])
def test_words(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    assert refused(call, words).type is error


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: DenseInfoNCELoss(temperature=5.0), "was 1 / t meant"),
        (lambda: dense_info_nce(MAP, MAP.clone().requires_grad_(), QUEUE), r"torch\.no_grad\(\)"),
        (lambda: [dense_info_nce(MAP, MAP, queue) for queue in [MomentumQueue(8, 4, init="empty")] * 2], "enqueue"),
        (lambda: loss(2 * ROWS), r"normalise them \(torch\.nn\.functional\.normalize\(rows, dim=1\)\)"),
        (lambda: loss(SHORT), "averaging of buffers spoils a queue.*ignore_startswith_names"),
    ],
)
def test_likely_mistakes_are_warned_of_once(call: Callable[[], Any], advice: str) -> None:
    _checks.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=advice) as seen:
        call(), call()
    assert len(seen) == 1


def test_a_match_carries_its_grids_and_still_unpacks() -> None:
    match = dense_correspondence(TURNED, WHOLE)
    index, _, valid = match
    assert match.grids == ((3, 2), (4, 4))
    assert match._replace(valid=~valid).grids is None
    assert dense_correspondence(TURNED, WHOLE, grid_size=2).grids == ((2, 2), (2, 2))
    assert functional.location_correspondence(BOXES, BOXES, (2, 3)).grids == ((2, 3), (2, 3))
    assert torch.isfinite(dense_info_nce(MAP, MAP, ROWS, match._replace(index=index * 0)))


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


@settings(max_examples=100)
@given(params=JUNK | TENSORS)
def test_junk_as_crop_parameters(params: Any) -> None:
    """An error or, where it has the form of parameters by chance, (B, 4) numbers."""
    readers = {"torchvision": {}, "kornia": {}, "matrix": {"size": 8}, "albumentations": {"image_size": (8, 8)}}
    for name, options in readers.items():
        try:
            boxes = getattr(functional, f"boxes_from_{name}")(params, **options)
        except (TypeError, ValueError) as error:
            assert HOUSE_FORM.match(str(error)), error  # noqa: PT017
        else:
            assert (boxes.dtype, boxes.ndim, boxes.shape[1]) == (torch.float32, 2, 4)
