"""DenseCL in lightly's MoCo example (examples/pytorch/moco.py): the lines marked (dense) are new.

    python docs/examples/with_lightly_moco.py --steps 3

The steps and what to watch: docs/recipes/lightly.md.
"""

from __future__ import annotations

import argparse
import copy

import torch
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue, Projection


class DenseMoCo(nn.Module):
    """lightly's MoCo, with the dense head in place of MoCoProjectionHead.

    Args:
        backbone: Images to a map (B, channels, H, W): without pooling and fc. Of a torchvision ResNet,
            nn.Sequential(OrderedDict(list(resnet.named_children())[:-2])).
        channels: Of that map: 512 for a ResNet-18, 2048 for a ResNet-50.
        queue_size: Rows of each queue. Default 4,096, the size of lightly's memory bank.
        temperature: Of both terms. Default 0.5, that of lightly's NTXentLoss.
    """

    def __init__(self, backbone: nn.Module, channels: int, queue_size: int = 4096, temperature: float = 0.5) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = DenseProjectionHead(channels, channels, 128)  # (dense)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.match, self.criterion = DenseCorrespondence(), DenseInfoNCELoss(temperature)  # (dense)
        self.image_queue, self.dense_queue = MomentumQueue(queue_size), MomentumQueue(queue_size)  # (dense)

    def forward(self, x: Tensor) -> tuple[Tensor, Projection]:
        features = self.backbone(x)
        return features, self.projection_head(features)

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> tuple[Tensor, Projection]:
        features = self.backbone_momentum(x)
        return features, self.projection_head_momentum(features)


def training_step(model: DenseMoCo, x_query: Tensor, x_key: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """The image term and the dense term of one batch of two views; moves the momentum networks and the queues."""
    update_momentum(model.backbone, model.backbone_momentum, m=momentum)
    update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
    map_q, query = model(x_query)
    map_k, key = model.forward_momentum(x_key)
    image_loss = model.criterion(query.image, key.image, model.image_queue)
    dense_loss = model.criterion(query.dense, key.dense, model.dense_queue, model.match(map_q, map_k))  # (dense)
    model.image_queue.enqueue(key.image)
    model.dense_queue.enqueue(key.pooled)  # (dense) one row per image
    return image_loss, dense_loss


def tiny_backbone() -> nn.Sequential:
    """Stands for yours without pooling and fc: (B, 3, H, W) to (B, 64, H / 8, W / 8)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 8, 8, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps of dense MoCo on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DenseMoCo(tiny_backbone(), channels=64, queue_size=256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    pictures = nn.functional.interpolate(torch.rand(16, 3, 4, 4), size=(64, 64), mode="bilinear")
    for step in range(args.steps):
        x_query, x_key = (pictures + 0.1 * torch.randn_like(pictures) for _ in range(2))
        image_loss, dense_loss = training_step(model, x_query, x_key, momentum=0.996)
        loss = 0.5 * image_loss + 0.5 * dense_loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: image {image_loss:.3f}, dense {dense_loss:.3f}")


if __name__ == "__main__":
    main()
