"""MoCo-v2's changes to the colours, for a whole batch on its device; the crops were made by the workers."""

from __future__ import annotations

import math

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every user of a ResNet expects


def augment(images: Tensor, uniform: Tensor) -> Tensor:
    """Colour jitter, grey, blur and normalisation of (B, 3, V, V) uint8 images, each by its row of `uniform` (B, 8)."""
    u = uniform.unbind(1)
    images = images.float() / 255
    jittered = adjust_brightness_accumulative(images, 0.6 + 0.8 * u[0])
    jittered = adjust_contrast_with_mean_subtraction(jittered, 0.6 + 0.8 * u[1])
    jittered = adjust_saturation_with_gray_subtraction(jittered, 0.6 + 0.8 * u[2])
    jittered = adjust_hue(jittered, (u[3] - 0.5) * 0.4 * math.pi)
    images = _where(u[4] < 0.8, jittered, images)
    images = _where(u[5] < 0.2, rgb_to_grayscale(images).expand_as(images), images)
    sigma = (0.1 + 1.9 * u[6]).unsqueeze(1).expand(-1, 2)
    return normalize(_where(u[7] < 0.5, gaussian_blur2d(images, (13, 13), sigma), images))


def normalize(images: Tensor) -> Tensor:
    """From [0, 1] to mean 0 and deviation 1 per channel over ImageNet."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def denormalize(images: Tensor) -> Tensor:
    """Back to [0, 1]."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


def _where(chosen: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], images, others)
