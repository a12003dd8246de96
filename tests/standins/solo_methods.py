"""Stands for solo-learn 1.0.6's MoCoV2Plus and its bases: names, hooks and order of operations.

Written here from that interface. The trainer does nothing; images go in channels_last, and the momentum networks move
at the end of a batch, as in the original.
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


def moco_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class MoCoV2Plus(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        settings = cfg.method_kwargs
        self.features_dim, self.tau = 16, 0.9
        self.temperature, self.queue_size = settings.temperature, settings.queue_size
        hidden, dim = settings.proj_hidden_dim, settings.proj_output_dim
        self.backbone, self.momentum_backbone = TinyResNet(), TinyResNet()
        self.projector, self.momentum_projector = (
            nn.Sequential(nn.Linear(self.features_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(2)
        )
        for theirs, ours in MoCoV2Plus.momentum_pairs.fget(self):
            ours.load_state_dict(theirs.state_dict())
            ours.requires_grad_(False)
        self.classifier = nn.Linear(self.features_dim, 10)
        self.register_buffer("queue", F.normalize(torch.randn(2, dim, self.queue_size), dim=1))
        self.trainer, self.last_step, self.logged = SimpleNamespace(global_step=0), 0, {}

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
        q1, q2 = (F.normalize(self.projector(x), dim=-1) for x in feats)
        with torch.no_grad():
            k1, k2 = (F.normalize(self.momentum_projector(self.momentum_backbone(x)), dim=-1) for x in crops[:2])
        class_loss = sum(F.cross_entropy(self.classifier(x.detach()), targets) for x in feats) / 2
        pairs = ((q1, k2, self.queue[1]), (q2, k1, self.queue[0]))
        return class_loss + sum(moco_loss(*pair, self.temperature) for pair in pairs) / 2

    def on_after_backward(self) -> None:
        """Of every LightningModule."""

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Any], batch_idx: int) -> None:
        if self.trainer.global_step > self.last_step:
            for online, momentum in self.momentum_pairs:
                for theirs, ours in zip(online.parameters(), momentum.parameters(), strict=True):
                    ours.data = self.tau * ours.data + (1 - self.tau) * theirs.data
        self.last_step = self.trainer.global_step
