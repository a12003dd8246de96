"""Boxes of crops, against brute force on rendered coordinates.

Rendered: each pixel of an image holds its own coordinates, the augmentation under test cuts and scales that image, and
average pooling reads back where every cell of the view lies. No formula of the library takes part.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NoFloat64, refused
from torch import Tensor
from torch.utils.data import default_collate

from densecl_ops.functional import (
    boxes_from_albumentations,
    boxes_from_kornia,
    boxes_from_matrix,
    boxes_from_torchvision,
)

SMALL = 24, 30  # view


def coordinates(batch: int, height: int, width: int) -> Tensor:
    """(B, 2, H, W) images whose pixels hold the x and the y of their own centres."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y]).double().expand(batch, -1, -1, -1).clone()


def off(view: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far, in pixels, the cells of a view are from where its box puts them."""
    fractions = coordinates(len(boxes), *grid) / torch.tensor(grid[::-1])[:, None, None]
    low, high = boxes.double()[:, :, None, None].chunk(2, 1)
    return (F.adaptive_avg_pool2d(view.double(), grid) - low - (high - low) * fractions).abs()


def test_matrices() -> None:
    """Of random crops, mirrored or not: from centres of pixels to centres of pixels."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        (x0, x1), (y0, y1) = rng.uniform(1, 79, 2), rng.uniform(1, 59, 2)
        wide, high = (x1 - x0) / 15, (y1 - y0) / 12  # image pixels per pixel of the view
        matrix = np.linalg.inv([[wide, 0, x0 + wide / 2 - 0.5], [0, high, y0 + high / 2 - 0.5], [0, 0, 1]])
        for form in (matrix, torch.tensor(matrix), matrix[:2].tolist()):
            boxes = boxes_from_matrix(form, (12, 15), image_size=(60, 80))
            assert boxes.dtype == torch.float32
            np.testing.assert_allclose(boxes.numpy(), [[x0, y0, x1, y1]], atol=1e-5)


def test_torchvision_rendered() -> None:
    """Antialiasing sees one side only of a pixel at the border of the crop, which moves its cell inwards a little."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    image = coordinates(1, 120, 160)
    resized = [v2.RandomResizedCrop(SMALL, antialias=antialias) for antialias in (False, True)]
    for crop, tolerance in 10 * [(resized[0], 1e-5), (resized[1], 0.05), (v2.RandomCrop((50, 60)), 1e-5)]:
        params = crop.make_params([image])
        boxes = boxes_from_torchvision(params, image_size=(120, 160))
        assert off(crop.transform(image, params), boxes, (1, 1)).max() < tolerance


ROWS = [(200, 150, 30, 120), (0, 1, 2, 3), (5, 6, 7, 8)]  # 150 + 120 leaves uint8
DICTS = [dict(zip(("top", "left", "height", "width"), row, strict=True)) for row in ROWS]


def test_forms_of_torchvision_parameters() -> None:
    small, reals = torch.tensor(ROWS, dtype=torch.uint8), torch.tensor(ROWS).double().requires_grad_()
    tuples = ROWS, tuple(map(list, ROWS)), DICTS, default_collate(ROWS), default_collate(DICTS)
    for params in (*tuples, np.array(ROWS), small, reals, reals.half()):
        boxes = boxes_from_torchvision(params, image_size=(230, 270))
        assert (boxes.dtype, boxes.requires_grad) == (torch.float32, False)
        assert boxes.tolist() == [[150, 200, 270, 230], [1, 0, 4, 2], [6, 5, 14, 12]]
    for one in (ROWS[0], DICTS[0], torch.tensor(ROWS[0])):
        with NoFloat64():
            boxes = boxes_from_torchvision(one, image_size=torch.tensor([230, 270]))
        assert boxes.tolist() == [[150, 200, 270, 230]]


def test_dali_draws_are_those_of_torchvision() -> None:
    """Anchor and shape of random_crop_generator are (y, x) and (height, width), also those of random_resized_crop."""
    dali = pytest.importorskip("nvidia.dali")
    image = coordinates(1, 120, 160)[0].permute(1, 2, 0).float().contiguous()

    @dali.pipeline_def(batch_size=4, num_threads=1, device_id=None, seed=0)
    def pipeline() -> Any:
        images = dali.fn.external_source(lambda: [image.numpy()] * 4)
        anchor, shape = dali.fn.random_crop_generator(images.shape()[:2], seed=5)
        return anchor, shape, dali.fn.random_resized_crop(images, size=SMALL, seed=5, antialias=False)

    run = pipeline()
    run.build()
    anchor, shape, views = (torch.tensor(np.stack([np.array(x) for x in part])) for part in run.run())
    boxes = boxes_from_torchvision(torch.cat([anchor, shape], 1), (120, 160))
    assert off(views.permute(0, 3, 1, 2), boxes, (4, 5))[..., 1:-1, 1:-1].max() < 1e-3


def step(name: str, applied: bool = True, **params: Any) -> dict[str, Any]:
    return {"__class_fullname__": name, "applied": applied, "params": params if applied else None}


def replay(*steps: dict[str, Any], kind: str = "ReplayCompose") -> dict[str, Any]:
    return {"__class_fullname__": kind, "applied": True, "params": None, "transforms": list(steps)}


CROPPED = step("RandomResizedCrop", shape=(120, 160, 3), interpolation=1, crop_coords=(24, 52, 88, 104))
FLIPPED = step("HorizontalFlip", shape=(24, 30, 3))
DROPPED = CROPPED | {"applied": False, "params": None, "p": 1.0}  # of ReplayCompose.replay


def test_recorded_replays() -> None:
    """As albumentations 2.0.8 writes them, and albumentationsx 2.5.1 with one "params" more."""
    steps = [CROPPED, FLIPPED, step("VerticalFlip", applied=False), step("Resize", shape=(24, 30, 3))]
    last = replay(step("CenterCrop", shape=(40, 50, 3), crop_coords=(0, 10, 25, 40)), kind="OneOf")
    nested = [{**one, "params": {"params": one["params"] or {}}} for one in steps]
    for recorded in (replay(*steps, last), replay(*nested, last)):
        assert boxes_from_albumentations(recorded, (120, 160)).tolist() == [[88, 65, 56, 104]]
    missed = {"applied": False, "p": 1.0}  # a group that is always entered, none of whose steps was drawn
    for recorded in (replay(), replay(replay(step("HorizontalFlip", False), kind="Sequential") | missed) | missed):
        assert boxes_from_albumentations(recorded, (120, 160)).tolist() == [[0, 0, 160, 120]]


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
        lambda a: [a.RandomResizedCrop((112, 140), scale=(0.3, 1)), a.HorizontalFlip(), a.GaussNoise((0, 0), p=1)],
        lambda a: [a.HorizontalFlip(), a.RandomCrop(56, 60), a.OneOf([a.RandomResizedCrop(SMALL), a.NoOp()], p=1)],
        # A colour step of the user's, under its module's name in the replay.
        lambda a: [type("Mine", (a.ImageOnlyTransform,), {"apply": lambda self, img, **_: img})(p=1)],
        lambda a: [a.Sequential([a.CenterCrop(100, 100), a.RandomScale(p=1)], p=1), a.RandomSizedCrop((40, 80), SMALL)],
    ],
)
def test_albumentations_rendered(steps: Callable[[Any], list[Any]]) -> None:
    """Enlarging repeats the outer half pixel of a crop; inside of it, cells lie where the box says."""
    for seed in range(10):
        view, kept = composed(steps, seed)
        grid = (4, 5) if view.shape[2] % 4 == view.shape[3] % 5 == 0 else (1, 1)
        assert off(view, boxes_from_albumentations(kept, (120, 160)), grid).max() < 0.05


@pytest.mark.parametrize("name", ["Rotate", "Transpose", "D4", "PadIfNeeded", "ElasticTransform", "RandomGridShuffle"])
def test_albumentations_refuses_what_is_no_box(name: str) -> None:
    kept = composed(lambda a: [a.RandomResizedCrop(SMALL), getattr(a, name)(p=1)], 0)[1]
    refused(lambda: boxes_from_albumentations(kept, (120, 160)), f"got a {name}")


PIPELINES: list[Callable[[Any, Any], list[Any]]] = [
    lambda k, crop: [crop(), k.RandomHorizontalFlip(), k.RandomVerticalFlip(), k.RandomGaussianNoise(0.0, 0.0)],
    lambda k, crop: [k.RandomCrop((58, 70)), crop(), k.RandomHorizontalFlip(), crop(p=0.0)],
    lambda k, crop: [k.CenterCrop((56, 66)), k.ImageSequential(crop(), k.RandomHorizontalFlip())],
    lambda k, crop: [crop(), k.RandomHorizontalFlip(), k.Resize((12, 20), align_corners=True)],
    # A flip that is drawn more than once: its own record is the last one alone.
    lambda k, crop: [k.ImageSequential(k.RandomHorizontalFlip(), k.RandomVerticalFlip(), random_apply=5), crop()],
    lambda k, crop: [crop(), k.auto.RandAugment(n=1, m=1, policy=[[("rotate", 0.0, 0.0)]])],
]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("mode", ["slice", "resample"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_kornia_crops_rendered(pipeline: Callable[[Any, Any], list[Any]], mode: str, align_corners: bool) -> None:
    """Centres of cells to a thousandth of a pixel."""
    kornia = pytest.importorskip("kornia")
    options = {"align_corners": align_corners, "cropping_mode": mode, "ratio": (0.8, 1.6), "scale": (0.4, 0.9)}
    crop = partial(kornia.augmentation.RandomResizedCrop, SMALL, **options)
    augment = kornia.augmentation.AugmentationSequential(*pipeline(kornia.augmentation, crop), data_keys=["input"])
    view = augment(coordinates(6, 60, 80))
    if not align_corners and kornia.__version__ < "0.9":  # its matrix is wrong
        refused(lambda: boxes_from_kornia(augment), "align_corners=False of kornia 0.")
        return
    boxes = boxes_from_kornia(augment)
    assert (boxes.shape, boxes.dtype) == ((6, 4), torch.float32)
    for grid in ((4, 5), (3, 10)):
        assert off(view, boxes, grid).max() < 1e-3


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("RandomAffine, whose map is not upright", lambda k: k.RandomAffine(30.0, p=1.0)),
        ("RandomRotation, whose", lambda k: k.auto.RandAugment(n=1, m=9, policy=[[("rotate", -30.0, 30.0)]])),
        ("RandomAffine, whose map shows more", lambda k: k.RandomAffine(0.0, scale=(0.5, 0.8), p=1.0)),
        ("RandomTranslate, whose map shows more", lambda k: k.RandomTranslate((0.1, 0.2), p=1.0)),
        ("RandomElasticTransform, which has no matrix", lambda k: k.RandomElasticTransform(p=1.0)),
        ("PadTo with padding", lambda k: k.PadTo((70, 90))),
        ("RandomCrop with padding", lambda k: k.RandomCrop((24, 30), padding=4)),
        ("Identity, which has no matrix", lambda k: torch.nn.Identity()),
        ("RandomHorizontalFlip of videos", lambda k: k.VideoSequential(k.RandomHorizontalFlip(), data_format="BCTHW")),
        ("RandomHorizontalFlip3D of videos", lambda k: k.RandomHorizontalFlip3D()),
    ],
)
@pytest.mark.parametrize("place", ["first", "nested"])
def test_kornia_refuses_what_is_no_box(what: str, make: Callable[[Any], Any], place: str) -> None:
    """On what kornia itself drew; after a crop, the black border of a shift would lie inside the image."""
    k = pytest.importorskip("kornia.augmentation")
    videos = what.endswith("videos")
    augment = make(k) if videos else k.AugmentationSequential(make(k), data_keys=["input"])
    if place == "nested" and not videos:
        crop = k.RandomResizedCrop((60, 80), scale=(0.1, 0.2))
        augment = k.AugmentationSequential(crop, k.ImageSequential(make(k)), data_keys=["input"])
    augment(torch.rand(2, 3, *((4, 60, 80) if videos else (60, 80))))
    refused(lambda: boxes_from_kornia(augment), f"got {what}")


IDENTITY = [[1.0, 0, 0], [0, 1, 0]]


def test_inference_mode_and_other_defaults(defaults: None) -> None:
    """The default dtype and device of the reader do not count."""
    k = pytest.importorskip("kornia.augmentation")
    augment = k.AugmentationSequential(k.CenterCrop((30, 40)), k.RandomVerticalFlip(p=1.0), data_keys=["input"])
    with torch.inference_mode(), torch.device("cpu"):
        augment(torch.rand(2, 3, 620, 800, dtype=torch.float32))
    for boxes, expected in (
        (boxes_from_kornia(augment), [[380, 325, 420, 295]] * 2),
        (boxes_from_torchvision((257.0, 3.5, 301, 100.25)), [[3.5, 257, 103.75, 558]]),
        (boxes_from_torchvision(DICTS[0]), [[150, 200, 270, 230]]),
        (boxes_from_matrix(IDENTITY, (5, 6), image_size=(5, 6)), [[0, 0, 6, 5]]),
        (boxes_from_albumentations(replay(CROPPED), (120, 160)), [[24, 52, 88, 104]]),
    ):
        assert (boxes.dtype, boxes.device.type) == (torch.float32, "cpu")
        assert boxes.tolist() == expected


matrix = partial(boxes_from_matrix, size=8)
torchvision = partial(boxes_from_torchvision, image_size=(110, 150))
albumentations = partial(boxes_from_albumentations, image_size=(120, 160))


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (torchvision, None, "params: got NoneType"),
        (torchvision, {**DICTS[0], "top": "1"}, "params: got dict"),
        (torchvision, {**DICTS[0], "needs_pad": torch.tensor([False, True])}, "params: got needs_pad"),
        (torchvision, torch.ones(2, 4, dtype=torch.complex64), "params: got dtype torch.complex64"),
        (torchvision, torch.ones(4, 5), "params: got shape (4, 5)"),
        (torchvision, [torch.ones(4)] * 4, "params: got four (4,) tensors"),  # a guess would transpose one of two
        (torchvision, [(1, 2, 3, 0), (1, 2, float("nan"), 4)], "params: got a height or width of 0 or less"),
        (torchvision, (24, 52, 88, 104), "params: got the box"),  # crop_coords of albumentations: x first, corners
        (torchvision, (0, -2, 8, 8), "params: got the box"),
        (matrix, "crop", "matrix: got str"),
        (matrix, torch.ones(3), "matrix: got shape (3,)"),
        (matrix, torch.zeros(2, 3), "matrix: got a map that cannot be inverted"),
        (matrix, [[1, 0.001, 0], [0, 1, 0]], "matrix: got a map that is not upright"),
        (matrix, [[0.0, 1, 0], [1, 0, 0]], "matrix: got a map that is not upright"),
        (matrix, [[float("nan"), 0, 0], [0, 1, 0]], "matrix: got a map that is not upright"),
        (partial(matrix, image_size=(8, 8)), [[1.0, 0, 2], [0, 1, 0]], "matrix: got a map that shows"),
        (partial(matrix, size=None), IDENTITY, "size: got None"),
        (partial(matrix, image_size=(8, 0)), IDENTITY, "image_size: got (8, 0)"),
        (partial(matrix, image_size=[(8, 8), (9, 9)]), IDENTITY, "image_size: got [(8"),
        (albumentations, {"image": 0, "replay": {}}, "replay: got dict"),
        (albumentations, replay(replay(CROPPED, kind="RandomOrder")), "replay: got a RandomOrder, whose order"),
        (albumentations, replay(CROPPED | {"params": {}}), "replay: got a RandomResizedCrop that keeps no shape"),
        (albumentations, replay(step("CenterCrop", shape=(120, 160), pad_params={})), "replay: got a CenterCrop with"),
        (albumentations, replay(step("Crop", shape=(120, 160), crop_coords=(9, 0, 9, 9))), "replay: got a Crop to (9,"),
        (albumentations, replay(step("Crop", shape=(120, 160), crop_coords=(0, 0, 9, 121))), "replay: got a Crop to"),
        (albumentations, replay(DROPPED) | {"applied": False, "p": 1.0}, "replay: got one that applied nothing"),
        (albumentations, replay(FLIPPED), "image_size: got (120, 160), expected (24, 30)"),
        (boxes_from_kornia, [("RandomCrop_0", {})], "augmentation: got list, expected the kornia"),
        (boxes_from_kornia, SimpleNamespace(_params=[]), "augmentation: got SimpleNamespace before its call"),
    ],
)
def test_refusals(read: Callable[[Any], Tensor], value: Any, message: str) -> None:
    refused(lambda: read(value), message)
