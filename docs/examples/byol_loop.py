"""BYOL as a plain loop, with a dense term: a dense predictor, and the other images of the batch as negatives or none.

    python docs/examples/byol_loop.py --steps 3
    python docs/examples/byol_loop.py --steps 3 --no-negatives

docs/recipes/byol.md shows the lines that BYOL does not have.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, Projection
from densecl_ops.functional import dense_cosine, in_batch_negatives

DIM, HIDDEN = 128, 256  # of the projections, and of projector and predictors (BYOL on ResNet-50: 256 and 4,096)


class Encoder(nn.Module):
    """A backbone without its pooling, and the head on its map: BYOL's projector (image) and its dense twin."""

    def __init__(self) -> None:
        super().__init__()
        # For a torchvision ResNet: nn.Sequential(OrderedDict(list(resnet50().named_children())[:-2]))
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 32, 8, 8, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
            *(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
        )
        self.head = DenseProjectionHead(64, HIDDEN, DIM, norm_layer=nn.BatchNorm2d)

    def forward(self, images: Tensor) -> tuple[Tensor, Projection]:
        features = self.backbone(images)
        return features, self.head(features)


class Trainer(nn.Module):
    """All state of the run: its state_dict is the checkpoint."""

    def __init__(self, momentum: float = 0.99, temperature: float = 0.2, contrastive: bool = True) -> None:
        super().__init__()
        self.momentum = momentum
        self.contrastive = contrastive
        self.online = Encoder()
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(
            *(nn.Linear(DIM, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, DIM))
        )
        self.dense_predictor = nn.Sequential(
            *(nn.Conv2d(DIM, HIDDEN, 1), nn.BatchNorm2d(HIDDEN), nn.ReLU(inplace=True), nn.Conv2d(HIDDEN, DIM, 1))
        )
        self.match = DenseCorrespondence()
        self.criterion = DenseInfoNCELoss(temperature)

    def forward(self, view_1: Tensor, view_2: Tensor) -> tuple[Tensor, Tensor]:
        """Image term and dense term, each the mean of both directions."""
        online = self.online(view_1), self.online(view_2)
        with torch.no_grad():
            target = self.target(view_1), self.target(view_2)

        image_loss = dense_loss = torch.zeros((), device=view_1.device)
        for (map_q, query), (map_k, key) in zip(online, reversed(target), strict=True):
            prediction = self.predictor(query.image)
            image_loss = image_loss + (1 - F.cosine_similarity(prediction, key.image)).mean()

            dense_prediction = self.dense_predictor(query.dense)
            match = self.match(map_q, map_k)
            if self.contrastive:
                negatives, own = in_batch_negatives(key.pooled)  # one row per image, over all ranks
                term = self.criterion(dense_prediction, key.dense, negatives, match, exclude=own)
            else:
                term = dense_cosine(dense_prediction, key.dense, match)
            dense_loss = dense_loss + 0.5 * term
        return image_loss, dense_loss

    @torch.no_grad()
    def update_target(self) -> None:
        """After the optimizer's step. The predictors have no target."""
        for p_online, p_target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            p_target.lerp_(p_online, 1 - self.momentum)


def two_views(images: Tensor) -> tuple[Tensor, Tensor]:
    """Your augmentation: here a shift, a flip and noise."""
    shifted = torch.roll(images, shifts=(8, 8), dims=(2, 3)).flip(3)
    return images + 0.1 * torch.randn_like(images), shifted + 0.1 * torch.randn_like(images)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--no-negatives", action="store_true", help="the dense term is a cosine, as BYOL's own")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Trainer(contrastive=not args.no_negatives)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.03, momentum=0.9)
    images = F.interpolate(torch.rand(16, 3, 8, 8), size=(64, 64), mode="bilinear")
    for step in range(args.steps):
        image_loss, dense_loss = model(*two_views(images))
        loss = 0.5 * image_loss + 0.5 * dense_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target()
        print(f"step {step}: image {image_loss:.3f}, dense {dense_loss:.3f}")


if __name__ == "__main__":
    main()
