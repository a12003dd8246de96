"""Matching by place against brute force on rendered coordinates, and every rule under every option of the loss.

Rendered: each pixel of an image holds its own coordinates, the augmentation under test cuts and scales that image, and
average pooling reads back where every cell of the view lies. No formula of the library takes part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import check, flat64, make_case, numpy64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densecl_ops import Correspondence
from densecl_ops.functional import (
    boxes_from_kornia,
    boxes_from_torchvision,
    dense_correspondence,
    location_correspondence,
)

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def random_boxes(rng: np.random.Generator, batch: int, grid: tuple[int, int]) -> np.ndarray:
    """Integer boxes whose sides are multiples of the grid, so that cells are whole pixels."""
    corner = rng.integers(0, 25, (batch, 2))
    cell = rng.integers(1, 6, (batch, 2))
    return np.concatenate([corner, corner + cell * np.array(grid[::-1])], 1)


def check_location(
    boxes: tuple[np.ndarray, np.ndarray],
    grids: tuple[tuple[int, int], tuple[int, int]],
    flips: tuple[np.ndarray, np.ndarray],
    max_distance: float | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    truth = oracle.location_match(boxes, grids, flips, max_distance)
    seen = location_correspondence(
        *(torch.tensor(box).to(dtype) for box in boxes),
        *grids,
        query_flip=torch.tensor(flips[0]),
        key_flip=torch.tensor(flips[1]),
        max_distance=max_distance,
    )
    turned = [np.where(flip[:, None], box[:, [2, 1, 0, 3]], box) for box, flip in zip(boxes, flips, strict=True)]
    same = location_correspondence(*(torch.tensor(x).to(dtype) for x in turned), *grids, max_distance=max_distance)
    assert all(map(torch.equal, seen, same)), "x0 > x1 must say the same as a flip"
    assert (seen.index.dtype, seen.score.dtype, seen.valid.dtype) == (torch.int64, torch.float32, torch.bool)
    np.testing.assert_allclose(seen.score.numpy(), truth.score, atol=1e-5)
    ordered = np.sort(-truth.similarity, 2)[:, :, :2]
    clear = (truth.similarity.shape[2] == 1) | (ordered[:, :, -1] - ordered[:, :, 0] > 1e-9)
    np.testing.assert_array_equal(seen.index.numpy()[clear], truth.index[clear])
    tied = np.take_along_axis(truth.similarity, seen.index.numpy()[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(tied, truth.score, atol=1e-9)
    if max_distance is not None:
        clear = np.abs(-truth.score - max_distance) > 1e-9
    np.testing.assert_array_equal(seen.valid.numpy()[clear], truth.valid[clear])


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    grids=st.tuples(GRIDS, GRIDS),
    max_distance=st.sampled_from([None, 0.0, 0.3, 0.7, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]),
)
def test_location(
    seed: int,
    batch: int,
    grids: tuple[tuple[int, int], tuple[int, int]],
    max_distance: float | None,
    dtype: torch.dtype,
) -> None:
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, batch, grids[0]), random_boxes(rng, batch, grids[1])
    flips = rng.random(batch) < 0.5, rng.random(batch) < 0.5
    check_location(boxes, grids, flips, max_distance, dtype)


def test_same_crop_matches_itself_at_distance_zero() -> None:
    boxes = torch.tensor([[3.0, 5.0, 17.0, 19.0]])
    match = location_correspondence(boxes, boxes, 7, max_distance=0.0)
    assert match.index.tolist() == [list(range(49))]
    assert (match.score == 0).all()
    assert match.valid.all()


def test_flip_mirrors_the_columns() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8]]).expand(2, -1)
    match = location_correspondence(boxes, boxes, 2, key_flip=torch.tensor([True, False]))
    assert match.index.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]]
    match = location_correspondence(boxes, boxes, 2, query_flip=torch.tensor([True, False]))
    assert match.index.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]]


def test_ties_go_to_the_lowest_index() -> None:
    """One query cell centred on the corner of four key cells."""
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    for key_grid, flip in ((2, False), (4, False), ((2, 4), True)):
        match = location_correspondence(boxes, boxes, 1, key_grid, key_flip=torch.tensor([flip]))
        grid = (key_grid, key_grid) if isinstance(key_grid, int) else key_grid
        lowest = (grid[0] // 2 - 1) * grid[1] + grid[1] // 2 - 1
        assert match.index.tolist() == [[lowest]]


def test_default_distance_is_pixpros() -> None:
    """Cells of 1 x 1: centres 0.9 apart are 0.636 diagonals apart, 1.1 apart 0.778."""
    here = torch.tensor([[0.0, 0, 1, 1]]).expand(2, -1)
    there = here + torch.tensor([[0.9, 0, 0.9, 0], [1.1, 0, 1.1, 0]])
    match = location_correspondence(here, there, 1)
    assert match.valid.tolist() == [[True], [False]]
    assert match.score.flatten().tolist() == pytest.approx([-0.9 / 2**0.5, -1.1 / 2**0.5])


def test_distance_is_in_diagonals_of_the_larger_cell() -> None:
    small, large = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 0, 5, 4]])
    for a, b in ((small, large), (large, small)):
        assert location_correspondence(a, b, 1).score.item() == pytest.approx(-np.hypot(3, 1.5) / 5)


def test_disjoint_crops_have_no_match() -> None:
    match = location_correspondence(torch.tensor([[0, 0, 10, 10]]), torch.tensor([[90, 90, 99, 99]]), 5)
    assert not match.valid.any()
    assert ((match.index >= 0) & (match.index < 25)).all()


@pytest.mark.parametrize("name", ["query_boxes", "key_boxes"])
@pytest.mark.parametrize("box", [[1, 1, 1, 4], [1, 3, 4, 3], [0, 0, float("nan"), 4], [0, 0, float("inf"), 4]])
def test_boxes_without_extent(name: str, box: list[float]) -> None:
    boxes = {key: torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]]) for key in ("query_boxes", "key_boxes")}
    boxes[name][1] = torch.tensor(box)
    with pytest.raises(ValueError, match=rf"{name}: got \[.*expected finite corners and sides other than 0"):
        location_correspondence(**boxes, query_grid=2)


# ---- boxes from crop parameters -------------------------------------------------------------------------------------


def coordinates(batch: int, height: int, width: int) -> Tensor:
    """(B, 2, H, W) images whose pixels hold the x and the y of their own centres."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y]).double().expand(batch, -1, -1, -1).clone()


