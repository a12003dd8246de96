"""BYOL with a dense term in lightly's BYOL example (examples/pytorch/byol.py): the lines marked (dense) are new.

    python docs/examples/with_lightly_byol.py --steps 3

BYOL keeps no queue. Its image term stays as it is, without negatives; the dense term takes the other images of the
batch as negatives. The steps and what to watch: docs/recipes/lightly.md.
"""

from __future__ import annotations

import argparse
import copy

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, Projection
from densecl_ops.functional import in_batch_negatives


class DenseBYOL(nn.Module):
    """lightly's BYOL, with the dense head in place of BYOLProjectionHead.

    Args:
        backbone: Images to a map (B, channels, H, W): without pooling and fc. Of a torchvision ResNet,
            nn.Sequential(OrderedDict(list(resnet.named_children())[:-2])).
        channels: Of that map: 512 for a ResNet-18, 2048 for a ResNet-50.
        temperature: Of the dense term. Default 0.2.
    """

    def __init__(self, backbone: nn.Module, channels: int, temperature: float = 0.2) -> None:
        super().__init__()
        self.backbone = backbone
        # The image branch is BYOLProjectionHead(channels, 1024, 256), but for a bias before the batch norm.
        self.projection_head = DenseProjectionHead(channels, 1024, 256, norm_layer=nn.BatchNorm2d)  # (dense)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.dense_prediction_head = nn.Sequential(  # (dense) the same layers, as 1x1 convolutions
            nn.Conv2d(256, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.ReLU(), nn.Conv2d(1024, 256, 1)
        )
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.image_criterion = NegativeCosineSimilarity()
        self.match, self.dense_criterion = DenseCorrespondence(), DenseInfoNCELoss(temperature)  # (dense)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.backbone(x)
        z = self.projection_head(features)
        return features, self.prediction_head(z.image), self.dense_prediction_head(z.dense)

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> tuple[Tensor, Projection]:
        features = self.backbone_momentum(x)
        return features, self.projection_head_momentum(features)


def one_direction(model: DenseBYOL, x_query: Tensor, x_key: Tensor) -> tuple[Tensor, Tensor]:
    """Image term and dense term of one view, predicting the other."""
    map_q, p, dense_p = model(x_query)
    map_k, z = model.forward_momentum(x_key)
    image_loss = model.image_criterion(p, z.image)
    negatives, own = in_batch_negatives(z.pooled)  # (dense) of all ranks; own: the rows of these very images
    dense_loss = model.dense_criterion(dense_p, z.dense, negatives, model.match(map_q, map_k), exclude=own)  # (dense)
    return image_loss, dense_loss


def training_step(model: DenseBYOL, x0: Tensor, x1: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """The symmetric image term and dense term of one batch of two views; moves the momentum networks."""
    update_momentum(model.backbone, model.backbone_momentum, m=momentum)
    update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
    forth, back = one_direction(model, x0, x1), one_direction(model, x1, x0)
    return 0.5 * (forth[0] + back[0]), 0.5 * (forth[1] + back[1])


def tiny_backbone() -> nn.Sequential:
    """Stands for yours without pooling and fc: (B, 3, H, W) to (B, 64, H / 8, W / 8)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 8, 8, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps of dense BYOL on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DenseBYOL(tiny_backbone(), channels=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    pictures = nn.functional.interpolate(torch.rand(16, 3, 4, 4), size=(64, 64), mode="bilinear")
    for step in range(args.steps):
        x0, x1 = (pictures + 0.1 * torch.randn_like(pictures) for _ in range(2))
        image_loss, dense_loss = training_step(model, x0, x1, momentum=0.996)
        loss = 0.5 * image_loss + 0.5 * dense_loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: image {image_loss:.3f}, dense {dense_loss:.3f}")


if __name__ == "__main__":
    main()
