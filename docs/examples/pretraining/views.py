"""Photographs, and two augmented views of random parts of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from kornia.filters import gaussian_blur2d
from PIL import Image, ImageOps
from torch import Tensor

# The photographs that lie inside the scikit-image wheel. Its stereo pair is kept for the evaluation.
BUILT_IN = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket"),
)
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SMALLEST, SHORT_SIDE = 32, 384  # shorter photographs are skipped, larger ones scaled down once: 0.6 MB each in memory
WINDOW = 96  # side of the part of a photograph that two views share
VIEW = 64  # side of a view


def load_photographs(folder: Path | None) -> list[Tensor]:
    """(3, H, W) uint8 photographs below `folder`, or the built-in ones."""
    if folder is None:
        return [_scaled(Image.fromarray(getattr(skimage.data, name)())) for name in BUILT_IN]
    photographs = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            with Image.open(path) as image:
                if min(image.size) < SMALLEST:
                    raise ValueError(f"{image.width} x {image.height} pixels, smaller than {SMALLEST}")
                photographs.append(_scaled(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises all of them
            print(f"skipped {path}: {error}", file=sys.stderr)
    if not photographs:
        raise SystemExit(f"--images {folder}: no usable image found; looked for {', '.join(sorted(SUFFIXES))}")
    return photographs


def _scaled(image: Image.Image) -> Tensor:
    image = ImageOps.exif_transpose(image).convert("RGBA").convert("RGB")  # grey, palette and alpha alike
    scale = min(max(min(image.size), WINDOW), SHORT_SIDE) / min(image.size)
    size = (max(WINDOW, round(image.width * scale)), max(WINDOW, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class TwoViews(NamedTuple):
    """MoCo-v2's augmentation, as one batch on one device.

    Attributes:
        photographs: (3, H, W) uint8, at least WINDOW on each side.
        generator: Every random number comes from here, and always for the whole batch of all processes: each
            takes its share of the numbers, so that their views together are those of a single process.
    """

    photographs: list[Tensor]
    generator: torch.Generator

    def draw(self, batch: int, share: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two views (B, 3, VIEW, VIEW) of the same windows, for the `share` of the batch."""
        place = torch.rand(batch, 3, generator=self.generator)[share]
        first, second = torch.rand(2, batch, 13, generator=self.generator)[:, share].to(device)
        windows = torch.stack([self._window(*row) for row in place.tolist()]).to(device).float() / 255
        return _augment(windows, first), _augment(windows, second)

    def _window(self, photograph: float, top: float, left: float) -> Tensor:
        image = self.photographs[int(photograph * len(self.photographs))]
        y, x = int(top * (image.shape[1] - WINDOW + 1)), int(left * (image.shape[2] - WINDOW + 1))
        return image[:, y : y + WINDOW, x : x + WINDOW]


def _augment(images: Tensor, uniform: Tensor) -> Tensor:
    """Crop, flip, colour jitter, grey and blur, each image by its own row of `uniform`."""
    u = uniform.unbind(1)
    # Random resized crop and flip in one resampling: a crop of `side` (1: the whole window) around (x, y) in [-1, 1].
    side = torch.sqrt(0.2 + 0.8 * u[0])
    stretch = torch.exp((2 * u[1] - 1) * 0.5 * np.log(4 / 3))
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    x, y = (2 * u[2] - 1) * (1 - width), (2 * u[3] - 1) * (1 - height)
    mirrored = torch.where(u[4] < 0.5, -width, width)
    zero = torch.zeros_like(x)
    corners = torch.stack([mirrored, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(corners, [len(images), 3, VIEW, VIEW], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    jittered = adjust_brightness(images, (u[5] - 0.5) * 0.8)
    jittered = adjust_contrast(jittered, 1 + (u[6] - 0.5) * 0.8)
    jittered = adjust_saturation(jittered, 1 + (u[7] - 0.5) * 0.8)
    jittered = adjust_hue(jittered, (u[8] - 0.5) * 0.4 * np.pi)
    images = _where(u[9] < 0.8, jittered, images)
    images = _where(u[10] < 0.2, rgb_to_grayscale(images).expand_as(images), images)
    sigma = (0.1 + 1.4 * u[11]).unsqueeze(1).expand(-1, 2)
    return _where(u[12] < 0.5, gaussian_blur2d(images, (7, 7), sigma), images).clamp(0, 1)


def _where(chosen: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], images, others)
