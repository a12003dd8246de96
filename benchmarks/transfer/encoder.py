"""Residual networks in plain PyTorch: the demo's small one and half its width, ResNet-18 and ResNet-50.

Names of parameters are torchvision's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Plan(NamedTuple):
    """What tells one residual network from another."""

    bottleneck: bool
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    stem: tuple[int, int, bool]  # channels, kernel, whether a max pool follows

    @property
    def channels(self) -> int:
        """Of the last map."""
        return self.widths[-1] * (4 if self.bottleneck else 1)

    @property
    def stride(self) -> int:
        """Pixels per cell of the last map in training."""
        first, second, third, fourth = self.strides
        return (4 if self.stem[2] else 2) * first * second * third * fourth


PLANS = {
    "narrow": Plan(False, (1, 1, 1, 1), (16, 32, 64, 128), (1, 2, 2, 1), (16, 3, False)),
    "small": Plan(False, (1, 1, 1, 1), (32, 64, 128, 256), (1, 2, 2, 1), (32, 3, False)),
    "resnet18": Plan(False, (2, 2, 2, 2), (64, 128, 256, 512), (1, 2, 2, 2), (64, 7, True)),
    "resnet50": Plan(True, (3, 4, 6, 3), (64, 128, 256, 512), (1, 2, 2, 2), (64, 7, True)),
}


def group_norm(channels: int) -> nn.GroupNorm:
    """In eight groups: what each image alone decides, whatever else is in its batch."""
    return nn.GroupNorm(8, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": group_norm}


class Block(nn.Module):
    """A basic or a bottleneck block."""

    def __init__(
        self, channels_in: int, width: int, stride: int, bottleneck: bool, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        channels = width * 4 if bottleneck else width
        if bottleneck:
            self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
            self.bn3 = norm(channels)
        else:
            self.conv1 = nn.Conv2d(channels_in, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = norm(width), norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if channels_in != channels or stride > 1:
            skip = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(skip, norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.relu(out)))
        out += self.downsample(x)
        return torch.relu_(out)


class ResNet(nn.Module):
    """(B, 3, H, W) to (B, channels, H / stride, W / stride)."""

    def __init__(self, plan: Plan, norm: str = "batch") -> None:
        super().__init__()
        channels, kernel, pooled = plan.stem
        self.conv1 = nn.Conv2d(3, channels, kernel, 2, kernel // 2, bias=False)
        self.bn1 = NORMS[norm](channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pooled else nn.Identity()
        for i, (depth, width, stride) in enumerate(zip(plan.depths, plan.widths, plan.strides, strict=True), 1):
            blocks = []
            for j in range(depth):
                blocks.append(Block(channels, width, stride if j == 0 else 1, plan.bottleneck, NORMS[norm]))
                channels = width * (4 if plan.bottleneck else 1)
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def at_stride(network: ResNet, plan: Plan, stride: int) -> ResNet:
    """A copy in evaluation mode whose map has `stride`: later strides become dilations (DeepLab, arXiv 1412.7062).

    The finer map holds the coarse one's values at the coarse one's places, and more between them.
    """
    network = copy.deepcopy(network).eval()
    reached, before = 4 if plan.stem[2] else 2, 1
    for i, step in enumerate(plan.strides, 1):
        reached *= step
        after = max(1, reached // stride)
        for module in network.get_submodule(f"layer{i}").modules():
            if isinstance(module, nn.Conv2d) and after > 1:
                dilation = after if module.stride == (1, 1) else before  # a strided one still sees the finer map
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)
        before = after
    return network


def encode(network: nn.Module, images: Tensor) -> Tensor:
    """Features of uint8 or [0, 1] images, with ImageNet's mean and spread taken off, under `autocast`."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = ((x - 0.45) / 0.226).contiguous(memory_format=torch.channels_last)
    with autocast(x.device):
        features: Tensor = network(x)
    return features


def autocast(device: torch.device) -> torch.autocast:
    """To bfloat16 where it is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast(device))


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the processor has bfloat16 instructions; elsewhere they would be emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
