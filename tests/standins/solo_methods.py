"""Stands for solo-learn 1.0.6's BaseMomentumMethod and MoCoV2Plus: names, hooks and order of operations.

Written here from that interface. The base is a plain module whose trainer does nothing; images go in channels_last, and
the momentum networks move at the end of a batch, as in the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyResNet(nn.Module):
    """The children of a torchvision ResNet that solo-learn touches; fc is already taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 8, 8, bias=False), nn.BatchNorm2d(12)
        self.layer4 = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.layer4(torch.relu(self.bn1(self.conv1(x))))).flatten(1))


def initialize_momentum_params(online: nn.Module, momentum: nn.Module) -> None:
    for theirs, ours in zip(online.parameters(), momentum.parameters(), strict=True):
        ours.data.copy_(theirs.data)
        ours.requires_grad = False


class BaseMomentumMethod(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.features_dim, self.num_large_crops, self.no_channel_last = 16, 2, False
        self.backbone, self.momentum_backbone = TinyResNet(), TinyResNet()
        initialize_momentum_params(self.backbone, self.momentum_backbone)
        self.classifier, self.tau = nn.Linear(16, 10), 0.9
        self.trainer, self.last_step, self.logged = SimpleNamespace(global_step=0), 0, {}

    def log(self, name: str, value: Any, **_: Any) -> None:
        self.logged[name] = value

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        backbone = {"name": "backbone", "params": self.backbone.parameters()}
        return [backbone, {"name": "classifier", "params": self.classifier.parameters(), "lr": 0.1, "weight_decay": 0}]

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        return [(self.backbone, self.momentum_backbone)]

    def forward(self, X: Tensor) -> dict[str, Any]:  # noqa: N803
        feats = self.backbone(X if self.no_channel_last else X.to(memory_format=torch.channels_last))
        return {"logits": self.classifier(feats.detach()), "feats": feats}

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Any]:  # noqa: N803
        return {"feats": self.momentum_backbone(X if self.no_channel_last else X.to(memory_format=torch.channels_last))}

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> dict[str, Any]:
        _, crops, targets = batch
        outs = [self(x) for x in crops[: self.num_large_crops]]
        for x in crops[self.num_large_crops :]:  # multicrop: small crops go through the online backbone alone
            self.backbone(x)
        momentum_outs = [self.momentum_forward(x) for x in crops[: self.num_large_crops]]
        result = {name: [out[name] for out in outs] for name in outs[0]}
        result |= {f"momentum_{name}": [out[name] for out in momentum_outs] for name in momentum_outs[0]}
        result["loss"] = sum(F.cross_entropy(logits, targets) for logits in result["logits"]) / self.num_large_crops
        return result

    def on_after_backward(self) -> None:
        """Of every LightningModule."""

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Any], batch_idx: int) -> None:
        if self.trainer.global_step > self.last_step:
            for online, momentum in self.momentum_pairs:
                for theirs, ours in zip(online.parameters(), momentum.parameters(), strict=True):
                    ours.data = self.tau * ours.data + (1 - self.tau) * theirs.data
        self.last_step = self.trainer.global_step


def moco_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class MoCoV2Plus(BaseMomentumMethod):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        settings = cfg.method_kwargs
        self.temperature, self.queue_size = settings.temperature, settings.queue_size
        hidden, dim = settings.proj_hidden_dim, settings.proj_output_dim
        self.projector, self.momentum_projector = (
            nn.Sequential(nn.Linear(self.features_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(2)
        )
        initialize_momentum_params(self.projector, self.momentum_projector)
        self.register_buffer("queue", F.normalize(torch.randn(2, dim, self.queue_size), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        return [*super().learnable_params, {"name": "projector", "params": self.projector.parameters()}]

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    def forward(self, X: Tensor) -> dict[str, Any]:  # noqa: N803
        out = super().forward(X)
        return out | {"z": F.normalize(self.projector(out["feats"]), dim=-1)}

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Any]:  # noqa: N803
        out = super().momentum_forward(X)
        return out | {"z": F.normalize(self.momentum_projector(out["feats"]), dim=-1)}

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        out = super().training_step(batch, batch_idx)
        (q1, q2), (k1, k2) = out["z"], out["momentum_z"]
        queue = self.queue.clone()
        pairs = ((q1, k2, queue[1]), (q2, k1, queue[0]))
        nce_loss = sum(moco_loss(*pair, self.temperature) for pair in pairs) / 2
        start, n = int(self.queue_ptr), len(k1)
        assert self.queue_size % n == 0
        self.queue[:, :, start : start + n] = torch.stack([k1, k2]).transpose(1, 2)
        self.queue_ptr[0] = (start + n) % self.queue_size
        self.log("train_nce_loss", nce_loss, on_epoch=True, sync_dist=True)
        return nce_loss + out["loss"]
