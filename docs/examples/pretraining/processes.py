"""One process, or the many that torchrun starts."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# DDP imports it too. Imported after a process group is there, it keeps the group in default arguments, and the group's
# threads live on while the interpreter ends.
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Answer = TypeVar("Answer")
RUNS = itertools.count()

# What other launchers call RANK, WORLD_SIZE and LOCAL_RANK.
LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)


def read_launcher() -> None:
    """Lets processes of srun or mpirun find each other as those of torchrun do, or refuses to train each alone."""
    for rank, size, local in LAUNCHERS:
        if "RANK" in os.environ or rank not in os.environ or int(os.environ.get(size, 1)) == 1:
            continue
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise SystemExit(
                f"{rank} and {size} say that this is one of {os.environ[size]} processes, but not where they meet: "
                "start them with torchrun, or set MASTER_ADDR and MASTER_PORT"
            )
        os.environ |= {"RANK": os.environ[rank], "WORLD_SIZE": os.environ[size]}
        os.environ["LOCAL_RANK"] = os.environ.get(local, "0")


def start() -> torch.device:
    """Joins the process group, if there is one, and returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # An earlier run in this process has left its addresses behind.
        store = dist.PrefixStore(f"run {next(RUNS)}", store)  # type: ignore[attr-defined]
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
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


def gather(item: Answer) -> list[Answer]:
    """Every process's item, by rank."""
    everyone: list[Any] = [item] * count()
    if count() > 1:
        dist.all_gather_object(everyone, item)
    return everyone


def union(items: dict[Any, Any]) -> dict[Any, Any]:
    """Of all processes' dicts."""
    return {key: value for one in gather(items) for key, value in one.items()}


def together(ask: Callable[[], Answer]) -> Answer:
    """What `ask` answers here; where one process gives up, all do, in its words."""
    answer, problem = None, None
    try:
        answer = ask()
    except (SystemExit, OSError) as error:
        problem = str(error)
    problems = [one for one in gather(problem) if one is not None]
    if problems:
        raise SystemExit(problems[0])
    return answer  # type: ignore[return-value]


def from_rank_0(ask: Callable[[], Answer]) -> Answer:
    """What `ask` answers on rank 0, everywhere: nodes may not see each other's files."""
    answer: list[Any] = [together(lambda: ask() if rank() == 0 else None)]
    if count() > 1:
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
    return answer[0]  # type: ignore[no-any-return]


def agree(facts: dict[str, Any]) -> None:
    """Stops all processes, in the same words, where they are about to train different things."""
    everyone = gather(facts)
    for name in facts:
        seen = [one[name] for one in everyone]
        if any(one != seen[0] for one in seen):
            told = ", ".join(f"rank {number}: {one}" for number, one in enumerate(seen))
            raise SystemExit(f"processes differ in {name}: {told}")


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
