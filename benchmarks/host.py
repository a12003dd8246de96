"""What a small call costs on the host: its time beside the lines it replaces, the Python frames it passes, and how long
the kernels wait for it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import rivals
from benchmarks.matching import scaled
from benchmarks.measure import Row, compare, quartiles, significant
from benchmarks.queue import SliceQueue
from benchmarks.records import OURS, Shape, Suite
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, MomentumQueue, _backends, _triton

CALLS = (
    "loss, forward and backward, 8 x 128 and 64 negatives",
    "loss, forward",
    "matching, 2 x 64 x 3 x 3",
    "enqueue, 8 keys",
)
FIRST_LAUNCH = "loss, until the first kernel is launched"
NUMBER = 50  # calls that are timed together


def contestants(call: str) -> dict[str, Callable[[], Any]]:
    ours, usual, criterion = MomentumQueue(64, 128), SliceQueue(64, 128), DenseInfoNCELoss()
    if call.startswith("enqueue"):
        keys = torch.randn(8, 128)
        return {OURS: lambda: ours.enqueue(keys), "slice, host pointer": lambda: usual.enqueue(keys)}
    if call.startswith("matching"):
        match, maps = DenseCorrespondence(), (torch.randn(2, 64, 3, 3), torch.randn(2, 64, 3, 3))
        return {OURS: lambda: match(*maps), "bmm, scale, argmax": lambda: scaled(maps)}
    train = "backward" in call
    query, key = torch.randn(8, 128, requires_grad=train), torch.randn(8, 128)
    inputs = rivals.Inputs(query, key, usual.queue.t())
    if train:
        return {
            OURS: lambda: criterion(query, key, ours).backward(),  # type: ignore[no-untyped-call]
            "MoCo's lines": lambda: rivals.materialise(inputs).backward(),  # type: ignore[no-untyped-call]
        }
    return {OURS: lambda: criterion(query, key, ours), "MoCo's lines": lambda: rivals.materialise(inputs)}


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    for call in [*CALLS, *([FIRST_LAUNCH] if find_spec("triton") else [])]:
        yield {"call": call}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if shape["call"] == FIRST_LAUNCH:
            return {OURS: until_first_launch(20 if arguments.toy else 2000)}
        entries = contestants(shape["call"])
        repeated = {name: partial(repeat, run) for name, run in entries.items()}
        rows = compare(repeated, [NUMBER], torch.device("cpu"), seconds=arguments.seconds)
        for row in rows.values():
            row["milliseconds"] = [significant(x / NUMBER) for x in row["milliseconds"]]
        rows[OURS]["frames"] = frames(entries[OURS])
        return rows
    finally:
        torch.set_num_threads(threads)


def repeat(run: Callable[[], Any], number: int) -> None:
    for _ in range(number):
        run()


def frames(run: Callable[[], Any]) -> int:
    """Python functions entered by one call after the first ones, generators each time they go on."""
    run()
    entered: list[str] = []
    sys.setprofile(lambda frame, event, argument: entered.append(event))
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered.count("call") - 1  # the lambda itself


class Launched(BaseException):
    """The first kernel would now be launched. (After an Exception the package would turn to blockwise.)"""


def until_first_launch(rounds: int) -> Row:
    """With a stand-in for the kernels, so that nothing of the launch itself is counted."""

    def launch(**arguments: Any) -> None:
        reached = time.perf_counter()
        sys.setprofile(None)  # the way back is not counted
        raise Launched(reached)

    @cache
    def describe(device: torch.device) -> _triton.Device:
        return _triton.Device("sm_90", 132)

    criterion, queue = DenseInfoNCELoss(backend="triton"), MomentumQueue(64, 128)
    query, key = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
    kernels, times = SimpleNamespace(prepare_kernel={(1,): launch}), []

    def call() -> None:
        began = time.perf_counter()
        try:
            criterion(query, key, queue)
        except Launched as reached:
            times.append(1e3 * (reached.args[0] - began))

    with (
        mock.patch.object(_backends, "KERNEL_DEVICES", ("cpu",)),
        mock.patch.object(_triton, "describe", describe),
        mock.patch("densecl_ops.info_nce.triton_launch.kernels", kernels),
    ):
        for _ in range(rounds):
            call()
        entered = frames(call) - 1  # the launcher itself
    late = quartiles(times[rounds // 10 :])
    return {"milliseconds": late, "rounds": rounds, "peak_extra_mib": None, "frames": entered}


SUITE = Suite("host", "{call}", shapes, measure)
