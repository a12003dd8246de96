"""Feature matching against the brute-force oracle."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import helpers
import numpy as np
import oracle
import pytest
import torch
from helpers import GUISES, VALUES, assert_same, flat64, lay_out, numpy64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densecl_ops import DenseCorrespondence
from densecl_ops.functional import dense_correspondence

GUISE = st.sampled_from(GUISES)
SEEDS, GRIDS = st.integers(0, 10**6), st.tuples(st.integers(1, 4), st.integers(1, 4))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
FORMS = st.sampled_from([lambda x: x, lambda x: x, lambda x: x.flatten(2), lambda x: x.flatten(2)[:, :, 0]])
EPS = {torch.float64: 1e-12, torch.float32: 1e-6}


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)


def pair(
    seed: int = 0, batch: int = 3, channels: int = 5, query: tuple[int, int] = (3, 4), key: tuple[int, int] = (4, 2)
) -> tuple[Tensor, Tensor]:
    return features(batch, channels, *query, seed=seed), features(batch, channels, *key, seed=seed + 1)


def check_match(
    backend: str, query: Tensor, key: Tensor, mutual: bool = False, min_score: Any = None, grid_size: Any = None
) -> None:
    """Index and validity exactly, except where rounding decides between scores closer than it can tell.

    Of an image with NaN, only that it shows.
    """
    seen = helpers.match(backend, query, key, mutual=mutual, min_score=min_score, grid_size=grid_size)
    maps = [numpy64(x) for x in (query, key)]
    if grid_size is not None:
        height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        maps = [oracle.adaptive_pool(x, (height, width)) for x in maps]
    with np.errstate(all="ignore"):
        truth = oracle.match(*(x.reshape(*x.shape[:2], -1) for x in maps), mutual, min_score)
    ordinary = np.isfinite(truth.similarity).all((1, 2))
    assert (seen.index.dtype, seen.score.dtype, seen.valid.dtype) == (torch.int64, torch.float32, torch.bool)
    assert seen.index.shape == seen.score.shape == seen.valid.shape == truth.index.shape
    eps = EPS[torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32]
    assert (seen.score.isnan().any(1).numpy() | ordinary).all()
    np.testing.assert_allclose(seen.score.numpy()[ordinary], truth.score[ordinary], atol=1e-6)
    index = seen.index.numpy()[..., None]
    chosen = np.take_along_axis(truth.similarity, index, 2)[..., 0]
    np.testing.assert_allclose(chosen[ordinary], truth.score[ordinary], atol=eps)
    slack = np.full(chosen.shape, np.inf)  # how far the verdict is from the other one, in what rounding can do
    if mutual:
        others = np.take_along_axis(truth.similarity.swapaxes(1, 2), index, 1)  # of the chosen key with every query
        others[:, np.eye(chosen.shape[1], dtype=bool)] = -np.inf
        slack = (chosen - others.max(2)) / eps
    if min_score is not None:
        slack = np.minimum(slack, (truth.score - float(min_score)) / 1e-6)
    sure = ordinary[:, None] & (np.abs(slack) > 1)
    np.testing.assert_array_equal(seen.valid.numpy()[sure], slack[sure] > 0)


@settings(max_examples=120)
@given(data=st.data())
def test_matching(backend: str, data: st.DataObject) -> None:
    """Maps, tokens and vectors, with any values; maps pooled, too."""
    seed, images, channels = (data.draw(x) for x in (SEEDS, st.integers(1, 4), st.sampled_from([1, 2, 3, 16, 65])))
    maps = []
    for i in (0, 1):
        grid, dtype, guise, value, form = (
            data.draw(x) for x in (GRIDS, DTYPES, GUISE, st.sampled_from([*VALUES]), FORMS)
        )
        x = VALUES[value](features(images, channels, *grid, seed=seed + i).to(dtype))
        maps.append(form(lay_out(x, guise)))
    min_score = data.draw(st.sampled_from([None, -1, 0.0, 0.35, 0.9, np.float32(0.2), Fraction(1, 3)]))
    grids = [None, 2, (2, 3), [3, 1], (6, 5)] if all(x.ndim == 4 and x.dtype.itemsize > 2 for x in maps) else [None]
    mutual, grid_size = data.draw(st.booleans()), data.draw(st.sampled_from(grids))
    check_match(backend, *maps, mutual=mutual, min_score=min_score, grid_size=grid_size)


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize(
    ("images", "query", "key"), [(2, (33, 35), (30, 40)), (5, (20, 32), (25, 28))], ids=["one image", "two images"]
)
def test_many_tiles(backend: str, images: int, query: tuple[int, int], key: tuple[int, int], mutual: bool) -> None:
    """Of 2^20 scores: 1,155 x 1,200 per image are cut over the query positions; of 640 x 700, two images fit."""
    check_match(backend, *pair(batch=images, channels=3, query=query, key=key), mutual)


CPU_FORMS: dict[str, dict[str, int]] = {
    "at once": {"SMALL": 2**40},
    "operators on all threads": {"SMALL": 0, "LEAST_FEATURES": 2**40},
    "images on threads": {"SMALL": 0, "LEAST_FEATURES": 1},
    "groups": {"SMALL": 0, "LEAST_FEATURES": 1, "GROUP_FEATURES": 3 * 24 * (49 + 30)},
    "images of a group, one by one": {"SMALL": 0, "GROUP_FEATURES": 1, "ONEDNN_PRODUCT": 0},
    "no group holds an image": {"SMALL": 0, "PART_FEATURES": 1, "GROUP_FEATURES": 1},
}


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("key_grid", [(7, 7), (5, 6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", CPU_FORMS)
def test_forms_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    dtype: torch.dtype,
    layout: str,
    key_grid: tuple[int, int],
    mutual: bool,
) -> None:
    """Zero, overflow and NaN stay themselves in each."""
    for name, value in CPU_FORMS[form].items():
        monkeypatch.setattr(f"densecl_ops.correspondence.blockwise.{name}", value)
    query, key = (lay_out(x.to(dtype), layout) for x in pair(batch=13, channels=24, query=(7, 7), key=key_grid))
    query[3, :, 2, 2] = key[7, :, 1, 1] = 0
    query[6, 2, 0, 3] = float("nan")
    with torch.device("meta"):  # another default
        check_match("blockwise", query, key, mutual)
    query[4, :, 0, 1] = key[5, :, 0, 1] = 1e200 if dtype == torch.float64 else 3e38
    seen, usual = (helpers.match(backend, query, key, mutual=mutual) for backend in ("blockwise", "eager"))
    assert torch.equal(seen.score.isnan(), usual.score.isnan())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mutual", [False, True])
def test_ties_go_to_the_lowest_index(backend: str, dtype: torch.dtype, mutual: bool) -> None:
    """Exactly representable unit vectors, each key twice; then 1,100 x 1,100 equal scores."""
    units = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 1.0]], dtype=dtype)
    query, key = units.t()[None], units[[2, 0, 1, 0, 2, 1]].t()[None]
    assert helpers.match(backend, query, key, mutual=mutual).index.tolist() == [[1, 2, 0]]
    assert helpers.match(backend, query, key, mutual=mutual).valid.all()
    ones = torch.ones(1, 4, 1100, dtype=dtype)  # more than one tile
    same = helpers.match(backend, ones, ones, mutual=mutual)
    assert not same.index.any()
    assert same.valid.nonzero().tolist() == ([[0, 0]] if mutual else [[0, i] for i in range(1100)])
    twins = query[:, :, [0, 0, 1, 1]]
    back = helpers.match(backend, twins, query, mutual=True)
    assert back.index.tolist() == [[0, 0, 1, 1]]
    assert back.valid.tolist() == [[True, False, True, False]]  # each key's own nearest is the lower twin


def test_a_nan_in_any_tile_is_the_nearest_of_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's max has it, and the eager form, wherever the tiles of query positions are cut."""
    query, key = pair()
    for tile in (8, 16, 96):  # scores: one query position, two, all twelve
        monkeypatch.setattr("densecl_ops.correspondence.blockwise.TILE_SCORES_CPU", tile)
        for position in (0, 5, 11):
            bad = query.clone()
            bad[:, :, position // 4, position % 4] = float("nan")
            seen, usual = (helpers.match(backend, bad, key, mutual=True) for backend in ("blockwise", "eager"))
            assert torch.equal(seen.valid, usual.valid)
            assert not seen.valid[:, [i for i in range(12) if i != position]].any()


def test_zero_vectors(backend: str) -> None:
    query, key = pair(3)
    query[0, :, 0, 0] = key[1, :, 2, 1] = 0
    key[2] = 0
    match, truth = helpers.match(backend, query, key), oracle.match(flat64(query), flat64(key))
    assert match.index.tolist() == truth.index.tolist()
    np.testing.assert_allclose(match.score, truth.score, atol=1e-6)


@pytest.mark.parametrize("mutual", [False, True])
def test_nan_stays_in_its_image_and_stays_valid(backend: str, mutual: bool) -> None:
    """As in torch.argmax, the first NaN wins over everything; and it shows in the score."""
    for sides in ({}, {"query": (9, 8), "key": (10, 9)}):  # one tile of the kernels, and several
        query, key = (x.float() for x in pair(4, channels=16, **sides))
        clean = helpers.match(backend, query, key, mutual=mutual)
        query[1, 0, 0, 3] = key[2, 2, -1, 1] = np.nan
        match = helpers.match(backend, query, key, mutual=mutual)
        assert torch.equal(match.index[0], clean.index[0])
        assert torch.equal(match.valid[0], clean.valid[0])
        assert match.index[1, 3] == 0
        clean.index[1, 3] = 0
        assert torch.equal(match.index[1], clean.index[1])
        assert match.score[1].isnan().nonzero().tolist() == [[3]]
        assert (match.index[2] == key[0, 0].numel() - key.shape[3] + 1).all()
        assert match.score[2].isnan().all()
        assert helpers.match(backend, query, key, min_score=0.99).valid[1, 3]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_autocast_changes_nothing(backend: str, autocast: torch.dtype, grid: tuple[int, int] | None) -> None:
    """Pairs of keys 0.03 apart: bfloat16 products would choose others."""
    query = features(4, 64, 6, 6, dtype=torch.float32)
    key = query.flip(3) + 0.1 * features(4, 64, 6, 6, seed=1, dtype=torch.float32)
    key[:, :, :, 3:] = key[:, :, :, :3] + 0.03 * features(4, 64, 6, 3, seed=2, dtype=torch.float32)
    plain = helpers.match(backend, query, key, mutual=True, grid_size=grid)
    with torch.autocast(helpers.DEVICES.get(backend, "cpu"), autocast):
        cast = helpers.match(backend, query, key, mutual=True, grid_size=grid)
    assert_same(cast, plain)
    check_match(backend, query, key, grid_size=grid)


def test_low_precision_features_are_accumulated_in_float32(backend: str) -> None:
    """Values whose squares overflow float16, and 4,096 channels whose sum bfloat16 could not count."""
    query, key = features(2, 4096, 3, 3), features(2, 4096, 3, 3, seed=1)
    key = 0.1 * query.flip(2) + key
    check_match(backend, query.to(torch.bfloat16), key.to(torch.bfloat16), mutual=True)
    check_match(backend, (300 * query).to(torch.float16), (300 * key).to(torch.float16), mutual=True)


@pytest.mark.parametrize(("channels", "grid"), [(2048, 7), (512, 14)])
@pytest.mark.parametrize("structure", ["smooth", "clustered", "sparse"])
def test_bfloat16_maps_like_those_of_a_network(backend: str, structure: str, channels: int, grid: int) -> None:
    """A product in bfloat16 errs at some percent."""
    rank = {"smooth": 8, "clustered": 20, "sparse": 200}[structure]
    basis, generator = features(rank, channels), torch.Generator().manual_seed(1)

    def view() -> Tensor:
        amounts = torch.randn(2, rank, 4, 4, dtype=torch.float64, generator=generator)
        if structure == "clustered":  # a cell shows one of few things
            amounts = (8 * amounts).softmax(1)
        smooth = torch.nn.functional.interpolate(amounts, (grid, grid), mode="bilinear")
        noise = torch.randn(2, channels, grid, grid, dtype=torch.float64, generator=generator)
        x = torch.einsum("brhw,rc->bchw", smooth, basis) + 0.3 * noise
        return (x - 1 if structure == "sparse" else x).relu().bfloat16()

    query, key = view(), view()
    for layout in ("contiguous", "channels_last"):
        check_match(backend, lay_out(query, layout), lay_out(key, layout))
    rounded = torch.bmm(query.flatten(2).mT, key.flatten(2)) / key.flatten(2).norm(dim=1)[:, None]
    assert (rounded.argmax(2).numpy() != oracle.match(flat64(query), flat64(key)).index).mean() > 0.01


def test_no_gradient_and_no_change_of_inputs(backend: str) -> None:
    query, key = pair(5)
    match = helpers.match(backend, query.clone().requires_grad_(), key.clone().requires_grad_(), mutual=True)
    assert not match.score.requires_grad
    with torch.inference_mode():
        again = helpers.match(backend, query, key, mutual=True)
    assert_same((again, query, key), (match, *pair(5)))


def test_min_score_of_identical_maps(backend: str) -> None:
    """The threshold includes its own value: exactly representable vectors score exactly 1."""
    query = torch.eye(4)[None]
    assert helpers.match(backend, query, query, min_score=1.0).valid.all()
    assert not helpers.match(backend, query, -query, min_score=0.5).valid.any()


def test_module_equals_function(backend: str) -> None:
    query, key = helpers.to_device(backend, *pair(8))
    module = DenseCorrespondence(grid_size=(2, 2), mutual=True, min_score=0.1, backend=backend)
    function = dense_correspondence(query, key, grid_size=(2, 2), mutual=True, min_score=0.1, backend=backend)
    assert_same(module(query, key), function)
    assert "mutual=True" in repr(module)
    assert not module.state_dict()
