"""Tile shapes of the loss kernels: a fixed table, so that results and start-up never depend on a tuning run.

Rows were chosen by compiling (`make kernels`): the largest tiles whose registers do not spill and whose shared memory
fits. Which of several such tiles is fastest waits for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from densecl_ops import _launch


class Config(NamedTuple):
    """One row of the table.

    Attributes:
        block_n: Query rows per program.
        block_k: Queue rows per tile.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
        programs: How many such programs one multiprocessor holds at once; decides how often the queue is split.
        chunk_d: Channels per step of the first product, or None to keep all channels of the query block in place.
        descriptor: Whether whole tiles come by a tensor descriptor (TMA) where that can be. No row of the table asks
            for it: no GPU has shown yet that it is right and faster.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1
    chunk_d: int | None = None
    descriptor: bool = False


# Exact float32 is three tf32 products of split operands. Held in place, the split queries spill: 10 KB
# per thread at D = 128 (64 x 32 on sm_80), 35 KB at D = 512 (16 x 32). In steps of 32 channels nothing does.
_TF32X3 = (
    Config(64, 32, 4, 2, 2, chunk_d=32),
    Config(64, 32, 8, 2, chunk_d=32),
    Config(32, 32, 8, 2, chunk_d=32),
    Config(16, 16, 8, 2, chunk_d=32),
)

# Wide rows in 16 bits where the tensor cores want the queries in registers: in steps too, or 32 x 32 is the limit.
_WIDE = (Config(64, 64, 8, 2, chunk_d=64), Config(32, 64, 8, 2, chunk_d=64))

# (family, bytes per element) -> rows for D up to 64, 128, 256, 512.
ATTEND = {
    # 99 KiB of shared memory on all but sm_80.
    ("mma", 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), *_WIDE),
    # Operands in shared memory: two warpgroups of 64 rows. 128 x 256 would serialise wgmma (ptxas C7511).
    ("wgmma", 2): (Config(128, 128, 8, 3), Config(128, 128, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
    # Accumulators in tensor memory; 512 channels do not fit there beside the logits and fall back to mma.
    ("tcgen05", 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), *_WIDE),
    # 64 KiB of shared memory.
    ("mfma", 2): (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 32, 8, 2), Config(16, 32, 8, 2)),
    ("mma", 4): _TF32X3,
    ("wgmma", 4): _TF32X3,
    ("tcgen05", 4): (_TF32X3[1], *_TF32X3[1:]),  # at D = 64 four warps spill 64 bytes there
    # CDNA multiplies float32 as it is.
    ("mfma", 4): (
        Config(64, 32, 8, 2),
        Config(16, 32, 4, 2, 2),
        Config(32, 16, 8, 2),
        Config(16, 32, 8, 2, chunk_d=32),
    ),
}

# The gradient to the negatives is rare (SimCLR-style use), so one row serves every GPU: the smallest memory rules.
GRAD_NEGATIVES = {
    2: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(32, 32, 4, 2), Config(16, 32, 8, 2)),
    4: (Config(32, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 16, 8, 2), Config(16, 16, 8, 1)),
}


def choose(architecture: str, dtype: torch.dtype, channels: int, lean: bool = True) -> Config:
    """The row for attend_kernel.

    Args:
        architecture: One of densecl_ops._launch.FAMILIES.
        dtype: Of the products.
        channels: D.
        lean: Whether no `exclude` is asked for and D is a power of two; masks take registers.
    """
    if architecture == "interpreter":  # every tile step costs milliseconds there, whatever its size
        return Config(32, 64, 4, 1, chunk_d=32 if channels > 64 else None)
    config = ATTEND[_launch.family(architecture), dtype.itemsize][_width(channels)]
    return config if lean or config.block_k <= 32 else config._replace(block_k=config.block_k // 2)


def choose_grad_negatives(architecture: str, dtype: torch.dtype, channels: int) -> Config:
    """The row for grad_negatives_kernel."""
    if architecture == "interpreter":
        return Config(32, 64, 4, 1)
    return GRAD_NEGATIVES[dtype.itemsize][_width(channels)]


def tile_by_descriptor(architecture: str, config: Config, channels: int) -> list[int] | None:
    """Rows and channels of the tiles that attend_kernel loads by a descriptor; None where it loads by pointers.

    sm_120 has TMA too. That form was not compiled for it.
    """
    has_tma = _launch.family(architecture) in ("wgmma", "tcgen05", "interpreter")
    return [config.block_k, block_d(channels)] if config.descriptor and config.chunk_d is None and has_tma else None


def block_d(channels: int) -> int:
    """D rounded up to what tl.dot takes: a power of two of at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


def row_block(width: int) -> int:
    """Rows of block_d(D) channels per program that does no products: 4,096 elements fit 4 warps' registers."""
    return max(1, 4096 // width)


def _width(channels: int) -> int:
    """Column of the table."""
    return max(0, block_d(channels).bit_length() - 7)
