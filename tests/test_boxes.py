"""Boxes of crops, and matching by place with them, against brute force on rendered coordinates.

Rendered: each pixel of an image holds its own coordinates, the augmentation under test cuts and scales that image, and
average pooling reads back where every cell of the view lies. No formula of the library takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NoFloat64, numpy64
from torch import Tensor

from densecl_ops.functional import boxes_from_kornia, boxes_from_torchvision, location_correspondence


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
        lambda rows: torch.stack(torch.utils.data.default_collate(rows), 1),
        lambda rows: torch.tensor(rows).double().requires_grad_(),
        lambda rows: torch.tensor(rows).half(),
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


def test_four_tensors_of_four() -> None:
    """Four images or the four numbers: a guess would transpose one of the two. Stacked, they are told apart."""
    rows = [(20, 10, 30, 40), (0, 1, 2, 3), (5, 6, 7, 8), (9, 10, 11, 12)]
    images, columns = [torch.tensor(row) for row in rows], torch.utils.data.default_collate(rows)
    for params in (images, columns, tuple(columns)):
        with pytest.raises(ValueError, match=r"torch.stack\(params\) of images, torch.stack\(params, 1\) of what"):
            boxes_from_torchvision(params)
    expected = boxes_from_torchvision(rows)
    assert torch.equal(boxes_from_torchvision(torch.stack(images)), expected)
    assert torch.equal(boxes_from_torchvision(torch.stack(columns, 1)), expected)


def test_whatever_the_default_dtype_and_device(defaults: None) -> None:
    boxes = boxes_from_torchvision([(257.0, 3.5, 301, 100.25), (1, 2, 1025, 4)])
    assert boxes.device.type == "cpu"
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[3.5, 257, 103.75, 558], [2, 1, 6, 1026]]
    assert boxes_from_torchvision((257, 3, 301, 100)).tolist() == [[3, 257, 103, 558]]


def test_on_a_device_without_float64() -> None:
    rows = [(257, 3, 301, 100), (1, 2, 1025, 4)]
    with NoFloat64():
        for params in (rows, torch.tensor(rows), torch.tensor(rows).float(), torch.utils.data.default_collate(rows)):
            assert boxes_from_torchvision(params).tolist() == [[3, 257, 103, 558], [2, 1, 6, 1026]]
        assert boxes_from_torchvision((1.5, 2.0, 3.0, 4.0)).tolist() == [[2, 1.5, 6, 4.5]]


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
) -> tuple[Tensor, Tensor]:
    """The augmented image and its boxes, after noise of strength 0 where the pipeline has it."""
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
    view = augment(image)
    if not align_corners and is_old():
        with pytest.raises(ValueError, match=r"RandomResizedCrop with align_corners=False of kornia 0\."):
            boxes_from_kornia(augment)
        pytest.skip("kornia before 0.9 has the wrong matrix")
    return view, boxes_from_kornia(augment)


def is_old() -> bool:
    import kornia

    return kornia.__version__ < "0.9"


MODES = [("slice", True), ("slice", False), ("resample", True), ("resample", False)]


@pytest.mark.parametrize(
    ("name", "mode", "align_corners"),  # enlarging again repeats a border, which the next test measures
    [(name, *mode) for name in PIPELINES for mode in MODES if not (name == "crop, resize" and mode == MODES[1])],
)
def test_kornia_crops_rendered(name: str, mode: str, align_corners: bool) -> None:
    """Centres of cells to a thousandth of a pixel."""
    pipeline = PIPELINES[name]
    view, boxes = kornia_view(pipeline, coordinates(6, 60, 80), 0, align_corners, mode)
    assert (boxes.shape, boxes.dtype) == ((6, 4), torch.float32)
    for grid in ((4, 5), (3, 10)):
        off = F.adaptive_avg_pool2d(view, grid) - box_centres(boxes, grid)
        assert off.abs().max() < 1e-3


def test_kornia_crop_scaled_up_rendered() -> None:
    """Between pixel edges, a view repeats the outer half pixel of the crop: 1/8 pixel over its outer cells."""
    augmentation = pytest.importorskip("kornia.augmentation")
    if is_old():
        pytest.skip("kornia before 0.9 has the wrong matrix")
    crop = augmentation.RandomResizedCrop((60, 60), scale=(0.02, 0.04), align_corners=False)
    view, grid = crop(coordinates(8, 60, 80)), (5, 5)
    boxes = boxes_from_kornia(crop)
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
        boxes = boxes_from_kornia(augment)
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
        view, box = kornia_view(PIPELINES["crop, flips"], coordinates(6, 60, 80), seed, align_corners, "slice")
        place = numpy64(F.adaptive_avg_pool2d(view, grid))
        cells.append(np.hypot(place[:, 0, 0, 1] - place[:, 0, 0, 0], place[:, 1, 1, 0] - place[:, 1, 0, 0]))
        places.append(place.reshape(6, 2, -1))
        boxes.append(box)
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


def test_a_flip_drawn_more_than_once() -> None:
    """Its own record is that of the last time; the draws of the whole call are those of every time."""
    augmentation = pytest.importorskip("kornia.augmentation")
    flips = augmentation.RandomHorizontalFlip(), augmentation.RandomVerticalFlip()
    augment = augmentation.ImageSequential(*flips, random_apply=5)
    image = coordinates(6, 60, 80)
    view = augment(image)
    torch.testing.assert_close(box_centres(boxes_from_kornia(augment), (60, 80)), view, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", ["RandAugment", "TrivialAugment", "AutoAugment"])
def test_policies(policy: str) -> None:
    """What a policy drew moves no pixels and leaves the box of the crop, or is refused."""
    k = pytest.importorskip("kornia.augmentation")
    crop = k.RandomResizedCrop(SIZE)
    drawn = {"RandAugment": {"n": 2, "m": 20}}.get(policy, {})
    augment = k.AugmentationSequential(crop, getattr(k.auto, policy)(**drawn), data_keys=["input"])
    refused = 0
    for seed in range(40):
        torch.manual_seed(seed)
        augment(torch.rand(2, 3, 60, 80))
        names = str(augment._params)
        if any(name in names for name in ("'degrees'", "'translate_x'", "'translate_y'", "'shear_x'", "'shear_y'")):
            try:
                boxes_from_kornia(augment)
            except ValueError as error:
                refused += 1
                assert any(x in str(error) for x in ("not upright", "more than its input"))  # noqa: PT017
                continue
        # Before 0.9 a shift by a tenth of the image is one by a tenth of a pixel.
        near = 0.3 if is_old() else 0.0
        torch.testing.assert_close(boxes_from_kornia(augment), boxes_from_kornia(crop), atol=near, rtol=0)
    assert 0 < refused < 40


def turn(module: Any) -> Any:
    """A rotation under another name."""
    return type("RandomSomething", (module.RandomRotation,), {})(30.0, p=1.0)


NO_BOX: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "affine": ("RandomAffine, whose map is not upright", lambda k: k.RandomAffine(30.0, p=1.0)),
    "perspective": ("RandomPerspective, whose map is not upright", lambda k: k.RandomPerspective(p=1.0)),
    "another name": ("RandomSomething, whose map is not upright", turn),
    "quarter turn": ("RandomRotation90, whose map is not upright", lambda k: k.RandomRotation90((1, 1), p=1.0)),
    "zoom out": ("RandomAffine, which shows more", lambda k: k.RandomAffine(0.0, scale=(0.5, 0.8), p=1.0)),
    "shift": ("RandomTranslate, which shows more", lambda k: k.RandomTranslate((0.1, 0.2), p=1.0)),
    "elastic": ("RandomElasticTransform, which has no matrix", lambda k: k.RandomElasticTransform(p=1.0)),
    "spline": ("RandomThinPlateSpline, which has no matrix", lambda k: k.RandomThinPlateSpline(p=1.0)),
    "pad to": ("PadTo with padding", lambda k: k.PadTo((70, 90))),
    "pad": ("RandomCrop with padding", lambda k: k.RandomCrop((24, 30), padding=4)),
    "mix up": ("RandomMixUpV2, which has no matrix", lambda k: k.RandomMixUpV2(p=1.0)),
    "cut mix": ("RandomCutMixV2, which has no matrix", lambda k: k.RandomCutMixV2(p=1.0)),
    "jigsaw": ("RandomJigsaw, which has no matrix", lambda k: k.RandomJigsaw(p=1.0)),
    "patches": (
        "PatchSequential, which has no matrix",
        lambda k: k.PatchSequential(k.RandomHorizontalFlip(), grid_size=(2, 2), patchwise_apply=False),
    ),
    "no record": ("Identity, which has no matrix", lambda k: torch.nn.Identity()),
}


@pytest.mark.parametrize("name", NO_BOX)
@pytest.mark.parametrize("place", ["first", "nested"])
def test_kornia_refuses_what_is_no_box(name: str, place: str) -> None:
    """On what kornia itself drew; after a crop, the black border of a shift would lie inside the image."""
    k = pytest.importorskip("kornia.augmentation")
    what, make = NO_BOX[name]
    if name == "patches" and is_old():
        pytest.skip("kornia before 0.9 cannot run patches in an AugmentationSequential")
    augment = k.AugmentationSequential(make(k), data_keys=["input"])
    if place == "nested":
        crop = k.RandomResizedCrop((60, 80), scale=(0.1, 0.2))
        augment = k.AugmentationSequential(crop, k.ImageSequential(make(k)), data_keys=["input"])
    augment(torch.rand(2, 3, 60, 80))
    if is_old():
        what = what.split(",")[0]  # of some it says that align_corners is False
    with pytest.raises(ValueError, match=f"augmentation: got {what}.*expected"):
        boxes_from_kornia(augment)


def test_kornia_refuses_videos_and_volumes() -> None:
    k = pytest.importorskip("kornia.augmentation")
    video = k.VideoSequential(k.RandomHorizontalFlip(), k.RandomResizedCrop(SIZE), data_format="BCTHW")
    for augment in (video, k.RandomHorizontalFlip3D()):
        augment(torch.rand(2, 3, 4, 60, 80))
        with pytest.raises(
            ValueError, match=r"augmentation: got RandomHorizontalFlip.* of videos or volumes, expected"
        ):
            boxes_from_kornia(augment)


@pytest.mark.parametrize(
    "name", ["ColorJitter", "RandomGrayscale", "RandomGaussianBlur", "RandomSolarize", "RandomErasing", "Normalize"]
)
def test_kornia_without_moved_pixels(name: str) -> None:
    k = pytest.importorskip("kornia.augmentation")
    options = {"RandomGaussianBlur": ((3, 3), (0.1, 2.0)), "Normalize": (torch.zeros(3), torch.ones(3))}
    crop = k.RandomResizedCrop(SIZE)
    augment = k.AugmentationSequential(crop, getattr(k, name)(*options.get(name, ()), p=1.0), data_keys=["input"])
    augment(torch.rand(2, 3, 60, 80))
    assert torch.equal(boxes_from_kornia(augment), boxes_from_kornia(crop))


def test_kornia_under_inference_mode_and_other_defaults(defaults: None) -> None:
    """What was drawn under inference_mode; the default dtype and device of the reader do not count."""
    k = pytest.importorskip("kornia.augmentation")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with torch.inference_mode(), torch.device("cpu"):
        flip = k.RandomVerticalFlip(p=1.0)
        augment = k.AugmentationSequential(k.CenterCrop((30, 40)), flip, data_keys=["input"])
        augment(torch.rand(2, 3, 620, 800))
    torch.set_default_dtype(before)
    boxes = boxes_from_kornia(augment)
    assert (boxes.dtype, boxes.device.type) == (torch.float32, "cpu")
    assert boxes.tolist() == [[380, 325, 420, 295]] * 2


def test_kornia_before_0_9(monkeypatch: pytest.MonkeyPatch) -> None:
    kornia = pytest.importorskip("kornia")
    crop = kornia.augmentation.RandomResizedCrop(SIZE, align_corners=False)
    crop(torch.rand(2, 3, 60, 80))
    monkeypatch.setattr(kornia, "__version__", "0.8.3")
    with pytest.raises(ValueError, match=r"RandomResizedCrop with align_corners=False of kornia 0.8.3, expected"):
        boxes_from_kornia(crop)


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (TypeError, None),
        (TypeError, "crop"),
        (TypeError, torch.ones(1, 4, 2)),
        (TypeError, torch.nn.Identity()),
        (ValueError, []),
        (ValueError, {}),
        (ValueError, [("RandomCrop_0", {"src": torch.ones(1, 4, 2)})]),
    ],
)
def test_not_a_kornia_augmentation(error: type[Exception], value: Any) -> None:
    with pytest.raises(error, match=r"^augmentation: got .*expected"):
        boxes_from_kornia(value)


def test_kornia_before_a_call_and_its_parameters() -> None:
    k = pytest.importorskip("kornia.augmentation")
    crop = k.RandomResizedCrop(SIZE)
    for augment in (crop, k.AugmentationSequential(crop, data_keys=["input"])):
        with pytest.raises(ValueError, match="before its call, expected one after it"):
            boxes_from_kornia(augment)
        augment(torch.rand(2, 3, 60, 80))
        with pytest.raises(ValueError, match="expected the augmentation itself, after its call"):
            boxes_from_kornia(augment._params)
