"""One rank of test_distributed.py: python distributed_worker.py RANK WORLD DIRECTORY."""

from __future__ import annotations

import copy
import datetime
import pickle
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_training as training
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densecl_ops import MomentumQueue
from densecl_ops.functional import in_batch_negatives

SIZE, DIM = 11, 4
# Keys per rank (cycled) of successive enqueues: even, uneven, a rank with none, nobody with any, n > size.
ROUNDS = {
    "even": [[2, 2], [3, 3], [3, 3]],
    "uneven": [[1, 3], [4, 2], [5, 1], [2, 6]],
    "a rank without keys": [[0, 3], [2, 0], [0, 0], [0, 9]],
    "more than size": [[9, 13], [1, 2]],
}
CUT = 2  # steps before a run is interrupted


def keys_of(name: str, step: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What every process can recompute of any rank."""
    sizes = ROUNDS[name][step]
    generator = torch.Generator().manual_seed(1000 * list(ROUNDS).index(name) + 10 * step + rank)
    return torch.randn(sizes[rank % 2], DIM, generator=generator, dtype=torch.float64).to(dtype)


def new_queue(rank: int, init: str = "random", dtype: torch.dtype = torch.float64, **options: Any) -> MomentumQueue:
    """Another random start on every rank."""
    torch.manual_seed(7 + rank)
    return MomentumQueue(SIZE, DIM, init=init, dtype=dtype, **options)


def enqueue_rounds(queue: MomentumQueue, name: str, rank: int, steps: range) -> dict[str, Tensor]:
    for step in steps:
        queue.enqueue(keys_of(name, step, rank))
    return {key: value.clone() for key, value in queue.state_dict().items()}


def run_rounds(name: str, rank: int, dtype: torch.dtype, init: str) -> list[dict[str, Tensor]]:
    """The state after every enqueue."""
    queue = new_queue(rank, init, dtype)
    return [enqueue_rounds(queue, name, rank, range(step, step + 1)) for step in range(len(ROUNDS[name]))]


def error_of(function: Callable[[], object]) -> str:
    """The error's type and text; the ranks are on their own if one of them got none."""
    began = time.perf_counter()
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        assert time.perf_counter() - began < 20, "waited for the time limit of the process group"
        return f"{type(error).__name__}: {error}"
    return "no error"


def resumed(rank: int, loads: bool) -> dict[str, Tensor]:
    """An interrupted run, and another that goes on with its checkpoint on the ranks that load it."""
    queue = new_queue(rank)
    state = enqueue_rounds(queue, "uneven", rank, range(CUT))
    queue = new_queue(rank)
    if loads:
        queue.load_state_dict(state)
    return enqueue_rounds(queue, "uneven", rank, range(CUT, 4))


def loaded_in_mid_run(rank: int) -> dict[str, Tensor]:
    """Rank 0 goes back to the first steps' state, when all queues are equal already."""
    queue = new_queue(rank)
    state = enqueue_rounds(queue, "uneven", rank, range(CUT))
    queue.enqueue(torch.ones(rank, DIM))
    if rank == 0:
        queue.load_state_dict(state)
    return enqueue_rounds(queue, "uneven", rank, range(CUT, 4))


def under_a_default_device(rank: int) -> dict[str, Tensor]:
    queue, keys = new_queue(rank), [keys_of("uneven", step, rank) for step in range(4)]
    with torch.device("meta"):
        for batch in keys:
            queue.enqueue(batch)
    return queue.state_dict()


def copied(rank: int) -> dict[str, Any]:
    """Deep copies share the process group and nothing else."""
    group = dist.new_group()
    queue = new_queue(rank, process_group=group)
    first = enqueue_rounds(queue, "uneven", rank, range(CUT))
    twin = copy.deepcopy(nn.Sequential(queue))[0]
    return {
        "twin": enqueue_rounds(twin, "uneven", rank, range(CUT, 4)),
        "untouched": all(torch.equal(value, first[key]) for key, value in queue.state_dict().items()),
        "shared": twin.process_group is queue.process_group is group,
        "pickled": error_of(lambda: pickle.dumps(queue)),
        "default": pickle.loads(pickle.dumps(new_queue(rank))).process_group is None,
    }


def weight_of(rank: int, rows: int) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(500 + rank), dtype=torch.float64)


