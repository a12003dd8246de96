"""A dense term for lucidrains' byol-pytorch: hooks read the two maps, the learner itself is not touched.

    pip install byol-pytorch
    python docs/examples/with_byol_pytorch.py --steps 3

docs/recipes/byol-pytorch.md shows the lines that change in a script.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead
from densecl_ops.functional import in_batch_negatives


class DenseBYOL(nn.Module):
    """A byol_pytorch.BYOL and a dense term on the maps of one of its layers.

    Its parameters and its state_dict are the learner's and the dense term's.

    Args:
        learner: A byol_pytorch.BYOL with a momentum target, the default.
        in_channels: C of the map.
        layer: Name in learner.net of the module that gives the map (B, C, H, W). Default: a torchvision ResNet's last.
        hidden_channels: Width of the dense projector and predictor. Default 256.
        out_channels: D of the dense term. Default 128.
        temperature: Default 0.2.
    """

    def __init__(
        self,
        learner: Any,
        in_channels: int = 2048,
        layer: str = "layer4",
        hidden_channels: int = 256,
        out_channels: int = 128,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        if learner.target_encoder is None:
            raise ValueError("learner: got a BYOL without target_encoder, expected one with use_momentum=True")
        self.learner, self.layer = learner, layer
        if hasattr(learner.net, "fc") and learner.online_encoder.layer in ("avgpool", -2):
            learner.net.fc.requires_grad_(False)  # no loss reads it, and DDP would wait for its gradient
        self.head = DenseProjectionHead(in_channels, hidden_channels, out_channels, norm_layer=nn.BatchNorm2d)
        self.head.image_mlp.requires_grad_(False)  # the learner has its own: DDP need not wait for gradients here
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Conv2d(out_channels, hidden_channels, 1),
            nn.BatchNorm2d(hidden_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_channels, out_channels, 1),
        )
        self.match, self.criterion = DenseCorrespondence(), DenseInfoNCELoss(temperature)
        self.to(next(learner.parameters()).device)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The learner's loss, and the dense term of both directions; images (B, 3, H, W) as the learner takes them."""
        online_layer = self.learner.net.get_submodule(self.layer)
        target_layer = self.learner.target_encoder.net.get_submodule(self.layer)
        with outputs_of(online_layer) as online_maps, outputs_of(target_layer) as target_maps:
            byol_loss = self.learner(images)

        # Both encoders see view 1 and view 2 of the batch, one after the other, in one call or in two.
        online, target = torch.cat(online_maps), torch.cat(target_maps).detach()
        prediction = self.predictor(self.head(online).dense)
        with torch.no_grad():
            key = self.target_head(target)

        dense_loss = torch.zeros((), device=images.device)
        swapped = (x.chunk(2)[::-1] for x in (target, key.dense, key.pooled))  # view 1 asks view 2, and 2 asks 1
        for map_q, query, map_k, dense, pooled in zip(online.chunk(2), prediction.chunk(2), *swapped, strict=True):
            negatives, own = in_batch_negatives(pooled)  # one row per image, over all ranks
            dense_loss = dense_loss + 0.5 * self.criterion(
                query, dense, negatives, self.match(map_q, map_k), exclude=own
            )
        return byol_loss, dense_loss

    @torch.no_grad()
    def update_moving_average(self) -> None:
        """After the optimizer's step, instead of the learner's: moves the learner's target and the dense one."""
        self.learner.update_moving_average()
        decay = self.learner.target_ema_updater.beta
        for p_online, p_target in zip(self.head.parameters(), self.target_head.parameters(), strict=True):
            p_target.lerp_(p_online, 1 - decay)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module returns within the block. The hook ends with it: nothing to copy, keep or forget."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


class TinyResNet(nn.Sequential):
    """Stands for a torchvision ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer4 = nn.Sequential(nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64, 10)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(arguments)

    from byol_pytorch import BYOL

    torch.manual_seed(0)
    learner = BYOL(TinyResNet(), image_size=64, hidden_layer="avgpool")
    model = DenseBYOL(learner, in_channels=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for step in range(args.steps):
        images = nn.functional.interpolate(torch.rand(16, 3, 8, 8), size=(64, 64), mode="bilinear")
        byol_loss, dense_loss = model(images)
        loss = 0.5 * byol_loss + 0.5 * dense_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_moving_average()
        print(f"step {step}: byol {byol_loss:.3f}, dense {dense_loss:.3f}")


if __name__ == "__main__":
    main()
