"""Enqueueing against the usual slice with a host pointer and the clone of the queue that goes with it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Row, compare
from benchmarks.records import OURS, Shape, Suite
from densecl_ops import MomentumQueue


class SliceQueue(nn.Module):
    """As MoCo and DenseCL write it: (D, K), the position read on the host, K a multiple of the batch."""

    queue: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        keys = F.normalize(keys, dim=1)
        start = int(self.position)
        assert self.queue.shape[1] % len(keys) == 0
        self.queue[:, start : start + len(keys)] = keys.t()
        self.position[0] = (start + len(keys)) % self.queue.shape[1]


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    sizes = [(4, 64, 16)] if arguments.toy else [(32, 65536, 128), (256, 65536, 128), (4096, 65536, 128)]
    for n, k, d in sizes:
        yield {"n": n, "k": k, "d": d, "dtype": "float32"}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    device: torch.device = arguments.device
    n, k, d = shape["n"], shape["k"], shape["d"]
    torch.manual_seed(0)
    ours, usual = MomentumQueue(k, d).to(device), SliceQueue(k, d).to(device)

    def with_clone(keys: Tensor) -> Tensor:  # what the loss does beside it in every step
        usual.enqueue(keys)
        return usual.queue.clone().detach()

    entries = {OURS: ours.enqueue, "slice, host pointer": usual.enqueue, "the same, queue cloned": with_clone}
    return compare(entries, [torch.randn(n, d, device=device) for _ in range(4)], device, seconds=arguments.seconds)


SUITE = Suite("queue", "{n:,} keys into {k:,} x {d}", shapes, measure)
