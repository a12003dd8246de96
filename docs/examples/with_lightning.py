"""DenseCL as a LightningModule.

    python docs/examples/with_lightning.py --steps 3
    python docs/examples/with_lightning.py --steps 3 --precision bf16-mixed

What to watch: docs/recipes/lightning.md.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue


class DenseCL(pl.LightningModule):  # type: ignore[misc]  # whether or not lightning is installed
    """MoCo-v2 with a dense term.

    Args:
        lr: Of SGD. Default 0.03.
        momentum: Of the key networks. Default 0.999.
        queue_size: Rows of each queue. Default 65,536.
        dense_weight: Lambda, the weight of the dense term; the image term has the rest. Default 0.5.
    """

    def __init__(
        self, lr: float = 0.03, momentum: float = 0.999, queue_size: int = 65536, dense_weight: float = 0.5
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.head = tiny_backbone(), DenseProjectionHead(64, 64, 128)
        self.backbone_k = copy.deepcopy(self.backbone).requires_grad_(False)
        self.head_k = copy.deepcopy(self.head).requires_grad_(False)
        self.match, self.criterion = DenseCorrespondence(), DenseInfoNCELoss(temperature=0.2)
        self.image_queue, self.dense_queue = MomentumQueue(queue_size), MomentumQueue(queue_size)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        view_q, view_k = batch
        map_q = self.backbone(view_q)
        query = self.head(map_q)
        with torch.no_grad():
            map_k = self.backbone_k(view_k)
            key = self.head_k(map_k)
        image_loss, rank = self.criterion(query.image, key.image, self.image_queue, return_rank=True)
        dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, self.match(map_q, map_k))
        self.new_keys = key.image, key.pooled

        top1 = (rank < 1).float().mean()
        self.log_dict({"image_loss": image_loss, "dense_loss": dense_loss, "top1": top1}, prog_bar=True)
        weight = self.hparams["dense_weight"]
        loss: Tensor = (1 - weight) * image_loss + weight * dense_loss
        return loss

    def on_after_backward(self) -> None:
        """Enqueues for every batch, where no checkpoint computes a loss again; gathers over the ranks by itself."""
        image, pooled = self.new_keys
        self.image_queue.enqueue(image)
        self.dense_queue.enqueue(pooled)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Moves the key networks once per optimizer step, so also under gradient accumulation."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for online, key in ((self.backbone, self.backbone_k), (self.head, self.head_k)):
                for theirs, ours in zip(online.parameters(), key.parameters(), strict=True):
                    ours.lerp_(theirs, 1 - self.hparams["momentum"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, self.hparams["lr"], momentum=0.9, weight_decay=1e-4)


def tiny_backbone() -> nn.Sequential:
    """Stands for yours without pooling and fc: (B, 3, H, W) to (B, 64, H / 8, W / 8)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 8, 8, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
    )


class RandomViews(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Two noisy views of random pictures; the same item is always the same pair."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        picture = nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), size=64, mode="bilinear")[0]
        first, second = (picture + 0.1 * torch.randn(3, 64, 64, generator=generator) for _ in range(2))
        return first, second


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps of DenseCL under Lightning on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--precision", default="32-true", help="as for Trainer (default: %(default)s)")
    args = parser.parse_args(arguments)

    pl.seed_everything(0, verbose=False)
    model = DenseCL(momentum=0.99, queue_size=256)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(max_steps=args.steps, accelerator="cpu", devices=1, precision=args.precision, **options)
    trainer.fit(model, DataLoader(RandomViews(64), batch_size=16))
    print(", ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items()))


if __name__ == "__main__":
    main()
