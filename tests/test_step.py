"""DenseCL steps, head to queue, against plain torch; they leave no memory behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import assert_close
from recipes import disturb, moco_terms, move
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue


class Step(nn.Module):
    """Everything a trainer holds but a backbone: two heads, two queues, the matching rule and the loss."""

    def __init__(self, backend: str, dtype: torch.dtype, init: str = "random", grid: int | None = 2) -> None:
        super().__init__()
        self.head, self.key_head = (DenseProjectionHead(6, 8, 5, grid_size=grid) for _ in range(2))
        self.key_head.requires_grad_(False)
        self.image_queue, self.dense_queue = (MomentumQueue(13, 5, init=init) for _ in range(2))
        self.match = DenseCorrespondence(grid_size=grid, backend=backend)
        self.criterion = DenseInfoNCELoss(backend=backend)
        self.to(helpers.DEVICES.get(backend, "cpu"), dtype)

    def forward(self, features_q: Tensor, features_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = self.head(features_q)
        with torch.no_grad():
            for ours, theirs in zip(self.key_head.parameters(), self.head.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
            key = self.key_head(features_k)
        image_loss, rank = self.criterion(query.image, key.image, self.image_queue, return_rank=True)
        match = self.match(features_q, features_k)
        dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, match)
        self.image_queue.enqueue(key.image)
        self.dense_queue.enqueue(key.pooled)
        return image_loss, dense_loss, rank


def views(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    first = torch.randn(batch, 6, 5, 4, dtype=torch.float64)
    second = first.flip(3) + 0.5 * torch.randn_like(first)
    return first.to(dtype).contiguous(memory_format=torch.channels_last), second.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],  # the last: autocast
)
def test_training_steps(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Five steps of SGD with batches of different size: losses, rank, gradients, keys, both queues."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    init, grid = ("empty", None) if dtype == torch.float64 else ("random", 2)
    step, twin = Step(backend, wide, init, grid), Step("eager", torch.float64, init, grid)
    optimizer = torch.optim.SGD(step.head.parameters(), lr=0.1)

    def encode(head: nn.Module, features: Tensor) -> Any:
        return nn.functional.adaptive_avg_pool2d(features, grid or features.shape[2:]), head(features)

    for batch in (4, 3, 5, 1, 4):
        images = views(batch, wide)
        disturb(step.head)
        twin.load_state_dict(step.state_dict())
        move(twin.head, twin.key_head)
        queues = twin.image_queue, twin.dense_queue
        *wish, wish_rank = moco_terms(twin.head, twin.key_head, queues, [x.double() for x in images], encode)
        with torch.autocast(helpers.DEVICES.get(backend, "cpu"), torch.bfloat16, enabled=dtype != wide):
            *losses, rank = step(*helpers.to_device(backend, *images))
        assert dtype != wide or torch.equal(rank.cpu(), wish_rank)
        for model, terms in ((step, losses), (twin, wish)):
            model.zero_grad()
            (0.3 * terms[0] + 0.7 * terms[1]).backward()
        for seen, expected in zip(losses, wish, strict=True):
            assert_close(seen, expected, tolerance, "loss")
        for name, parameter in step.head.named_parameters():
            assert_close(parameter.grad, twin.head.get_parameter(name).grad, 2 * tolerance, name)
        assert all(parameter.grad is None for parameter in step.key_head.parameters())
        for name, expected in twin.state_dict().items():
            assert_close(step.state_dict()[name], expected, tolerance, name)
        optimizer.step()


STATM = Path("/proc/self/statm")


def in_use() -> tuple[int, int]:
    """Live tensors, and resident bytes."""
    gc.collect()
    tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
    return tensors, int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
def test_memory_does_not_grow() -> None:
    """Backend, gradients, rank and reduction differ from step to step. One leaked map a step would be 3 MiB."""
    queue, maps = MomentumQueue(64, 8), torch.randn(4, 2, 8, 10, 10)
    matches = [DenseCorrespondence(backend=b, mutual=b == "eager") for b in helpers.BACKENDS]
    criteria = [DenseInfoNCELoss(0.2, r, r == "sum", backend=b) for b in helpers.BACKENDS for r in ("mean", "sum")]

    def steps(count: int) -> None:
        for step in range(count):
            query = maps[0].clone().requires_grad_()
            key = maps[1].clone().requires_grad_(step % 5 == 0)
            match = matches[step % 2](maps[2], maps[3])
            loss = criteria[step % 4](query, key, queue, match, return_rank=step % 3 == 0)
            (loss[0] if isinstance(loss, tuple) else loss).backward()
            queue.enqueue(key.mean((2, 3)))

    steps(100)
    before = in_use()
    steps(500)
    after = in_use()
    assert after[0] <= before[0]  # what earlier tests left may go meanwhile
    assert after[1] - before[1] < 2 * 2**20
