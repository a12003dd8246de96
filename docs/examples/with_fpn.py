"""DenseCL on one level of a feature pyramid: a map of stride 4, pooled to a grid of 8 x 8.

    python docs/examples/with_fpn.py --steps 3
    python docs/examples/with_fpn.py --steps 3 --grid-size 16    # every position of the level is a query

What to watch: docs/recipes/fpn.md.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue, Projection


class Pyramid(nn.Module):
    """A backbone and the stride-4 level of a feature pyramid on it (FPN, arXiv 1612.03144, section 3).

    (B, 3, H, W) to the backbone's last map (B, 64, H / 8, W / 8) and the level (B, channels, H / 4, W / 4).
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        # These two stand for your backbone, up to stride 4 and up to stride 8.
        self.stage_4 = nn.Sequential(nn.Conv2d(3, 32, 4, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.stage_8 = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.lateral_4, self.lateral_8 = nn.Conv2d(32, channels, 1), nn.Conv2d(64, channels, 1)
        self.output_4 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        c_4 = self.stage_4(images)
        c_8 = self.stage_8(c_4)
        top_down = nn.functional.interpolate(self.lateral_8(c_8), size=c_4.shape[2:], mode="nearest")
        return c_8, self.output_4(self.lateral_4(c_4) + top_down)


class Encoder(nn.Module):
    """A pyramid and the projection head on its level."""

    def __init__(self, grid_size: int) -> None:
        super().__init__()
        self.pyramid, self.head = Pyramid(64), DenseProjectionHead(64, 256, 128, grid_size=grid_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Projection]:
        _, level = self.pyramid(images)
        return level, self.head(level)


class DenseCL(nn.Module):
    """MoCo-v2 with a dense term.

    Args:
        grid_size: S: head and matching both pool the level to S x S, so that an image has S * S queries.
        queue_size: Rows of each queue. Default 65,536.
    """

    def __init__(self, grid_size: int, queue_size: int = 65536) -> None:
        super().__init__()
        self.encoder_q = Encoder(grid_size)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.match = DenseCorrespondence(grid_size=grid_size)
        self.criterion = DenseInfoNCELoss(temperature=0.2)
        self.image_queue, self.dense_queue = MomentumQueue(queue_size), MomentumQueue(queue_size)

    def forward(self, view_q: Tensor, view_k: Tensor, momentum: float = 0.99) -> tuple[Tensor, Tensor]:
        """Image term and dense term."""
        level_q, query = self.encoder_q(view_q)
        with torch.no_grad():
            for ours, theirs in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
                ours.lerp_(theirs, 1 - momentum)
            level_k, key = self.encoder_k(view_k)
        image_loss = self.criterion(query.image, key.image, self.image_queue)
        dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, self.match(level_q, level_k))
        self.image_queue.enqueue(key.image)
        self.dense_queue.enqueue(key.pooled)
        return image_loss, dense_loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps of DenseCL on a pyramid level, on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--grid-size", type=int, default=8, help="default: %(default)s")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DenseCL(args.grid_size, queue_size=256)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    pictures = nn.functional.interpolate(torch.rand(16, 3, 4, 4), size=(64, 64), mode="bilinear")
    for step in range(args.steps):
        view_q, view_k = (pictures + 0.1 * torch.randn_like(pictures) for _ in range(2))
        image_loss, dense_loss = model(view_q, view_k)
        loss = 0.5 * image_loss + 0.5 * dense_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: image {image_loss:.3f}, dense {dense_loss:.3f}")


if __name__ == "__main__":
    main()
