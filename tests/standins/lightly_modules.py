"""Stands for the parts of lightly 1.6 that the recipes use, which need torchvision to import: names and signatures.

Written here from that interface. test_recipe_lightly.py runs on lightly itself where it is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def deactivate_requires_grad(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """Parameters alone, as in lightly: buffers stay what they are."""
    for theirs, ours in zip(model.parameters(), model_ema.parameters(), strict=True):
        ours.mul_(m).add_(theirs, alpha=1 - m)


def batch_shuffle(batch: Tensor, distributed: bool = False) -> tuple[Tensor, Tensor]:
    shuffle = torch.randperm(len(batch), device=batch.device)
    return batch[shuffle], shuffle


def batch_unshuffle(batch: Tensor, shuffle: Tensor, distributed: bool = False) -> Tensor:
    return batch[torch.argsort(shuffle)]


class MoCoProjectionHead(nn.Module):
    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BYOLPredictionHead(nn.Module):
    def __init__(self, input_dim: int = 256, hidden_dim: int = 4096, output_dim: int = 256) -> None:
        super().__init__()
        hidden = (nn.Linear(input_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU())
        self.layers = nn.Sequential(*hidden, nn.Linear(hidden_dim, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class NegativeCosineSimilarity(nn.Module):
    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return -torch.cosine_similarity(x0, x1, self.dim, self.eps).mean()


class NTXentLoss(nn.Module):
    """MoCo's loss on the rows of a memory bank."""

    def __init__(self, temperature: float = 0.5, memory_bank_size: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.temperature, self.memory_bank = temperature, nn.Module()
        self.memory_bank.register_buffer("bank", torch.zeros(memory_bank_size), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        query, key = nn.functional.normalize(out0, dim=1), nn.functional.normalize(out1, dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.memory_bank.bank.T], 1)
        return nn.functional.cross_entropy(logits / self.temperature, torch.zeros(len(query), dtype=torch.int64))
