"""CamVid's annotated frames, and the photographs that every arm is pre-trained on."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
VOID = len(CLASSES)  # the label of pixels that no task counts
SUFFIXES = {".jpg", ".jpeg", ".png"}
SHORT_SIDE = 360  # pixels; larger photographs are scaled down to it once, smaller ones stay as they are


class Frames(NamedTuple):
    """One split of CamVid.

    Attributes:
        names: Sequence and number of every frame, such as "0001TP_008550"; sorted.
        images: (N, 3, H, W) uint8.
        truth: (N, H, W) uint8, a class or VOID.
    """

    names: list[str]
    images: Tensor
    truth: Tensor


def load_split(folder: Path, split: str) -> Frames:
    """Reads `folder`/`split` (images) and `folder`/`split`annot (labels)."""
    paths = _images_in(folder / split)
    labels = [folder / f"{split}annot" / f"{path.stem}.png" for path in paths]
    images = torch.stack([_rgb(Image.open(path)) for path in paths])
    truth = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in labels])
    if truth.shape != (len(images), *images.shape[2:]) or int(truth.max()) > VOID:
        raise ValueError(f"{folder}: labels of {split} are {tuple(truth.shape)}, at most {int(truth.max())}")
    return Frames([path.stem for path in paths], images, truth)


def load_photographs(folder: Path) -> list[Tensor]:
    """(3, H, W) uint8 images below `folder`, in the order of their names."""
    images = map(Image.open, _images_in(folder))
    return [_rgb(ImageOps.scale(image, min(1.0, SHORT_SIDE / min(image.size)))) for image in images]


def _images_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder}: no image found; docs/dense-tasks.md says where the data come from")
    return paths


def _rgb(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def cell_counts(truth: Tensor, stride: int) -> Tensor:
    """(N, H / stride, W / stride, CLASSES + 1) how many pixels of each cell bear each label, VOID last; float32."""
    height, width = (side // stride * stride for side in truth.shape[1:])
    shape = (len(truth), height // stride, stride, width // stride, stride)
    cells = truth[:, :height, :width].reshape(shape)
    return torch.stack([(cells == label).sum((2, 4)) for label in range(VOID + 1)], -1).float()


def consecutive(names: list[str]) -> list[tuple[int, int]]:
    """Pairs of neighbours (previous, current) of one sequence, as close together as its closest are."""
    places = [re.findall(r"(.+_[a-z]*)(\d+)", name)[0] for name in names]
    gaps = [
        (i, sequence, int(other) - int(number))
        for i, ((sequence, number), (following, other)) in enumerate(itertools.pairwise(places))
        if sequence == following
    ]
    closest = {sequence: min(gap for _, own, gap in gaps if own == sequence) for _, sequence, _ in gaps}
    return [(i, i + 1) for i, sequence, gap in gaps if gap == closest[sequence]]
