"""Stands for moco/builder.py of facebookresearch/moco: its names, signatures, buffers and order of operations.

Written here from that interface. Like the original, the parts that only its own forward uses (queue, shuffle) may
need a process group, CUDA and a batch that divides K; DenseMoCo must not come to depend on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class MoCo(nn.Module):
    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,  # noqa: N803
        m: float = 0.999,
        T: float = 0.07,  # noqa: N803
        mlp: bool = False,
    ) -> None:
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.encoder_q, self.encoder_k = base_encoder(num_classes=dim), base_encoder(num_classes=dim)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                width = encoder.fc.in_features
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        for theirs, ours in self._pairs():
            theirs.requires_grad = False
            theirs.data.copy_(ours.data)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def _pairs(self) -> zip:
        return zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        for theirs, ours in self._pairs():
            theirs.mul_(self.m).add_(ours * (1 - self.m))

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        raise RuntimeError("the queue of the host was used")

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("the shuffle of the host needs CUDA")

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: Tensor) -> Tensor:
        every = concat_all_gather(x)
        return every[idx_unshuffle.view(len(every) // len(x), -1)[dist.get_rank()]]

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("the forward of the host needs CUDA")


@torch.no_grad()
def concat_all_gather(tensor: Tensor) -> Tensor:
    parts = [torch.ones_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)