def batch_gradient(rank: int, world: int) -> dict[str, Tensor]:
    """Every rank asks something else of all rows, and gives autograd the same gradient for another tensor."""
    keys = keys_of("uneven", 0, rank).requires_grad_()
    other = torch.zeros(sum(len(keys_of("uneven", 0, r)) for r in range(world)), DIM).double().requires_grad_()
    doubled = 2 * other  # made before the negatives, so that its gradient is computed after theirs
    negatives, _ = in_batch_negatives(keys)
    ((negatives + doubled) * weight_of(rank, len(negatives))).sum().backward()
    return {"keys": keys.grad, "other": other.grad}


def bad_keys(queue: MomentumQueue, rank: int) -> dict[str, str]:
    """Rank 1 alone makes a mistake."""
    bad = {
        "dim": torch.ones(2, DIM + 1),
        "shape": torch.ones(2, DIM, 1),
        "integer": torch.ones(2, DIM).long(),
        "list": [[0.0] * DIM],
    }
    good = torch.ones(2, DIM)
    errors = {key: error_of(lambda keys=keys: queue.enqueue(keys if rank == 1 else good)) for key, keys in bad.items()}
    errors["queue size"] = error_of(lambda: MomentumQueue(SIZE + 3 * (rank == 1), DIM).enqueue(good))
    dim = DIM + (rank == 1)
    errors["queue dim"] = error_of(lambda: MomentumQueue(SIZE, dim).enqueue(torch.ones(2, dim)))
    dtype = torch.bfloat16 if rank == 1 else torch.float32
    errors["queue dtype"] = error_of(lambda: MomentumQueue(SIZE, DIM, dtype=dtype).enqueue(good))
    errors["batch dim"] = error_of(lambda: in_batch_negatives(torch.ones(2, dim)))
    errors["batch dtype"] = error_of(lambda: in_batch_negatives(good.to(dtype)))
    errors["batch shape"] = error_of(lambda: in_batch_negatives(good[0] if rank == 1 else good))
    errors["batch gradient"] = error_of(lambda: in_batch_negatives(good.clone().requires_grad_(rank == 1)))
    return errors


