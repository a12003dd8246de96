"""The demo's residual network and one of half its width: stride 8, names of parameters are torchvision's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from densecl_ops._processor import processor

WIDTHS = {"narrow": (16, 32, 64, 128), "small": (32, 64, 128, 256)}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(8, channels),  # what each image alone decides
}


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = norm(channels), norm(channels)
        self.downsample: nn.Module = nn.Identity()
        if channels_in != channels or stride > 1:
            skip = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(skip, norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        return torch.relu_(out + self.downsample(x))


def resnet(widths: Sequence[int], norm: str = "batch") -> nn.Sequential:
    """(B, 3, H, W) to (B, widths[-1], H / 8, W / 8)."""
    stem = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
    layers: dict[str, nn.Module] = {"conv1": stem, "bn1": NORMS[norm](widths[0]), "relu": nn.ReLU(inplace=True)}
    sizes = zip((widths[0], *widths), widths, (1, 2, 2, 1), strict=False)
    layers |= {f"layer{i}": nn.Sequential(Block(*size, NORMS[norm])) for i, size in enumerate(sizes, 1)}
    network = nn.Sequential(OrderedDict(layers))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def encode(network: nn.Module, images: Tensor) -> Tensor:
    """Features of uint8 or [0, 1] images, with ImageNet's mean and spread taken off, under `autocast`."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = ((x - 0.45) / 0.226).contiguous(memory_format=torch.channels_last)
    with autocast(x.device):
        features: Tensor = network(x)
    return features


def autocast(device: torch.device) -> torch.autocast:
    """To bfloat16 where there are instructions for it; elsewhere they would be emulated."""
    cuda = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else processor().bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
