"""MoCo-v2 as a plain loop, with DenseCL's dense term: no host package, nothing to subclass.

    python docs/examples/moco_loop.py --steps 3

docs/recipes/plain-moco.md shows the lines that MoCo-v2 does not have.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue, Projection


class Encoder(nn.Module):
    """A backbone without its pooling, and the head on its map."""

    def __init__(self) -> None:
        super().__init__()
        # For a torchvision ResNet: nn.Sequential(OrderedDict(list(resnet50().named_children())[:-2]))
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 32, 8, 8, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
            *(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
        )
        self.head = DenseProjectionHead(in_channels=64, hidden_channels=64, out_channels=128)

    def forward(self, images: Tensor) -> tuple[Tensor, Projection]:
        features = self.backbone(images)
        return features, self.head(features)


class Trainer(nn.Module):
    """All state of the run: its state_dict is the checkpoint, both queues included."""

    def __init__(self, queue_size: int = 1024, momentum: float = 0.999, temperature: float = 0.2) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoder_q = Encoder()
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.image_queue = MomentumQueue(queue_size, dim=128)
        self.dense_queue = MomentumQueue(queue_size, dim=128)
        self.match = DenseCorrespondence()
        self.criterion = DenseInfoNCELoss(temperature)

    def forward(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image term, dense term, and the rank (B, 1) of every image's own key (0: it beats all negatives)."""
        with torch.no_grad():
            for p_q, p_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                p_k.lerp_(p_q, 1 - self.momentum)  # the head included

        map_q, query = self.encoder_q(view_q)
        with torch.no_grad():
            map_k, key = self.encoder_k(view_k)

        image_loss, rank = self.criterion(query.image, key.image, self.image_queue, return_rank=True)
        dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, self.match(map_q, map_k))

        self.image_queue.enqueue(key.image)
        self.dense_queue.enqueue(key.pooled)
        return image_loss, dense_loss, rank


def two_views(images: Tensor) -> tuple[Tensor, Tensor]:
    """Your augmentation: here a shift, a flip and noise."""
    shifted = torch.roll(images, shifts=(8, 8), dims=(2, 3)).flip(3)
    return images + 0.1 * torch.randn_like(images), shifted + 0.1 * torch.randn_like(images)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Trainer()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    images = F.interpolate(torch.rand(16, 3, 8, 8), size=(64, 64), mode="bilinear")
    for step in range(args.steps):
        view_q, view_k = two_views(images)
        image_loss, dense_loss, rank = model(view_q, view_k)
        loss = 0.5 * image_loss + 0.5 * dense_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = (rank < 1).float().mean()
        print(f"step {step}: image {image_loss:.3f}, dense {dense_loss:.3f}, accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
