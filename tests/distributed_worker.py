"""One rank of test_distributed.py: python distributed_worker.py RANK WORLD DIRECTORY."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from densecl_ops import MomentumQueue

SIZE, DIM = 11, 4
# Keys per rank (cycled) of successive enqueues: even, uneven, a rank with none, nobody with any, n > size.
ROUNDS = {
    "even": [[2, 2], [3, 3], [3, 3]],
    "uneven": [[1, 3], [4, 2], [5, 1], [2, 6]],
    "a rank without keys": [[0, 3], [2, 0], [0, 0], [0, 9]],
    "more than size": [[9, 13], [1, 2]],
}


def keys_of(name: str, step: int, rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What every process can recompute of any rank."""
    sizes = ROUNDS[name][step]
    generator = torch.Generator().manual_seed(1000 * list(ROUNDS).index(name) + 10 * step + rank)
    return torch.randn(sizes[rank % 2], DIM, generator=generator, dtype=torch.float64).to(dtype)


def run_rounds(name: str, rank: int, dtype: torch.dtype, init: str) -> dict[str, Any]:
    torch.manual_seed(7)  # the same random start on every rank
    queue = MomentumQueue(SIZE, DIM, init=init, dtype=dtype)
    for step in range(len(ROUNDS[name])):
        queue.enqueue(keys_of(name, step, rank))
    return queue.state_dict()


def error_of(queue: MomentumQueue) -> str:
    try:
        queue.enqueue(torch.ones(2, queue.dim))
    except ValueError as error:
        return str(error)
    return "no error"


def main(rank: int, world: int, directory: Path) -> None:
    queue = MomentumQueue(SIZE, DIM)
    queue.enqueue(torch.ones(2, DIM))  # no process group yet
    dist.init_process_group(
        "gloo",
        init_method=(directory / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {
        name: {
            (str(dtype), init): run_rounds(name, rank, dtype, init)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
            for init in ("random", "empty")
        }
        for name in ROUNDS
    }
    local = MomentumQueue(SIZE, DIM, init="empty", dtype=torch.float64, gather_distributed=False)
    local.enqueue(keys_of("uneven", 0, rank))
    results["local"] = local.state_dict()
    mixed = MomentumQueue(SIZE, DIM, init="empty", dtype=torch.float64)
    mixed.enqueue(keys_of("even", 0, rank, torch.float64 if rank else torch.float32))
    results["mixed keys"] = mixed.state_dict()
    results["dim"] = error_of(MomentumQueue(SIZE, DIM + rank % 2))
    results["dtype"] = error_of(MomentumQueue(SIZE, DIM, dtype=torch.bfloat16 if rank else torch.float32))
    results["after errors"] = run_rounds("uneven", rank, torch.float64, "empty")
    torch.save(results, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
