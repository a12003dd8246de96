"""One process, or the many that torchrun starts."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def start() -> torch.device:
    """Joins torchrun's process group, if there is one, and returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    if "RANK" in os.environ:
        dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    return device


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def distribute(model: nn.Module) -> nn.Module:
    """Averages gradients over the processes.

    On GPUs batch norms share their statistics, as they must: see docs/pretraining.md. Buffers are equal everywhere
    already: to send rank 0's at every step, as DDP does by default, would cost both queues.
    """
    if count() == 1:
        return model
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        if next(model.parameters()).is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        elif rank() == 0:
            print("note: on CPUs each process's batch norms have their own statistics", file=sys.stderr)
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # new and old name
    return DistributedDataParallel(model, **{option: False})  # type: ignore[arg-type]


def without_averaging(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, gradients add up on each process; they are averaged by the first backward outside."""
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def mean(values: Tensor) -> Tensor:
    """Over the processes, on the device."""
    if count() > 1:
        dist.all_reduce(values)
    return values / count()


def union(items: dict[str, str]) -> dict[str, str]:
    """Of all processes' dicts."""
    if count() == 1:
        return items
    everyone: list[Any] = [None] * count()
    dist.all_gather_object(everyone, items)
    return {key: value for one in everyone for key, value in one.items()}


class StopSignal:
    """Turns SIGTERM, by which schedulers announce that they take the machine away, into a question."""

    def __enter__(self) -> StopSignal:
        self.seen = False
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: object) -> None:
        self.seen = True

    def anywhere(self) -> bool:
        """Whether any process was signalled: all get the same answer, so that all stop at the same step.

        Asked over the host (gloo): no device is waited for.
        """
        if count() == 1:
            return self.seen
        flag = torch.tensor(int(self.seen))
        dist.all_reduce(flag)
        return bool(flag)
