"""The demo's backbone, and the batch norm that makes it the same network on any number of CPU processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STRIDE = 8  # pixels per cell of the backbone's map


def small_resnet() -> nn.Sequential:
    """Four residual blocks; (B, 3, H, W) to (B, 256, H / STRIDE, W / STRIDE)."""
    stem = (nn.Conv2d(3, 32, 3, 2, 1, bias=False), BatchNorm2d(32), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2), Block(128, 256, 1))


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            BatchNorm2d(channels),
        )
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels:
            self.skip = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d; in a group of CPU processes, what nn.SyncBatchNorm is on GPUs (torch has none for CPUs).

    With it, any number of processes that share a batch train the network that one process would. On GPUs
    nn.SyncBatchNorm.convert_sync_batchnorm replaces it, as it replaces every batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        x = input.float()
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = _MeanOverProcesses.apply(moments)  # type: ignore[no-untyped-call]
        variance = square - mean.square()
        count = x.numel() / x.shape[1] * dist.get_world_size()
        assert self.running_mean is not None  # the default options, which mypy cannot know
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(input.dtype)


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean = x / dist.get_world_size()
        dist.all_reduce(mean)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _MeanOverProcesses.forward(ctx, grad)  # the mean is its own adjoint
