"""A whole training step: MoCo-v2, DenseCL written the usual way, and DenseCL with this library.

The parts that DenseCL adds are also timed alone, on the tensors of a step: the dense half of both heads, matching, the
dense loss, the second queue.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import matching, rivals
from benchmarks.measure import Row, compare, compiled
from benchmarks.queue import SliceQueue
from benchmarks.records import OURS, Shape, Suite
from benchmarks.rivals import Inputs
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue, Projection


def backbone() -> nn.Sequential:
    """(B, 3, H, W) to (B, 256, H / 8, W / 8)."""
    widths = ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 1))
    layers: list[nn.Module] = []
    for c_in, c_out, stride in widths:
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def usual_loss(query: Tensor, key: Tensor, queue: SliceQueue, index: Tensor | None = None) -> Tensor:
    if index is not None:
        key = key.flatten(2).gather(2, index[:, None].expand(-1, 128, -1))
        query, key = (x.flatten(2).mT.reshape(-1, 128) for x in (query, key))
    return rivals.materialise(Inputs(query, key, queue.queue.t()))


class Trainer(nn.Module):
    """Encoders, queues and optimizer that all contestants of one shape share."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.autocast, size = torch.autocast(device.type, torch.bfloat16, shape["dtype"] == "bfloat16"), shape["k"]
        self.backbone_q, self.backbone_k = backbone(), backbone()
        self.head_q, self.head_k = (DenseProjectionHead(256) for _ in range(2))
        self.image_queue, self.dense_queue = (MomentumQueue(size) for _ in range(2))
        self.image_slices, self.dense_slices = (SliceQueue(size, 128) for _ in range(2))
        self.match, self.criterion = DenseCorrespondence(), DenseInfoNCELoss(rivals.TEMPERATURE)
        self.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone_k.requires_grad_(False)
        self.head_k.requires_grad_(False)
        self.trained: list[Tensor] = [*self.backbone_q.parameters(), *self.head_q.parameters()]
        self.optimizer = torch.optim.SGD(self.trained, 0.01, momentum=0.9, weight_decay=1e-4)

    def step(self, losses: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """A training step with one of the ways to compute the loss."""
        with torch.no_grad():
            keys: list[Tensor] = [*self.backbone_k.parameters(), *self.head_k.parameters()]
            torch._foreach_lerp_(keys, self.trained, 0.001)
        with self.autocast:
            loss = losses(images)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Projection, Projection]:
        """Both maps and both projections."""
        with torch.no_grad():
            map_k = self.backbone_k(images)
            key = self.head_k(map_k)
        map_q = self.backbone_q(images)
        return map_q, map_k, self.head_q(map_q), key

    def moco(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            key = self.head_k.image_mlp(self.backbone_k(images).mean((2, 3)))
        query = self.head_q.image_mlp(self.backbone_q(images).mean((2, 3)))
        loss = usual_loss(query, key, self.image_slices)
        self.image_slices.enqueue(key)
        return loss

    def dense(self, images: Tensor, criterion: Any, match: Any, image_queue: Any, dense_queue: Any) -> Tensor:
        map_q, map_k, query, key = self.encode(images)
        with torch.no_grad():
            found = match(map_q, map_k)
        image_loss = criterion(query.image, key.image, image_queue)
        dense_loss = criterion(query.dense, key.dense, dense_queue, found)
        image_queue.enqueue(key.image)
        dense_queue.enqueue(key.pooled)
        total: Tensor = 0.5 * image_loss + 0.5 * dense_loss
        return total

    def usual(self, images: Tensor) -> Tensor:
        return self.dense(images, usual_loss, lambda *maps: matching.usual(maps), self.image_slices, self.dense_slices)

    def ours(self, images: Tensor) -> Tensor:
        return self.dense(images, self.criterion, self.match, self.image_queue, self.dense_queue)

    def parts(self, images: Tensor) -> dict[str, Callable[[Tensor], Any]]:
        """What the dense term adds, each alone, on the tensors of one step."""
        with torch.no_grad(), self.autocast:
            map_q, map_k, query, key = self.encode(images)
            found = self.match(map_q, map_k)
        features, dense = map_q.detach().requires_grad_(), query.dense.requires_grad_()

        def head(_: Tensor) -> None:
            with self.autocast:
                out = self.head_q.dense_mlp(features)
                with torch.no_grad():
                    self.head_k.dense_mlp(map_k).mean((2, 3))
            torch.autograd.grad(out, [features, *self.head_q.dense_mlp.parameters()], torch.ones_like(out))

        def loss(_: Tensor) -> None:
            with self.autocast:
                out = self.criterion(dense, key.dense, self.dense_queue, found)
            torch.autograd.grad(out, dense)

        return {
            "part: dense head": head,
            "part: matching": lambda _: self.match(map_q, map_k),
            "part: dense loss": loss,
            "part: second queue": lambda _: self.dense_queue.enqueue(key.pooled),
        }


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    dtype = "bfloat16" if arguments.device.type == "cuda" else "float32"
    for k in (64,) if arguments.toy else (1024, 65536):
        yield {"backbone": "small", "batch": 32, "pixels": 64, "k": k, "dtype": dtype}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    device: torch.device = arguments.device
    torch.manual_seed(0)
    trainer = Trainer(shape, device).train()
    size = (shape["batch"], 3, shape["pixels"], shape["pixels"])
    images = [torch.randn(size, device=device).to(memory_format=torch.channels_last) for _ in range(3)]
    losses = {
        "MoCo-v2": trainer.moco,
        "DenseCL, the usual way": trainer.usual,
        OURS: trainer.ours,
        f"{OURS}, compiled": compiled(trainer.ours),
    }
    entries = {name: functools.partial(trainer.step, loss) for name, loss in losses.items()}
    return compare(entries | trainer.parts(images[0]), images, device, seconds=arguments.seconds)


SUITE = Suite("step", "{backbone} encoder, batch {batch}, {pixels} px, K = {k:,}", shapes, measure)
