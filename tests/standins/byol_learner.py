"""Stands for byol_pytorch.BYOL (lucidrains): its attributes, its two encoders, and one forward over both views.

Written here from the interface of byol-pytorch 0.9.1. The real class needs torchvision for its default augmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NetWrapper(nn.Module):
    def __init__(self, net: nn.Module, size: int, hidden: int, layer: str) -> None:
        super().__init__()
        self.net, self.layer, self.sizes = net, layer, (hidden, size)
        self.projector: nn.Module | None = None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        handle = self.net.get_submodule(self.layer).register_forward_hook(lambda *args: seen.append(args[2].flatten(1)))
        self.net(images)
        handle.remove()
        if self.projector is None:
            self.projector = mlp(seen[0].shape[1], *self.sizes).to(seen[0])
        return self.projector(seen[0]), seen[0]


class BYOL(nn.Module):
    def __init__(
        self,
        net: nn.Module,
        image_size: int,
        hidden_layer: str = "avgpool",
        projection_size: int = 256,
        projection_hidden_size: int = 4096,
        augment_fn: Callable[[Tensor], Tensor] | None = None,
        augment_fn2: Callable[[Tensor], Tensor] | None = None,
        moving_average_decay: float = 0.99,
        use_momentum: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self.augment1 = augment_fn or nn.Identity()
        self.augment2 = augment_fn2 or self.augment1
        self.online_encoder = NetWrapper(net, projection_size, projection_hidden_size, hidden_layer)
        self.target_ema_updater = SimpleNamespace(beta=moving_average_decay)
        self.online_predictor = mlp(projection_size, projection_hidden_size, projection_size)
        self.use_momentum = use_momentum
        self.target_encoder: nn.Module | None = None
        self.forward(torch.randn(2, 3, image_size, image_size))  # makes projector and target

    def update_moving_average(self) -> None:
        beta = self.target_ema_updater.beta
        for ours, theirs in zip(self.online_encoder.parameters(), self.target_encoder.parameters(), strict=True):
            theirs.data = theirs.data * beta + (1 - beta) * ours.data

    def forward(self, x: Tensor) -> Tensor:
        images = torch.cat([self.augment1(x), self.augment2(x)])
        prediction = self.online_predictor(self.online_encoder(images)[0])
        if self.use_momentum and self.target_encoder is None:
            self.target_encoder = copy.deepcopy(self.online_encoder).requires_grad_(False)
        with torch.no_grad():
            projection = (self.target_encoder or self.online_encoder)(images)[0]
        one, two = projection.chunk(2)
        return (2 - 2 * F.cosine_similarity(prediction, torch.cat([two, one]))).mean() * 2


def mlp(width: int, hidden: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, size))
