"""Gathering keys over the default process group."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the (n, D) rows of every rank in rank order; n may differ between ranks, and be 0.

    Raises:
        ValueError: Ranks disagree on D or dtype; on every rank, where the gather itself would hang or mix up bytes.
    """
    headers = _exchange((rows.shape[0], rows.shape[1], _DTYPE_CODES[rows.dtype]))
    if len({header[1:] for header in headers}) > 1:
        names = {code: str(dtype) for dtype, code in _DTYPE_CODES.items()}
        seen = ", ".join(f"rank {r}: dim {dim}, {names[code]}" for r, (_, dim, code) in enumerate(headers))
        raise ValueError(f"keys: got queues of different dim or dtype ({seen}), expected the same on every rank")
    sizes = [header[0] for header in headers]
    largest = max(sizes)
    if largest == 0:
        return rows
    padded = torch.nn.functional.pad(rows, (0, 0, 0, largest - rows.shape[0])).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _exchange(header: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every rank's header, over a host group: sizes that travelled through a GPU would have to be waited for."""
    mine = torch.tensor(header)
    every = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(every, mine, group=_host_group(dist.group.WORLD))
    return [tuple(one.tolist()) for one in every]


@functools.lru_cache(maxsize=1)
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
