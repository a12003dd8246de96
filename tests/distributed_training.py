"""Small trainers for the ranks of test_distributed.py, and the same step on one process from the textbook formula."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import in_batch_negatives

STEPS, TEMPERATURE, RATE = 3, 0.2, 0.1
# Style, images per rank (cycled) and reduction: ranks with unequal batches add up with "sum" alone.
RUNS = {
    "momentum": ("momentum", (2, 2), "mean"),
    "momentum, uneven": ("momentum", (1, 3), "sum"),
    "SimCLR": ("SimCLR", (2, 2), "mean"),
    "SimCLR, uneven": ("SimCLR", (3, 1), "sum"),
    "BYOL": ("BYOL", (2, 2), "mean"),
    "BYOL, uneven": ("BYOL", (1, 2), "sum"),
}


class Trainer(nn.Module):
    """One training step of three styles: queues (MoCo), negatives from the batch with gradient, and without."""

    def __init__(self, style: str, reduction: str) -> None:
        super().__init__()
        self.style = style
        self.head = DenseProjectionHead(3, 4, 5)
        if style != "SimCLR":
            self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        if style == "momentum":
            self.image_queue, self.dense_queue = MomentumQueue(13, 5), MomentumQueue(13, 5)
        self.criterion = DenseInfoNCELoss(TEMPERATURE, reduction)
        self.match = DenseCorrespondence()

    def forward(self, view_q: Tensor, view_k: Tensor) -> Tensor:
        query, key = self.head(view_q), (self.head if self.style == "SimCLR" else self.key_head)(view_k)
        match = self.match(view_q, view_k)
        if self.style == "momentum":
            image_loss = self.criterion(query.image, key.image, self.image_queue)
            dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, match)
            self.image_queue.enqueue(key.image)
            self.dense_queue.enqueue(key.pooled)
        else:
            image_rows, own = in_batch_negatives(key.image)
            dense_rows, _ = in_batch_negatives(key.pooled)
            image_loss = self.criterion(query.image, key.image, image_rows, exclude=own)
            dense_loss = self.criterion(query.dense, key.dense, dense_rows, match, exclude=own)
        return image_loss + dense_loss


def new_trainer(name: str, rank: int) -> Trainer:
    """Ranks start from different seeds; whatever wraps them has to start from rank 0's."""
    torch.manual_seed(100 + rank)
    return Trainer(RUNS[name][0], RUNS[name][2]).double()


def batches(name: str, world: int) -> Iterator[tuple[tuple[Tensor, Tensor], list[int]]]:
    """The whole batch of every step, two views of (B, 3, 4, 4), and how many of its images each rank holds."""
    sizes = [RUNS[name][1][rank % 2] for rank in range(world)]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        first, second = torch.randn(2, sum(sizes), 3, 4, 4, generator=generator, dtype=torch.float64)
        yield (first, second), sizes


def rows_of_loss(query: Tensor, key: Tensor, index: Tensor | None, negatives: Tensor, own: Tensor | None) -> Tensor:
    """The loss of every row, with all logits in memory."""
    q, k = F.normalize(query.flatten(2), dim=1), F.normalize(key.flatten(2), dim=1)
    if index is not None:
        k = k.gather(2, index[:, None].expand(-1, k.shape[1], -1))
    positive = (q * k).sum(1) / TEMPERATURE
    logits = torch.einsum("bdp,kd->bpk", q, negatives) / TEMPERATURE
    if own is not None:
        logits = logits.masked_fill(F.one_hot(own, len(negatives)).bool()[:, None], -torch.inf)
    return torch.cat([positive[..., None], logits], 2).logsumexp(2) - positive


def textbook(name: str, world: int) -> Iterator[tuple[Tensor, nn.Module, dict[str, oracle.Queue]]]:
    """One process on the whole batch, after every step: loss from the formula, the head, and deques as queues."""
    style, _, reduction = RUNS[name]
    trainer, queues = new_trainer(name, 0), {}
    if style == "momentum":
        named = {"image_queue": trainer.image_queue, "dense_queue": trainer.dense_queue}
        queues = {key: oracle.Queue(13, queue.rows.numpy().copy()) for key, queue in named.items()}
    for (view_q, view_k), _ in batches(name, world):
        query, key = trainer.head(view_q), (trainer.head if style == "SimCLR" else trainer.key_head)(view_k)
        index = torch.einsum("bci,bcj->bij", view_q.flatten(2), F.normalize(view_k.flatten(2), dim=1)).argmax(2)
        own = None if queues else torch.arange(len(view_q))
        if queues:
            image_rows, dense_rows = (torch.from_numpy(queue.rows()) for queue in queues.values())
        else:
            image_rows, dense_rows = F.normalize(key.image, dim=1), F.normalize(key.pooled, dim=1)
        terms = [
            rows_of_loss(query.image[:, :, None], key.image[:, :, None], None, image_rows, own),
            rows_of_loss(query.dense, key.dense, index, dense_rows, own),
        ]
        # DistributedDataParallel divides sums over the ranks by their number.
        loss = sum(term.mean() if reduction == "mean" else term.sum() / world for term in terms)
        trainer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in trainer.head.parameters():
                parameter -= RATE * parameter.grad
        for queue, keys in zip(queues.values(), (key.image, key.pooled), strict=False):
            queue.enqueue(keys.numpy())
        yield loss.detach(), trainer.head, queues
