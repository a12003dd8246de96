"""Two augmented views of random windows, MoCo-v2's augmentation in a few tensor operations per batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Views(NamedTuple):
    """One view of every window: images (B, 3, V, V) in [0, 1], boxes (B, 4) in the window, x0 > x1 if mirrored."""

    images: Tensor
    boxes: Tensor


def draw(
    photographs: list[Tensor], batch: int, window: int, view: int, generator: torch.Generator
) -> tuple[Views, Views]:
    """Two views of the same windows. All random numbers come from the (CPU) generator: equal seeds, equal views."""
    place = torch.rand(batch, 3, generator=generator)
    first, second = torch.rand(2, batch, 14, generator=generator).to(photographs[0].device)
    windows = cut(photographs, place, window).float() / 255
    return augment(windows, first, view), augment(windows, second, view)


def cut(photographs: list[Tensor], uniform: Tensor, side: int) -> Tensor:
    """(B, 3, side, side) uint8; `uniform` (B, 3) chooses photograph, top and left."""
    found = []
    for which, down, right in uniform.tolist():
        image = photographs[int(which * len(photographs))]
        top, left = (int(x * (n - side + 1)) for x, n in zip((down, right), image.shape[1:], strict=True))
        found.append(image[:, top : top + side, left : left + side])
    return torch.stack(found)


def augment(windows: Tensor, uniform: Tensor, view: int) -> Views:
    """Crop, flip, colour jitter, grey and blur, each image by its own row of `uniform` (B, 14)."""
    u = uniform.unbind(1)
    # Random resized crop and flip in one resampling: width and height (1: the whole window) around (x, y) in [-1, 1].
    side, stretch = torch.sqrt(0.2 + 0.8 * u[0]), torch.exp((2 * u[1] - 1) * 0.5 * math.log(4 / 3))
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    x, y = (2 * u[2] - 1) * (1 - width), (2 * u[3] - 1) * (1 - height)
    mirrored = torch.where(u[4] < 0.5, -width, width)
    zero = torch.zeros_like(x)
    corners = torch.stack([mirrored, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(corners, [len(windows), 3, view, view], align_corners=False)
    images = F.grid_sample(windows, grid, padding_mode="border", align_corners=False)

    images = _recolour(images, u)
    radius = view // 20  # MoCo-v2's kernel is a tenth of the view
    sigma = (0.1 + 1.9 * u[11]) * view / 224  # its 0.1 to 2 pixels belong to views of 224
    blurred = (u[12] < 0.5).nonzero()[:, 0]
    images[blurred] = _blur(images[blurred], sigma[blurred], radius)
    boxes = torch.stack([x - mirrored, y - height, x + mirrored, y + height], 1)
    return Views(images, boxes)


def _recolour(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    """Brightness, saturation, hue and grey are linear in RGB: one matrix per image. Contrast scales about the mean.

    Strengths are MoCo-v2's 0.4, 0.4, 0.4 and 0.1, for 0.8 of the images; 0.2 of them turn grey. The hue turns in the
    plane of constant luma, not in HSV.
    """
    luma, eye = images.new_tensor((0.299, 0.587, 0.114)), torch.eye(3, device=images.device)
    grey = luma.expand(3, 3)
    brightness, contrast, saturation = (1 + (u[i] - 0.5) * 0.8 for i in (5, 6, 7))
    angle = (u[8] - 0.5) * 0.4 * math.pi
    # A turn about the grey axis (1, 1, 1) by Rodrigues' formula, made to keep the luma.
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=images.device) / math.sqrt(3)
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    turn = eye + sine * cross + (1 - cosine) * (cross @ cross)
    turn = turn + grey @ (eye - turn)
    matrix = brightness[:, None, None] * (grey + saturation[:, None, None] * (turn - grey @ turn))
    jittered = (u[9] < 0.8)[:, None, None]
    matrix = torch.where(jittered, matrix, eye)
    matrix = torch.where((u[10] < 0.2)[:, None, None], grey @ matrix, matrix)
    gain = torch.where(jittered, contrast[:, None, None], 1)
    coloured = matrix @ images.flatten(2)
    mean = (luma @ coloured.mean(2, keepdim=True)).unsqueeze(1)
    return (mean + gain * (coloured - mean)).clamp(0, 1).view_as(images)


def _blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian blur, every image with its own sigma, as shifted sums: no convolution per image."""
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    weights = weights / weights.sum(1, keepdim=True)
    for dim, padding in (2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0)):
        padded = F.pad(images, padding, mode="reflect")
        length = images.shape[dim]
        images = torch.zeros_like(images)
        for i, weight in enumerate(weights.T[..., None, None, None]):
            images.addcmul_(weight, padded.narrow(dim, i, length))
    return images