class InForward(nn.Module):
    """Enqueues inside the forward pass that DistributedDataParallel sees."""

    def __init__(self, store: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.scale, self.store = nn.Parameter(torch.ones((), dtype=torch.float64)), store

    def forward(self, keys: Tensor) -> Tensor:
        self.store(keys)
        return self.scale * keys.sum()


def under_join(rank: int) -> dict[str, Any]:
    """DistributedDataParallel.join(): this rank takes the batches of "uneven" from the `rank % 2`-th on."""

    def run(store: Callable[[Tensor], object], **options: bool) -> None:
        parallel = DistributedDataParallel(InForward(store), broadcast_buffers=False)
        with parallel.join(**options):
            for step in range(rank % 2, len(ROUNDS["uneven"])):
                parallel(keys_of("uneven", step, rank)).backward()

    local, gathering = new_queue(rank, "empty", gather_distributed=False), new_queue(rank, "empty")
    run(local.enqueue)
    return {
        "local": local.state_dict(),
        "queue": error_of(lambda: run(new_queue(rank).enqueue)),
        "batch": error_of(lambda: run(in_batch_negatives)),
        "throws": error_of(lambda: run(gathering.enqueue, throw_on_early_termination=True)),
        "gathered": gathering.state_dict(),
    }


def pairs(rank: int, world: int) -> dict[str, Any]:
    """Ranks 0 and 1 have a queue of their own, and so have 2 and 3; each pair calls at its own time."""
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    mine, others = groups[rank // 2], groups[1 - rank // 2] if world == 4 else None
    name = list(ROUNDS)[rank // 2]
    queue = new_queue(rank, process_group=mine)
    results: dict[str, Any] = {"state": enqueue_rounds(queue, name, rank, range(len(ROUNDS[name])))}
    results["batch"] = in_batch_negatives(keys_of("uneven", 0, rank), process_group=mine)
    if others is not None:
        results["outside"] = error_of(lambda: new_queue(rank, process_group=others))
        results["outside, batch"] = error_of(lambda: in_batch_negatives(torch.ones(2, DIM), process_group=others))
    # A group for GPUs alone, as NCCL's are, needs a host group besides, which its own ranks have to make by themselves.
    device_only = dist.new_group([0, 1], backend="cuda:gloo")
    if rank < 2:
        results["device"] = error_of(lambda: new_queue(rank, process_group=device_only).enqueue(torch.ones(1, DIM)))
    return results


def compiled(trainer: training.Trainer) -> nn.Module:
    return torch.compile(DistributedDataParallel(trainer), backend="aot_eager")


def compiled_inside(trainer: training.Trainer) -> nn.Module:
    return DistributedDataParallel(torch.compile(trainer, backend="aot_eager"))


def sharded(trainer: training.Trainer) -> nn.Module:
    """FSDP2, which unlike DistributedDataParallel leaves it to the trainer to start alike on every rank."""
    from torch.distributed.fsdp import fully_shard

    trainer.load_state_dict(training.new_trainer("momentum", 0).state_dict())
    for module in (trainer.head, trainer.key_head, trainer):
        fully_shard(module)
    return trainer


def join(rank: int, world: int, rendezvous: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )


def main(rank: int, world: int, directory: Path) -> None:
    torch.set_num_threads(1)
    early = new_queue(rank)
    early.enqueue(torch.ones(2, DIM))  # no process group yet
    join(rank, world, directory / "first")
    results: dict[str, Any] = {
        name: {
            (str(dtype), init): run_rounds(name, rank, dtype, init)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
            for init in ("random", "empty")
        }
        for name in ROUNDS
    }
    local = new_queue(rank, "empty", gather_distributed=False)
    results["local"] = enqueue_rounds(local, "uneven", rank, range(1))
    results["local batch"] = in_batch_negatives(keys_of("uneven", 0, rank), gather_distributed=False)
    mixed = new_queue(rank, "empty")
    mixed.enqueue(keys_of("even", 0, rank, torch.float64 if rank else torch.float32))
    results["mixed keys"] = mixed.state_dict()
    results["gradient"] = batch_gradient(rank, world)
    refused = new_queue(rank)
    results["errors"] = bad_keys(refused, rank)
    results["queue after errors"] = enqueue_rounds(refused, "uneven", rank, range(4))
    results["after errors"] = run_rounds("uneven", rank, torch.float64, "empty")[-1]
    results["resumed"] = {name: resumed(rank, loads) for name, loads in (("all", True), ("rank 0", rank == 0))}
    results["loaded"] = loaded_in_mid_run(rank)
    results["default device"] = under_a_default_device(rank)
    results["copied"] = copied(rank)
    results["pairs"] = pairs(rank, world)
    results["under join"] = under_join(rank)
    for name in training.RUNS:
        results[name] = training.train(name, rank, world, DistributedDataParallel)
    if world == 2:
        with warnings.catch_warnings(record=True) as caught:
            results["wrapped"] = {
                "compiled": training.train("momentum", rank, world, compiled),
                "compiled inside": training.train("momentum", rank, world, compiled_inside),
                "compiled SimCLR": training.train("SimCLR", rank, world, compiled),
            }
        results["compiler warnings"] = [str(one.message) for one in caught]
        results["wrapped"]["sharded"] = training.train("momentum", rank, world, sharded)
    early.enqueue(torch.ones(0, DIM))
    stale = new_queue(rank, process_group=dist.new_group())
    dist.destroy_process_group()
    results["stale"] = error_of(lambda: stale.enqueue(torch.ones(2, DIM)))
    early.enqueue(torch.ones(1 + rank, DIM))  # ranks part again
    join(rank, world, directory / "second")
    results["stale again"] = error_of(lambda: stale.enqueue(torch.ones(2, DIM)))
    results["early"] = enqueue_rounds(early, "uneven", rank, range(4))
    torch.save(results, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
