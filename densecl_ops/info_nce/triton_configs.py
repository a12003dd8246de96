"""Tile shapes of the loss kernels: a fixed table, so that results and start-up never depend on a tuning run."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """One row of the table.

    Attributes:
        block_n: Query rows per program.
        block_k: Queue rows per tile.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
        programs: How many such programs one multiprocessor holds at once, for the split of the queue.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int


# Shared memory per block decides: 99 KiB (consumer and Ada), 163 (A100), 227 (Hopper, data-centre Blackwell).
FAMILIES = {
    "sm_80": "ampere",
    "sm_86": "consumer",
    "sm_89": "consumer",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "sm_103": "blackwell",
    "sm_120": "consumer",
    "gfx90a": "cdna",
    "gfx942": "cdna",
    "gfx950": "cdna",
    "interpreter": "interpreter",
}


def block_d(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def row_block(channels: int) -> int:
    """Rows per program of the kernels that do no products: 4,096 elements of each matrix fit 4 warps' registers."""
    return max(1, 4096 // block_d(channels))


def choose(architecture: str, dtype: torch.dtype, channels: int) -> Config:
    """The row of the table for attend_kernel."""
    if architecture == "interpreter":  # every tile step costs milliseconds there, whatever its size
        return Config(32, 64, 4, 1, 1)
    return Config(64, 64, 4, 2, 2)


def choose_grad_negatives(architecture: str, dtype: torch.dtype, channels: int) -> Config:
    return choose(architecture, dtype, channels)
