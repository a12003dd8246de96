"""Stands for hosts of recipes that are not on PyPI, written here from their names, hooks and order of operations.

facebookresearch/moco: what only MoCo's own forward uses (queue, CUDA shuffle) is left out, for DenseMoCo must not come
to depend on it. solo-learn 1.0.6: images go in channels_last, and the host moves what momentum_pairs says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class MoCo(nn.Module):
    def __init__(self, base_encoder: Callable[..., nn.Module], dim: int, K: int, m: float, T: float) -> None:  # noqa: N803
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.encoder_q, self.encoder_k = base_encoder(num_classes=dim), base_encoder(num_classes=dim)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        for ours, theirs in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            ours.mul_(self.m).add_(theirs * (1 - self.m))

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: Tensor) -> Tensor:
        every = concat_all_gather(x)
        return every[idx_unshuffle.view(len(every) // len(x), -1)[dist.get_rank()]]


@torch.no_grad()
def concat_all_gather(tensor: Tensor) -> Tensor:
    parts = [torch.ones_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


class MoCoV2Plus(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        settings, self.features_dim, self.logged = cfg.method_kwargs, 64, {}
        self.temperature, self.queue_size = settings.temperature, settings.queue_size
        self.backbone, self.classifier = cfg.backbone(), nn.Linear(64, 10)
        self.backbone.fc = nn.Identity()
        hidden, out = settings.proj_hidden_dim, settings.proj_output_dim
        self.projector = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, out))
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def log(self, name: str, value: Any, **_: Any) -> None:
        self.logged[name] = value

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        return [{"params": part.parameters()} for part in (self.backbone, self.classifier, self.projector)]

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        _, crops, targets = batch
        crops = [x.to(memory_format=torch.channels_last) for x in crops]
        feats = [self.backbone(x) for x in crops][:2]  # multicrop: small crops go through the online backbone alone
        with torch.no_grad():
            keys = [self.momentum_projector(self.momentum_backbone(x)) for x in crops[:2]]
        loss = sum(F.cross_entropy(self.classifier(x.detach()), targets) for x in feats)
        for x, key in zip(feats, keys[::-1], strict=True):  # for MoCo's loss: any that reads what it reads will do
            loss = loss - F.cosine_similarity(self.projector(x), key).mean()
        return loss

    def on_after_backward(self) -> None:
        """Of every LightningModule."""
