"""DenseCL with a vision transformer: patch tokens instead of a convolutional map.

    python docs/examples/with_vit.py --steps 3
    python docs/examples/with_vit.py --steps 3 --class-token

What to watch: docs/recipes/vit.md.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue, Projection


class ViT(nn.Module):
    """A small pre-norm vision transformer: (B, 3, size, size) to tokens (B, 1 + P, width), the class token first."""

    def __init__(self, size: int = 64, patch: int = 8, width: int = 96, depth: int = 3, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        layers = [
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.blocks, self.norm = nn.Sequential(*layers), nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        normed: Tensor = self.norm(self.blocks(tokens + self.position))
        return normed


class Encoder(nn.Module):
    """A ViT and the projection head on its patch tokens."""

    def __init__(self, vit: nn.Module, width: int, use_class_token: bool) -> None:
        super().__init__()
        self.vit, self.head = vit, DenseProjectionHead(width, 256, 128)
        self.use_class_token = use_class_token

    def forward(self, images: Tensor) -> tuple[Tensor, Projection]:
        tokens = self.vit(images)  # (B, 1 + P, C)
        features = tokens[:, 1:].transpose(1, 2)  # (B, C, P), a view: head and matching read it in place
        projection = self.head(features)
        if self.use_class_token:
            projection = projection._replace(image=self.head(tokens[:, :1].transpose(1, 2)).image)
        return features, projection


class DenseCL(nn.Module):
    """MoCo-v2 with a dense term.

    Args:
        vit: Images to normalised tokens (B, 1 + P, width), the class token first.
        width: C of the tokens.
        queue_size: Rows of each queue. Default 65,536.
        use_class_token: Whether the class token is the image vector; by default the mean of the patch tokens is.
    """

    def __init__(self, vit: nn.Module, width: int, queue_size: int = 65536, use_class_token: bool = False) -> None:
        super().__init__()
        self.encoder_q = Encoder(vit, width, use_class_token)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.match, self.criterion = DenseCorrespondence(), DenseInfoNCELoss(temperature=0.2)
        self.image_queue, self.dense_queue = MomentumQueue(queue_size), MomentumQueue(queue_size)

    def forward(self, view_q: Tensor, view_k: Tensor, momentum: float = 0.99) -> tuple[Tensor, Tensor]:
        """Image term and dense term."""
        features_q, query = self.encoder_q(view_q)
        with torch.no_grad():
            for ours, theirs in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
                ours.lerp_(theirs, 1 - momentum)
            features_k, key = self.encoder_k(view_k)
        image_loss = self.criterion(query.image, key.image, self.image_queue)
        dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, self.match(features_q, features_k))
        self.image_queue.enqueue(key.image)
        self.dense_queue.enqueue(key.pooled)
        return image_loss, dense_loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps of DenseCL with a ViT on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--class-token", action="store_true", help="the class token is the image vector")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DenseCL(ViT(), width=96, queue_size=256, use_class_token=args.class_token)
    optimizer = torch.optim.AdamW(model.encoder_q.parameters(), 1e-3)
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