def box_centres(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 2, H, W): where the cells of a box must lie if it says the truth."""
    fractions = coordinates(len(boxes), *grid) / torch.tensor(grid[::-1])[:, None, None]
    low, high = boxes.double().chunk(2, 1)
    return low[:, :, None, None] + (high - low)[:, :, None, None] * fractions


TORCHVISION = [(3, 5, 32, 40), (0, 0, 56, 57), (17, 20, 39, 48)]  # top, left, height, width


@pytest.mark.parametrize("antialias", [True, False])
def test_torchvision_crops_rendered(antialias: bool) -> None:
    """resized_crop is a slice and then F.interpolate; written out here, as torchvision itself is not at hand.

    Antialiasing sees one side only of a pixel at the border of the crop, which moves its cell inwards a little.
    """
    image, grid, side = coordinates(1, 60, 80), (4, 7), 28
    for top, left, height, width in TORCHVISION:
        crop = image[:, :, top : top + height, left : left + width]
        view = F.interpolate(crop, (side, side), mode="bilinear", antialias=antialias, align_corners=False)
        boxes = boxes_from_torchvision((top, left, height, width))
        off = (F.adaptive_avg_pool2d(view, grid) - box_centres(boxes, grid)).abs()
        cells = off / torch.tensor([width / grid[1], height / grid[0]])[:, None, None]
        assert cells.max() < (0.01 if antialias else 1e-9)


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        lambda rows: tuple(map(list, rows)),
        torch.tensor,
        lambda rows: torch.tensor(rows, dtype=torch.uint8),
        np.array,
        torch.utils.data.default_collate,
        lambda rows: torch.tensor(rows).double().requires_grad_(),
    ],
)
def test_forms_of_torchvision_parameters(form: Callable[[Any], Any]) -> None:
    rows = [(200, 150, 30, 120), (0, 1, 2, 3), (5, 6, 7, 8)]  # 150 + 120 leaves uint8
    expected = [[150, 200, 270, 230], [1, 0, 4, 2], [6, 5, 14, 12]]
    boxes = boxes_from_torchvision(form(rows))
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == expected
    assert not boxes.requires_grad
    assert boxes_from_torchvision(rows[0]).tolist() == expected[:1]
    assert boxes_from_torchvision(torch.tensor(rows[0])).tolist() == expected[:1]


@pytest.mark.parametrize(
    ("error", "params"),
    [
        (TypeError, None),
        (TypeError, 3),
        (TypeError, "crop"),
        (TypeError, {"top": 1}),
        (TypeError, [(1, 2, 3, 4), (1, 2, 3)]),
        (TypeError, [("1", "2", "3", "4")]),
        (TypeError, [torch.zeros(2), torch.zeros(3), torch.ones(2), torch.ones(2)]),
        (TypeError, torch.ones(2, 4, dtype=torch.complex64)),
        (TypeError, torch.ones(2, 4, dtype=torch.bool)),
        (TypeError, [(1j, 2, 3, 4)]),
        (TypeError, [(2**70, 2, 3, 4)]),
        (ValueError, []),
        (ValueError, (1, 2, 3)),
        (ValueError, torch.ones(4, 5)),
        (ValueError, (1, 2, 0, 4)),
        (ValueError, (1, 2, 3, -4)),
        (ValueError, (1, 2, float("nan"), 4)),
    ],
)
def test_not_torchvision_parameters(error: type[Exception], params: Any) -> None:
    with pytest.raises(error, match=r"^params: got .*expected"):
        boxes_from_torchvision(params)


SIZE = (24, 30)  # of a view
GRID_PAIRS = [((4, 5), (4, 5)), ((3, 5), (6, 2)), ((8, 3), (2, 15)), ((2, 2), (12, 10))]
PIPELINES = {
    "crop": ("crop",),
    "crop, flips": ("crop", "RandomHorizontalFlip", "RandomVerticalFlip", "RandomGaussianNoise"),
    "flips, crop": ("RandomHorizontalFlip", "RandomVerticalFlip", "crop"),
    "crop twice": ("RandomCrop", "crop", "RandomHorizontalFlip"),
    "centre, nested": ("CenterCrop", ("crop", "RandomHorizontalFlip")),
    "crop, resize": ("crop", "RandomHorizontalFlip", "Resize"),
}


def kornia_view(
    pipeline: Sequence[Any], image: Tensor, seed: int, align_corners: bool, mode: str
) -> tuple[Tensor, Any]:
    """The augmented image and the parameters kept, after noise of strength 0 where the pipeline has it."""
    augmentation = pytest.importorskip("kornia.augmentation")

    def build(name: Any) -> Any:
        if isinstance(name, tuple):
            return augmentation.ImageSequential(*map(build, name))
        if name == "crop":
            options = {"align_corners": align_corners, "cropping_mode": mode, "ratio": (0.8, 1.6)}
            return augmentation.RandomResizedCrop(SIZE, scale=(0.4, 0.9), **options)
        if name == "Resize":
            return augmentation.Resize((2 * SIZE[0], 2 * SIZE[1]), align_corners=True)
        sizes = {"RandomCrop": ((58, 70),), "CenterCrop": ((56, 66),), "RandomGaussianNoise": (0.0, 0.0)}
        return getattr(augmentation, name)(*sizes.get(name, ()))

    torch.manual_seed(seed)
    augment = augmentation.AugmentationSequential(*map(build, pipeline), data_keys=["input"])
    return augment(image), augment._params


MODES = [("slice", True), ("slice", False), ("resample", True)]


@pytest.mark.parametrize(
    ("name", "mode", "align_corners"),  # enlarging again repeats a border, which the next test measures
    [(name, *mode) for name in PIPELINES for mode in MODES if not (name == "crop, resize" and mode == MODES[1])],
)
def test_kornia_crops_rendered(name: str, mode: str, align_corners: bool) -> None:
    """Centres of cells to a thousandth of a pixel."""
    pipeline = PIPELINES[name]
    view, params = kornia_view(pipeline, coordinates(6, 60, 80), 0, align_corners, mode)
    boxes = boxes_from_kornia(params, align_corners=align_corners)
    assert (boxes.shape, boxes.dtype) == ((6, 4), torch.float32)
    for grid in ((4, 5), (3, 10)):
        off = F.adaptive_avg_pool2d(view, grid) - box_centres(boxes, grid)
        assert off.abs().max() < 1e-3


def test_kornia_crop_scaled_up_rendered() -> None:
    """Between pixel edges, a view repeats the outer half pixel of the crop: 1/8 pixel over its outer cells."""
    augmentation = pytest.importorskip("kornia.augmentation")
    crop = augmentation.RandomResizedCrop((60, 60), scale=(0.02, 0.04), align_corners=False)
    view, grid = crop(coordinates(8, 60, 80)), (5, 5)
    boxes = boxes_from_kornia(crop._params, align_corners=False)
    off = (F.adaptive_avg_pool2d(view, grid) - box_centres(boxes, grid)).abs()
    sides = (boxes[:, 2:] - boxes[:, :2])[:, :, None, None]
    assert (sides < 40).all()
    assert off[..., 1:-1, 1:-1].max() < 1e-3
    assert (off < 0.13 * 5 / sides).all()


def test_kornia_crop_left_out() -> None:
    """p=0: the view is the input; also in an AugmentationSequential, and after a flip of its own."""
    augmentation = pytest.importorskip("kornia.augmentation")
    crop, flip = augmentation.RandomResizedCrop(SIZE, p=0.0), augmentation.RandomHorizontalFlip(p=1.0)
    sequence = augmentation.AugmentationSequential(flip, crop, data_keys=["input"])
    image = coordinates(2, 60, 80)
    for augment, expected in ((crop, [0, 0, 80, 60]), (sequence, [80, 0, 0, 60])):
        view = augment(image)
        boxes = boxes_from_kornia(augment._params)
        assert boxes.tolist() == [expected] * 2
        torch.testing.assert_close(box_centres(boxes, (60, 80)), view.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("grids", GRID_PAIRS, ids=str)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("max_distance", [None, 0.7, 0.3])
def test_whole_rule_on_rendered_crops(
    grids: tuple[tuple[int, int], tuple[int, int]], align_corners: bool, max_distance: float | None
) -> None:
    """Two kornia views of the same images, flips and all; truth: argmin over all pairs of rendered cells."""
    places, cells, boxes = [], [], []
    for seed, grid in enumerate(grids):
        view, params = kornia_view(PIPELINES["crop, flips"], coordinates(6, 60, 80), seed, align_corners, "slice")
        place = numpy64(F.adaptive_avg_pool2d(view, grid))
        cells.append(np.hypot(place[:, 0, 0, 1] - place[:, 0, 0, 0], place[:, 1, 1, 0] - place[:, 1, 0, 0]))
        places.append(place.reshape(6, 2, -1))
        boxes.append(boxes_from_kornia(params, align_corners=align_corners))
    distance = np.linalg.norm(places[0][:, :, :, None] - places[1][:, :, None, :], axis=1)
    distance /= np.maximum(*cells)[:, None, None]
    nearest = distance.min(2)

    seen = location_correspondence(*boxes, *grids, max_distance=max_distance)
    np.testing.assert_allclose(-seen.score.numpy(), nearest, atol=1e-3)
    chosen = np.take_along_axis(distance, seen.index.numpy()[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(chosen, nearest, atol=1e-3)
    clear = np.sort(distance, 2)[:, :, 1] - nearest > 1e-3
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(seen.index.numpy()[clear], distance.argmin(2)[clear])
    if max_distance is None:
        assert seen.valid.all()
    else:
        clear = np.abs(nearest - max_distance) > 1e-3
        np.testing.assert_array_equal(seen.valid.numpy()[clear], (nearest <= max_distance)[clear])
        assert seen.valid.any()
        assert not seen.valid.all() or grids == GRID_PAIRS[-1]  # a fine key grid is never far


def kornia_crop(**changes: Any) -> dict[str, Any]:
    corners = torch.tensor([[[2.0, 1], [9, 1], [9, 4], [2, 4]]])
    fields = {"src": corners, "dst": corners, "batch_prob": torch.ones(1)}
    return fields | {"forward_input_shape": torch.tensor([1, 3, 10, 12])} | changes


@pytest.mark.parametrize(
    ("error", "params"),
    [
        (TypeError, None),
        (TypeError, []),
        (TypeError, [3]),
        (TypeError, "crop"),
        (TypeError, torch.ones(1, 4, 2)),
        (TypeError, {}),
        (TypeError, [("RandomCrop_0", None)]),
        (TypeError, [("RandomCrop_0", {"src": torch.ones(1, 4, 2)})]),
        (TypeError, kornia_crop(src=[[2, 1]])),
        (TypeError, kornia_crop(src=torch.ones(1, 4, 2, dtype=torch.complex64))),
        (TypeError, kornia_crop(dst=None)),
        (ValueError, kornia_crop(src=torch.ones(1, 4))),
        (ValueError, kornia_crop(dst=torch.ones(2, 4, 2))),
        (ValueError, kornia_crop(batch_prob=torch.ones(3))),
        (ValueError, kornia_crop(forward_input_shape=torch.tensor([3, 10, 12]))),
        (ValueError, kornia_crop(padding_size=torch.tensor([[0, 1, 0, 0]]))),
        *((ValueError, [(f"Random{name}_0", kornia_crop())]) for name in ("Affine", "Rotation90", "CutMixV2")),
    ],
)
def test_not_kornia_parameters(error: type[Exception], params: Any) -> None:
    with pytest.raises(error, match=r"^params.*: got .*expected"):
        boxes_from_kornia(params)


def test_kornia_refuses_what_is_no_box() -> None:
    """On what kornia itself keeps."""
    augmentation = pytest.importorskip("kornia.augmentation")
    for moved in (augmentation.RandomAffine(30.0), augmentation.RandomPerspective(), augmentation.PadTo((70, 90))):
        sequence = augmentation.AugmentationSequential(moved, data_keys=["input"])
        sequence(torch.rand(2, 3, 60, 80))
        with pytest.raises(ValueError, match="expected only crops, flips and resizes"):
            boxes_from_kornia(sequence._params)
    with pytest.raises(TypeError, match="align_corners: got 1, expected a bool"):
        boxes_from_kornia(kornia_crop(), align_corners=1)  # type: ignore[arg-type]


# ---- every rule under every option of the loss ----------------------------------------------------------------------

QUERY_GRID, KEY_GRID = (3, 4), (4, 3)
BOXES = (
    np.array([[0, 0, 24, 24], [4, 2, 28, 14], [10, 10, 22, 34]]),
    np.array([[8, 4, 20, 28], [3, 0, 30, 16], [0, 0, 9, 8]]),
)
FLIPS = np.array([False, True, True]), np.array([False, False, True])
FEATURE_RULES = {
    "nearest": {},
    "mutual": {"mutual": True},
    "min_score": {"min_score": 0.35},
    "mutual, min_score": {"mutual": True, "min_score": 0.35},
}


def features(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 8, *grid, generator=generator).double() for grid in (QUERY_GRID, KEY_GRID))  # type: ignore[return-value]


def rule(name: str, backend: str = "auto") -> tuple[Correspondence, oracle.Match]:
    """What the library finds by a rule, beside what the oracle finds."""
    maps, options = features(5), FEATURE_RULES.get(name, {})
    boxes, flips = map(torch.tensor, BOXES), [torch.tensor(flip) for flip in FLIPS]
    place = location_correspondence(*boxes, QUERY_GRID, KEY_GRID, query_flip=flips[0], key_flip=flips[1])
    true_place = oracle.location_match(BOXES, (QUERY_GRID, KEY_GRID), FLIPS, 0.7)  # type: ignore[arg-type]
    if name == "location":
        return place, true_place
    options = {"mutual": True} if name == "location and mutual" else options
    found = dense_correspondence(*maps, **options, backend=backend)
    truth = oracle.match(*map(flat64, maps), **options)
    if name == "location and mutual":
        found = found._replace(valid=found.valid & place.valid)
        truth = truth._replace(valid=truth.valid & true_place.valid)
    return found, truth


def loss_case(found: Correspondence, dtype: torch.dtype = torch.float64) -> Any:
    case = make_case(3, channels=5, query_grid=QUERY_GRID, key_grid=KEY_GRID, negatives=9, dtype=dtype)
    return replace(case, index=found.index, valid=found.valid)


@pytest.mark.parametrize("name", [*FEATURE_RULES, "location", "location and mutual"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_rule_under_every_option(name: str, reduction: str, backend: str) -> None:
    """weight, exclude and rank, one by one and together; loss, rank and every gradient against the oracle."""
    found, truth = rule(name, backend)
    np.testing.assert_array_equal(found.valid.numpy(), truth.valid)
    if name == "location":  # whose ties test_location judges
        np.testing.assert_allclose(found.score.numpy(), truth.score, atol=1e-6)
    else:
        np.testing.assert_array_equal(found.index.numpy(), truth.index)
    assert bool(found.valid.all()) == (name == "nearest")
    assert found.valid.any()
    weight = torch.rand(3, 12, dtype=torch.float64)
    weight[0, :5] = 0
    for options in ({}, {"weight": weight}, {"exclude": torch.tensor([2, 8, 0])}):
        check(backend, replace(loss_case(found), reduction=reduction, **options))
    check(backend, replace(loss_case(found), reduction=reduction, weight=weight, exclude=torch.tensor([2, 8, 0])))


def test_a_rule_in_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    from densecl_ops import _devices

    if not torch.cuda.is_available() and not _devices.interpreting():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    found, truth = rule("location and mutual")
    case = replace(loss_case(found, torch.float32), weight=torch.rand(3, 12), exclude=torch.tensor([2, 8, 0]))
    assert 0 < truth.valid.sum() < truth.valid.size
    check("triton", case, 5e-6)


# ---- the documentation ----------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "matching.md"


def test_the_page_on_matching_runs() -> None:
    """Its snippets, one after the other; an `assert` in them is the page's own claim."""
    pytest.importorskip("kornia")
    space: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, space)
    assert space["loss"].isfinite()
