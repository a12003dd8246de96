"""A small residual network, or a ResNet of torchvision or timm; all with a ResNet's names and no classifier."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densecl_ops.interop import read_checkpoint


class Backbone(NamedTuple):
    """A network and the shape of its last map: (B, 3, H, W) gives (B, channels, H / stride, W / stride)."""

    network: nn.Module
    channels: int
    stride: int


def build(name: str) -> Backbone:
    """ "small", "small_gn", or a name that torchvision or, where it has none of it, timm knows.

    Weights are random, but for a name of timm with a tag, such as "resnet50.a1_in1k".
    """
    if name in ("small", "small_gn"):
        network: nn.Module | None = small_resnet(nn.BatchNorm2d if name == "small" else group_norm)
    else:
        network = _of_torchvision(name) or _of_timm(name)
    if network is None:
        missing = [package for package in ("torchvision", "timm") if importlib.util.find_spec(package) is None]
        hint = f" (not installed: {', '.join(missing)})" if missing else ""
        raise SystemExit(
            f"--backbone: got {name!r}, expected small, small_gn, or a ResNet of torchvision or timm{hint}"
        )
    network.eval()  # its statistics stay at their start
    with torch.no_grad():
        features = network(torch.zeros(1, 3, 64, 64))
    network.train()
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise SystemExit(f"--backbone: {name} gives no (B, C, H, W) map")
    return Backbone(network, features.shape[1], 64 // features.shape[3])


def small_resnet(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Four residual blocks; (B, 3, H, W) to (B, 256, H / 8, W / 8)."""
    stem = {"conv1": nn.Conv2d(3, 32, 3, 2, 1, bias=False), "bn1": norm(32), "relu": nn.ReLU()}
    blocks = ((32, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 1))
    layers = {f"layer{number}": nn.Sequential(Block(*block, norm)) for number, block in enumerate(blocks, 1)}
    return nn.Sequential(OrderedDict(stem | layers))


def group_norm(channels: int) -> nn.Module:
    """No statistics of the batch: one process and many, a batch whole or in parts, train the same network."""
    return nn.GroupNorm(8, channels)


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels)
        self.downsample: nn.Module = nn.Identity()
        if channels_in != channels:
            self.downsample = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


def _of_torchvision(name: str) -> nn.Module | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import models

    network = models.get_model(name, weights=None) if name in models.list_models() else None
    if not isinstance(network, models.ResNet):
        return None
    children = OrderedDict((key, child) for key, child in network.named_children() if key not in ("avgpool", "fc"))
    return nn.Sequential(children)  # runs them in order, which is right for a ResNet


def _of_timm(name: str) -> nn.Module | None:
    if importlib.util.find_spec("timm") is None:
        return None
    import timm  # type: ignore[import-not-found, unused-ignore]

    if not timm.is_model(name):
        return None
    try:
        network: nn.Module = timm.create_model(name, pretrained="." in name, num_classes=0, global_pool="")
    except Exception as error:  # of the network, or of a tag that does not exist
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(f"--backbone: the weights of {name} cannot be had ({reason})") from error
    return network


def load_weights(network: nn.Module, path: Path) -> None:
    """The query backbone of a state dict or checkpoint, whole."""
    try:
        read_checkpoint(path, format="backbone").load_into(backbone_q=network)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--weights: {path} does not fit this backbone: {error}") from error
