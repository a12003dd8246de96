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
from torch.utils.data import default_collate

from densecl_ops.functional import (
    boxes_from_albumentations,
    boxes_from_kornia,
    boxes_from_matrix,
    boxes_from_torchvision,
    location_correspondence,
)

SMALL, LARGE = (24, 30), (112, 140)  # views


def coordinates(batch: int, height: int, width: int) -> Tensor:
    """(B, 2, H, W) images whose pixels hold the x and the y of their own centres."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y]).double().expand(batch, -1, -1, -1).clone()


def box_centres(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 2, H, W): where the cells of a box must lie if it says the truth."""
    fractions = coordinates(len(boxes), *grid) / torch.tensor(grid[::-1])[:, None, None]
    low, high = boxes.double().chunk(2, 1)
    return low[:, :, None, None] + (high - low)[:, :, None, None] * fractions


def off(view: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far, in pixels, the cells of a view are from where its box puts them."""
    return (F.adaptive_avg_pool2d(view.double(), grid) - box_centres(boxes, grid)).abs()


# ---- matrices -------------------------------------------------------------------------------------------------------


def test_matrices_rendered() -> None:
    """Random crops, mirrored or not, sampled where the inverse of the matrix says."""
    rng, size = np.random.default_rng(0), (12, 15)
    for _ in range(20):
        scale = rng.uniform(0.5, 3, 2) * rng.choice([-1, 1], 2)  # image pixels per pixel of the view
        low = rng.uniform(0, 1, 2) * (np.array([80, 60]) - 1 - np.abs(scale) * [14, 11])
        start = np.where(scale > 0, low, low + np.abs(scale) * [14, 11])  # centre of the view's first pixel
        matrix = [[1 / scale[0], 0, -start[0] / scale[0]], [0, 1 / scale[1], -start[1] / scale[1]]]
        y, x = np.mgrid[: size[0], : size[1]]
        where = np.stack([start[0] + scale[0] * x, start[1] + scale[1] * y], -1)
        grid = torch.tensor((2 * where + 1) / [80, 60] - 1)[None]
        view = F.grid_sample(coordinates(1, 60, 80), grid, align_corners=False)
        for form in (matrix, torch.tensor(matrix), np.array([[*matrix, [0, 0, 1]]])):
            boxes = boxes_from_matrix(form, size, image_size=(60, 80))
            assert (boxes.shape, boxes.dtype) == ((1, 4), torch.float32)
            assert off(view, boxes, (4, 5)).max() < 1e-5


IDENTITY = [[1.0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("error", "matrix", "options", "message"),
    [
        (TypeError, "crop", {}, "matrix: got str"),
        (ValueError, torch.ones(3), {}, r"matrix: got shape \(3,\)"),
        (ValueError, torch.zeros(2, 3), {}, "matrix: got a map that cannot be inverted"),
        (ValueError, [[1, 0.001, 0], [0, 1, 0]], {}, "matrix: got a map that is not upright"),
        (ValueError, [[0.0, 1, 0], [1, 0, 0]], {}, "matrix: got a map that is not upright"),
        (ValueError, [[float("nan"), 0, 0], [0, 1, 0]], {}, "matrix: got a map that is not upright"),
        (ValueError, [[1.0, 0, 2], [0, 1, 0]], {"image_size": (8, 8)}, "matrix: got a map that shows more than its"),
        (TypeError, IDENTITY, {"size": None}, "size: got None"),
        (ValueError, IDENTITY, {"size": 0}, "size: got 0"),
        (ValueError, IDENTITY, {"image_size": (8, 0)}, r"image_size: got \(8, 0\)"),
        (ValueError, IDENTITY, {"image_size": [(8, 8), (9, 9)]}, r"image_size: got \[\(8"),
    ],
)
def test_not_upright_matrices(error: type[Exception], matrix: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=f"^{message}.*expected"):
        boxes_from_matrix(matrix, **{"size": (8, 8), **options})


# ---- torchvision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [True, False])
def test_torchvision_crops_rendered(antialias: bool) -> None:
    """resized_crop is a slice and then F.interpolate; torchvision's own where it is installed.

    Antialiasing sees one side only of a pixel at the border of the crop, which moves its cell inwards a little.
    """
    image, grid = coordinates(1, 60, 80), (4, 7)
    for top, left, height, width in [(3, 5, 32, 40), (0, 0, 56, 57), (17, 20, 39, 48)]:
        crop = image[:, :, top : top + height, left : left + width]
        view = F.interpolate(crop, (28, 28), mode="bilinear", antialias=antialias, align_corners=False)
        boxes = boxes_from_torchvision((top, left, height, width), image_size=(60, 80))
        cells = off(view, boxes, grid) / torch.tensor([width / grid[1], height / grid[0]])[:, None, None]
        assert cells.max() < (0.01 if antialias else 1e-9)


def test_torchvision_v2() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    image = coordinates(1, 120, 160)
    for crop in (v2.RandomResizedCrop(SMALL, antialias=False), v2.RandomCrop((50, 60))):
        for _ in range(10):
            params = crop.make_params([image])
            boxes = boxes_from_torchvision(params, image_size=(120, 160))
            assert off(crop.transform(image, params), boxes, (1, 1)).max() < 1e-5
    with pytest.raises(ValueError, match="params: got needs_pad, expected"):
        boxes_from_torchvision(v2.RandomCrop((130, 130), pad_if_needed=True).make_params([image]))


ROWS = [(200, 150, 30, 120), (0, 1, 2, 3), (5, 6, 7, 8)]  # 150 + 120 leaves uint8
DICTS = [dict(zip(("top", "left", "height", "width"), row, strict=True)) for row in ROWS]


@pytest.mark.parametrize(
    "params",
    [
        ROWS,
        tuple(map(list, ROWS)),
        DICTS,
        default_collate(DICTS),
        torch.tensor(ROWS),
        torch.tensor(ROWS, dtype=torch.uint8),
        np.array(ROWS),
        default_collate(ROWS),
        torch.stack(default_collate(ROWS), 1),
        torch.tensor(ROWS).double().requires_grad_(),
        torch.tensor(ROWS).half(),
    ],
    ids=lambda params: type(params).__name__,
)
def test_forms_of_torchvision_parameters(params: Any) -> None:
    boxes = boxes_from_torchvision(params)
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[150, 200, 270, 230], [1, 0, 4, 2], [6, 5, 14, 12]]
    assert not boxes.requires_grad
    for one in (ROWS[0], DICTS[0], torch.tensor(ROWS[0])):
        with NoFloat64():
            boxes = boxes_from_torchvision(one, image_size=torch.tensor([230, 270]))
        assert boxes.tolist() == [[150, 200, 270, 230]]


def test_whatever_the_default_dtype_and_device(defaults: None) -> None:
    boxes = boxes_from_torchvision([(257.0, 3.5, 301, 100.25), (1, 2, 1025, 4)])
    assert (boxes.device.type, boxes.dtype) == ("cpu", torch.float32)
    assert boxes.tolist() == [[3.5, 257, 103.75, 558], [2, 1, 6, 1026]]
    assert boxes_from_torchvision(DICTS[0]).tolist() == [[150, 200, 270, 230]]
    assert boxes_from_matrix(IDENTITY, (5, 6), image_size=(5, 6)).tolist() == [[0, 0, 6, 5]]


@pytest.mark.parametrize(
    ("error", "params"),
    [
        (TypeError, None),
        (TypeError, {"top": 1}),
        (TypeError, {**DICTS[0], "top": "1"}),
        (TypeError, torch.ones(2, 4, dtype=torch.complex64)),
        (ValueError, torch.ones(4, 5)),
        (ValueError, [torch.ones(4)] * 4),  # four images or the four numbers: a guess would transpose one of the two
        (ValueError, (1, 2, 0, 4)),
        (ValueError, (1, 2, float("nan"), 4)),
        (ValueError, (24, 52, 88, 104)),  # crop_coords of albumentations: x first, corners
        (ValueError, (52, 24, 104, 88)),  # corners
        (ValueError, (0, -2, 8, 8)),
    ],
)
def test_not_torchvision_parameters(error: type[Exception], params: Any) -> None:
    with pytest.raises(error, match=r"^params: got .*expected"):
        boxes_from_torchvision(params, image_size=(110, 150))


# ---- DALI -----------------------------------------------------------------------------------------------------------


def test_dali_draws_are_those_of_torchvision() -> None:
    """Anchor and shape of random_crop_generator are (y, x) and (height, width), also those of random_resized_crop."""
    dali = pytest.importorskip("nvidia.dali")
    image = coordinates(1, 120, 160)[0].permute(1, 2, 0).float().contiguous()

    @dali.pipeline_def(batch_size=4, num_threads=1, device_id=None, seed=0)
    def pipeline() -> Any:
        images = dali.fn.external_source(lambda: [image.numpy()] * 4)
        anchor, shape = dali.fn.random_crop_generator(images.shape()[:2], seed=5)
        view = dali.fn.random_resized_crop(images, size=SMALL, seed=5, antialias=False)
        return anchor, shape, dali.fn.slice(images, anchor, shape, axes=(0, 1)), view

    run = pipeline()
    run.build()
    anchor, shape, cut, views = run.run()
    boxes = boxes_from_torchvision(
        torch.cat([torch.tensor(np.stack([np.array(x) for x in part])) for part in (anchor, shape)], 1), (120, 160)
    )
    for box, one, view in zip(boxes, cut, views, strict=True):
        one, view = (torch.tensor(np.array(x)).permute(2, 0, 1)[None] for x in (one, view))
        assert (one - box_centres(box[None], one.shape[2:])).abs().max() < 1e-9
        assert off(view, box[None], (4, 5))[..., 1:-1, 1:-1].max() < 1e-3


# ---- albumentations -------------------------------------------------------------------------------------------------


def step(name: str, applied: bool = True, **params: Any) -> dict[str, Any]:
    return {"__class_fullname__": name, "applied": applied, "params": params if applied else None}


def replay(*steps: dict[str, Any], kind: str = "ReplayCompose") -> dict[str, Any]:
    return {"__class_fullname__": kind, "applied": True, "params": None, "transforms": list(steps)}


CROPPED = step("RandomResizedCrop", shape=(120, 160, 3), interpolation=1, crop_coords=(24, 52, 88, 104))
FLIPPED = step("HorizontalFlip", shape=(24, 30, 3))


@pytest.mark.parametrize("nested", [False, True], ids=["albumentations 2.0.8", "albumentationsx 2.5.1"])
def test_recorded_replays(nested: bool) -> None:
    """As both versions write them, the second with one "params" more."""
    steps = [CROPPED, FLIPPED, step("VerticalFlip", applied=False), step("Resize", shape=(24, 30, 3))]
    steps.append(replay(step("CenterCrop", shape=(40, 50, 3), crop_coords=(0, 10, 25, 40)), kind="OneOf"))
    if nested:
        steps = [one if "transforms" in one else {**one, "params": {"params": one["params"] or {}}} for one in steps]
    assert boxes_from_albumentations(replay(*steps), (120, 160)).tolist() == [[88, 65, 56, 104]]
    assert boxes_from_albumentations(replay(), (120, 160)).tolist() == [[0, 0, 160, 120]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "replay: got NoneType, expected"),
        ({"image": 0, "replay": {}}, "replay: got dict, expected"),
        (replay(replay(CROPPED, kind="RandomOrder")), "replay: got a RandomOrder, whose order is not kept, expected"),
        (replay(CROPPED | {"params": {}}), "replay: got a RandomResizedCrop that keeps no shape, expected"),
        (replay(step("CenterCrop", shape=(120, 160), pad_params={}, crop_coords=(0, 0, 9, 9))), "padding, expected"),
        (replay(step("Crop", shape=(120, 160), crop_coords=(9, 0, 9, 9))), r"replay: got a Crop to \(9, 0, 9, 9\) of"),
        (replay(step("Crop", shape=(120, 160), crop_coords=(0, 0, 9, 121))), r"replay: got a Crop to .*121\) of"),
        (replay(FLIPPED), r"image_size: got \(120, 160\), expected \(24, 30\)"),
    ],
)
def test_not_replays(value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        boxes_from_albumentations(value, (120, 160))


def own(library: Any) -> Any:
    """A colour step of the user's, under its module's name in the replay."""
    return type("Mine", (library.ImageOnlyTransform,), {"apply": lambda self, img, **_: img})(p=1)


def composed(steps: Callable[[Any], list[Any]], seed: int) -> tuple[Tensor, dict[str, Any]]:
    library = pytest.importorskip("albumentations")
    compose = library.ReplayCompose(steps(library))
    compose.set_random_seed(seed)
    out = compose(image=(coordinates(1, 120, 160)[0] / 160).permute(1, 2, 0).float().numpy())  # noise clips at 1
    return 160 * torch.tensor(out["image"].copy()).permute(2, 0, 1)[None], out["replay"]


@pytest.mark.parametrize(
    "steps",
    [
        lambda a: [a.RandomResizedCrop(SMALL), a.HorizontalFlip(), a.VerticalFlip(), a.ColorJitter(p=0)],
        lambda a: [a.RandomResizedCrop(LARGE, scale=(0.3, 1)), a.HorizontalFlip(), a.GaussNoise((0, 0), p=1), own(a)],
        lambda a: [a.HorizontalFlip(), a.RandomCrop(56, 60), a.OneOf([a.RandomResizedCrop(SMALL), a.NoOp()], p=1)],
        lambda a: [a.Sequential([a.CenterCrop(100, 100), a.RandomScale(p=1)], p=1), a.RandomSizedCrop((40, 80), SMALL)],
    ],
)
def test_albumentations_rendered(steps: Callable[[Any], list[Any]]) -> None:
    """Enlarging repeats the outer half pixel of a crop; inside of it, cells lie where the box says."""
    for seed in range(10):
        view, kept = composed(steps, seed)
        boxes = boxes_from_albumentations(kept, (120, 160))
        grid = (4, 5) if view.shape[2] % 4 == view.shape[3] % 5 == 0 else (1, 1)
        assert off(view, boxes, grid).max() < 0.05


@pytest.mark.parametrize("name", ["Rotate", "Transpose", "D4", "PadIfNeeded", "ElasticTransform", "RandomGridShuffle"])
def test_albumentations_refuses_what_is_no_box(name: str) -> None:
    kept = composed(lambda a: [a.RandomResizedCrop(SMALL), getattr(a, name)(p=1)], 0)[1]
    with pytest.raises(ValueError, match=f"replay: got a {name}.*expected"):
        boxes_from_albumentations(kept, (120, 160))


# ---- kornia ---------------------------------------------------------------------------------------------------------

GRID_PAIRS = [((4, 5), (4, 5)), ((3, 5), (6, 2)), ((8, 3), (2, 15)), ((2, 2), (12, 10))]
PIPELINES = {
    "crop, flips": ("crop", "RandomHorizontalFlip", "RandomVerticalFlip", "RandomGaussianNoise"),
    "crop twice": ("RandomCrop", "crop", "RandomHorizontalFlip"),
    "centre, nested": ("CenterCrop", ("crop", "RandomHorizontalFlip")),
    "crop, resize": ("crop", "RandomHorizontalFlip", "Resize"),
}


def kornia_view(
    pipeline: Sequence[Any], image: Tensor, seed: int, align_corners: bool, mode: str
) -> tuple[Tensor, Tensor]:
    """The augmented image and its boxes, after noise of strength 0 where the pipeline has it."""
    kornia = pytest.importorskip("kornia")
    augmentation = kornia.augmentation

    def build(name: Any) -> Any:
        if isinstance(name, tuple):
            return augmentation.ImageSequential(*map(build, name))
        if name == "crop":
            options = {"align_corners": align_corners, "cropping_mode": mode, "ratio": (0.8, 1.6)}
            return augmentation.RandomResizedCrop(SMALL, scale=(0.4, 0.9), **options)
        if name == "Resize":
            return augmentation.Resize((2 * SMALL[0], 2 * SMALL[1]), align_corners=True)
        sizes = {"RandomCrop": ((58, 70),), "CenterCrop": ((56, 66),), "RandomGaussianNoise": (0.0, 0.0)}
        return getattr(augmentation, name)(*sizes.get(name, ()))

    torch.manual_seed(seed)
    augment = augmentation.AugmentationSequential(*map(build, pipeline), data_keys=["input"])
    view = augment(image)
    if not align_corners and kornia.__version__ < "0.9":
        with pytest.raises(ValueError, match=r"RandomResizedCrop with align_corners=False of kornia 0\."):
            boxes_from_kornia(augment)
        pytest.skip("kornia before 0.9 has the wrong matrix")
    return view, boxes_from_kornia(augment)


MODES = [("slice", True), ("slice", False), ("resample", True), ("resample", False)]


@pytest.mark.parametrize(
    ("name", "mode", "align_corners"),  # enlarging again repeats a border
    [(name, *mode) for name in PIPELINES for mode in MODES if not (name == "crop, resize" and mode == MODES[1])],
)
def test_kornia_crops_rendered(name: str, mode: str, align_corners: bool) -> None:
    """Centres of cells to a thousandth of a pixel."""
    view, boxes = kornia_view(PIPELINES[name], coordinates(6, 60, 80), 0, align_corners, mode)
    assert (boxes.shape, boxes.dtype) == ((6, 4), torch.float32)
    for grid in ((4, 5), (3, 10)):
        assert off(view, boxes, grid).max() < 1e-3


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


def test_steps_that_the_matrix_of_a_sequence_leaves_out() -> None:
    """A flip drawn more than once keeps its last record alone, and a crop with p=0 none: the call keeps every draw."""
    k = pytest.importorskip("kornia.augmentation")
    image = coordinates(6, 60, 80)
    for augment in (
        k.ImageSequential(k.RandomHorizontalFlip(), k.RandomVerticalFlip(), random_apply=5),
        k.AugmentationSequential(k.RandomHorizontalFlip(), k.RandomResizedCrop(SMALL, p=0.0), data_keys=["input"]),
    ):
        view = augment(image)
        torch.testing.assert_close(box_centres(boxes_from_kornia(augment), (60, 80)), view.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", ["RandAugment", "TrivialAugment", "AutoAugment"])
def test_policies(policy: str) -> None:
    """What a policy drew moves no pixels and leaves the box of the crop, or is refused."""
    k = pytest.importorskip("kornia.augmentation")
    crop = k.RandomResizedCrop(SMALL)
    drawn = {"RandAugment": {"n": 2, "m": 20}}.get(policy, {})
    augment = k.AugmentationSequential(crop, getattr(k.auto, policy)(**drawn), data_keys=["input"])
    refused = 0
    for seed in range(40):
        torch.manual_seed(seed)
        augment(torch.rand(2, 3, 60, 80))
        moved = any(f"'{x}'" in str(augment._params) for x in ("degrees", "translate_x", "translate_y", "shear_x"))
        try:
            boxes = boxes_from_kornia(augment)
        except ValueError as error:
            refused += 1
            assert any(x in str(error) for x in ("not upright", "more than its image"))  # noqa: PT017
        else:
            assert moved or torch.allclose(boxes, boxes_from_kornia(crop), atol=1e-4)
    assert 0 < refused < 40


NO_BOX: list[tuple[str, Callable[[Any], Any]]] = [
    ("RandomAffine, whose map is not upright", lambda k: k.RandomAffine(30.0, p=1.0)),
    ("Other, whose map is not upright", lambda k: type("Other", (k.RandomRotation,), {})(30.0, p=1.0)),
    ("RandomAffine, whose map shows more", lambda k: k.RandomAffine(0.0, scale=(0.5, 0.8), p=1.0)),
    ("RandomTranslate, whose map shows more", lambda k: k.RandomTranslate((0.1, 0.2), p=1.0)),
    ("RandomElasticTransform, which has no matrix", lambda k: k.RandomElasticTransform(p=1.0)),
    ("PadTo with padding", lambda k: k.PadTo((70, 90))),
    ("RandomCrop with padding", lambda k: k.RandomCrop((24, 30), padding=4)),
    ("RandomMixUpV2, which has no matrix", lambda k: k.RandomMixUpV2(p=1.0)),
    ("Identity, which has no matrix", lambda k: torch.nn.Identity()),
]


@pytest.mark.parametrize(("what", "make"), NO_BOX, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("place", ["first", "nested"])
def test_kornia_refuses_what_is_no_box(what: str, make: Callable[[Any], Any], place: str) -> None:
    """On what kornia itself drew; after a crop, the black border of a shift would lie inside the image."""
    k = pytest.importorskip("kornia.augmentation")
    augment = k.AugmentationSequential(make(k), data_keys=["input"])
    if place == "nested":
        crop = k.RandomResizedCrop((60, 80), scale=(0.1, 0.2))
        augment = k.AugmentationSequential(crop, k.ImageSequential(make(k)), data_keys=["input"])
    augment(torch.rand(2, 3, 60, 80))
    with pytest.raises(ValueError, match=f"augmentation: got {what}.*expected"):
        boxes_from_kornia(augment)


def test_kornia_refuses_videos_and_volumes() -> None:
    k = pytest.importorskip("kornia.augmentation")
    video = k.VideoSequential(k.RandomHorizontalFlip(), k.RandomResizedCrop(SMALL), data_format="BCTHW")
    for augment in (video, k.RandomHorizontalFlip3D()):
        augment(torch.rand(2, 3, 4, 60, 80))
        with pytest.raises(
            ValueError, match=r"augmentation: got RandomHorizontalFlip.* of videos or volumes, expected"
        ):
            boxes_from_kornia(augment)


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


@pytest.mark.parametrize("value", [None, "crop", torch.nn.Identity(), [], {}, [("RandomCrop_0", {})]])
def test_not_a_kornia_augmentation(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^augmentation: got .*expected"):
        boxes_from_kornia(value)
    crop = pytest.importorskip("kornia.augmentation").RandomResizedCrop(SMALL)
    with pytest.raises(ValueError, match="before its call, expected one after it"):
        boxes_from_kornia(crop)
    crop(torch.rand(2, 3, 60, 80))
    with pytest.raises(ValueError, match="expected the augmentation itself, after its call"):
        boxes_from_kornia(crop._params)
