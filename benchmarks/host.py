"""What a small call costs on the host: its time beside the lines it replaces, the Python frames it passes, and how long
the kernels wait for it."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.measure import Row
from benchmarks.queue import SliceQueue
from benchmarks.records import OURS, Shape, Suite, print_rows
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, MomentumQueue

Entries = dict[str, Callable[[], Any]]


def moco_loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """The lines of MoCo that the loss replaces."""
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    positive, negative = torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], dim=1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def usual_match(query: Tensor, key: Tensor) -> Tensor:
    return torch.bmm(query.flatten(2).transpose(1, 2), F.normalize(key.flatten(2), dim=1)).max(2).indices


def loss(backward: bool) -> Entries:
    n, size, dim = 8, 64, 128
    criterion, queue, usual = DenseInfoNCELoss(), MomentumQueue(size, dim), SliceQueue(size, dim)
    query, key = torch.randn(n, dim, requires_grad=backward), torch.randn(n, dim)
    if backward:
        return {
            OURS: lambda: criterion(query, key, queue).backward(),  # type: ignore[no-untyped-call]
            "MoCo's lines": lambda: moco_loss(query, key, usual.queue).backward(),  # type: ignore[no-untyped-call]
        }
    return {OURS: lambda: criterion(query, key, queue), "MoCo's lines": lambda: moco_loss(query, key, usual.queue)}


def matching() -> Entries:
    match, features = DenseCorrespondence(), torch.randn(2, 2, 64, 3, 3)
    return {OURS: lambda: match(*features), "bmm, scale, max": lambda: usual_match(*features)}


def enqueue() -> Entries:
    ours, usual, keys = MomentumQueue(64, 128), SliceQueue(64, 128), torch.randn(8, 128)
    return {OURS: lambda: ours.enqueue(keys), "slice, host pointer": lambda: usual.enqueue(keys)}


CALLS: dict[str, Callable[[], Entries]] = {
    "loss, forward and backward, 8 x 128 and 64 negatives": lambda: loss(backward=True),
    "loss, forward": lambda: loss(backward=False),
    "matching, 2 x 64 x 3 x 3": matching,
    "enqueue, 8 keys": enqueue,
}
FIRST_LAUNCH = "loss, until the first kernel is launched"


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    for call in CALLS:
        yield {"call": call}
    if find_spec("triton"):
        yield {"call": FIRST_LAUNCH}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if shape["call"] == FIRST_LAUNCH:
            return {OURS: until_first_launch(20 if arguments.toy else 2000)}
        entries = CALLS[shape["call"]]()
        rows = in_turn(entries, arguments.seconds)
        rows[OURS]["frames"] = frames(entries[OURS])
        return rows
    finally:
        torch.set_num_threads(threads)


def in_turn(entries: Entries, seconds: float, number: int = 50) -> dict[str, Row]:
    """Times of one call, as quartiles over rounds in which every contestant runs `number` times."""
    timers = {name: Timer("run()", globals={"run": run}, num_threads=1) for name, run in entries.items()}
    times: dict[str, list[float]] = {name: [] for name in entries}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[OURS]) < 5:
        for name, timer in timers.items():
            times[name].append(timer.timeit(number).mean)
    return {name: row(of_one) for name, of_one in times.items()}


def row(seconds: list[float]) -> Row:
    quartiles = [round(1e3 * x, 6) for x in statistics.quantiles(seconds, n=4)]
    return {"milliseconds": quartiles, "rounds": len(seconds), "peak_extra_mib": None}


def frames(run: Callable[[], Any]) -> int:
    """Python functions entered by one call after the first ones, generators each time they go on."""
    run()
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered - 1  # the lambda itself


class Launched(BaseException):
    """The first kernel would now be launched."""


def until_first_launch(rounds: int) -> Row:
    """With a stand-in for the kernels, so that nothing of the launch itself is counted."""

    def launch(**arguments: Any) -> None:
        raise Launched(time.perf_counter())

    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        from densecl_ops.info_nce import triton_launch

        entered, times = 0, []
        criterion, queue = DenseInfoNCELoss(backend="triton"), MomentumQueue(64, 128)
        query, key = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
        kernels = SimpleNamespace(prepare_kernel=dict.fromkeys([(1,)], launch))
        with mock.patch.object(triton_launch, "kernels", kernels):

            def call() -> None:
                began = time.perf_counter()
                try:
                    criterion(query, key, queue)
                except Launched as reached:
                    times.append(reached.args[0] - began)

            for _ in range(rounds):
                call()
            entered = frames(call) - 1  # the launcher itself
    return row(times[rounds // 10 :]) | {"frames": entered}


def show(shape: Shape, rows: dict[str, Row], rates: dict[str, float]) -> None:
    print_rows(shape["call"], rows, {"frames": "frames"})


SUITE = Suite("host", shapes, measure, show)
