"""Plans of the loss kernels' launches: tiles, grids, splits of the queue, and every argument that shapes decide.

Tiles come from a fixed table, so that results and start-up never depend on a tuning run. Its rows were chosen by
compiling (`make kernels`): the largest tiles whose registers do not spill and whose shared memory fits. Which of
several such tiles is fastest waits for a GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from densecl_ops import _triton
from densecl_ops.info_nce.eager import Problem


class Config(NamedTuple):
    """One row of the table."""

    block_n: int  # query rows per program
    block_k: int  # queue rows per tile
    num_warps: int
    num_stages: int  # tiles in flight
    programs: int = 1  # that one multiprocessor holds at once; decides how often the queue is split
    chunk_d: int | None = None  # channels per step of the first product; None keeps the whole query block in place
    # Whole tiles by a tensor descriptor (TMA) where that can be. No row asks for it: no GPU has shown that it is right
    # and faster.
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
    # From 64 rows on the second product would be a wgmma, whose split operand is written to shared memory with 16-way
    # bank conflicts: at D = 128 twice the wavefronts and 7 times the barriers of mma, for as many instructions.
    ("wgmma", 4): (Config(32, 64, 4, 2, 2, chunk_d=32), Config(32, 64, 8, 2, chunk_d=32), *_TF32X3[2:]),
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


def choose(architecture: str, dtype: torch.dtype, channels: int, exclude: bool = False) -> Config:
    """The row for attend_kernel, with half of its tile where masks take the registers: for a D that is no power of two,
    and for `exclude` with mfma (whole, 14 registers spill on gfx942 at D = 128)."""
    family = _triton.family(architecture)
    config = ATTEND[family, dtype.itemsize][_width(channels)]
    masked = channels != block_d(channels) or (exclude and family == "mfma")
    halved = masked and config.block_k > 32 and dtype != torch.float32
    return config._replace(block_k=config.block_k // 2) if halved else config


class Plan(NamedTuple):
    """Programs and arguments of the three launches of a forward, as far as shapes, dtypes and the device decide."""

    splits: int  # parts in which the queue is read
    tile: list[int] | None  # rows and channels of a tile that is loaded by a descriptor
    prepare_grid: tuple[int]
    attend_grid: tuple[int, int]
    combine_grid: tuple[int]
    prepare: dict[str, Any]
    attend: dict[str, Any]
    combine: dict[str, Any]


def plan_forward(problem: Problem, splits: int | None) -> Plan:
    """The plan of a call; `splits` overrides it."""
    query, key, negatives = problem.query, problem.key, problem.negatives
    device, channels = _triton.describe(query.device), query.shape[1]
    return _plan_forward(
        ((query.shape, query.stride()), (key.shape, key.stride())),
        negatives.shape[0],
        negatives.dtype,
        problem.matmul_dtype,
        device,
        choose(device.architecture, problem.matmul_dtype, channels, problem.exclude is not None),
        precision(problem),
        splits,
    )


@functools.lru_cache(maxsize=1024)  # built once per shape: small problems are bound by the host
def _plan_forward(
    maps: tuple[tuple[torch.Size, tuple[int, ...]], ...],
    size: int,
    row_dtype: torch.dtype,
    dtype: torch.dtype,
    device: _triton.Device,
    config: Config,
    precision: str,
    splits: int | None,
) -> Plan:
    (batch, channels, positions), (_, _, key_positions) = (shape for shape, _ in maps)
    # A single position may have any stride. Were it 1, as in NCHW, vectors would be read 2 bytes at a time.
    query_stride, key_stride = ((*s[:2], channels) if shape[2] == 1 else s for shape, s in maps)
    rows, width = batch * positions, block_d(channels)
    slots = device.multiprocessors * config.programs
    # The parts of the numerator, in float32, are at most twice the bytes of the queue.
    most = max(1, size * dtype.itemsize // (2 * rows))
    per_split = plan_split(rows, size, config.block_n, config.block_k, slots, splits, most)
    splits = triton.cdiv(size, per_split)
    shape = {"rows": rows, "CHANNELS": channels, "BLOCK_D": width}
    # prepare: the image of two NCHW maps where 8 warps' registers hold it, else the 4,096 elements that 4 warps hold.
    nchw, grid = ((positions, 1), (key_positions, 1)), max(positions, key_positions)
    image = (query_stride[1:], key_stride[1:]) == nchw and positions >= 16 and grid <= 64 and width <= 128
    prepare_rows = triton.next_power_of_2(grid) if image else max(1, 4096 // width)
    # combine: with more than 4 elements a thread, those of bfloat16 maps and float32 parts cannot both be read in whole
    # sectors; and few rows a program leave more programs.
    combine_rows = max(1, 1024 // width)
    # attend: in a tile a row has 8 columns side by side, or 2 halves (tcgen05), or lies in several warps. mfma spills
    # least with 16 in the narrowest tile, and 8 in others.
    family, sums = _triton.family(device.architecture), 8
    if family == "mfma":
        sums = 16 if config.block_n == 16 else 8
    elif family == "tcgen05" and config.block_n == 128:
        sums = 2
    elif 16 * config.num_warps > config.block_n:
        sums = config.block_k
    return Plan(
        splits,
        tile_by_descriptor(device.architecture, config, channels),
        prepare_grid=(batch if image else triton.cdiv(rows, prepare_rows),),
        attend_grid=(triton.cdiv(rows, config.block_n), splits),
        combine_grid=(triton.cdiv(rows, combine_rows),),
        prepare={
            "ROW_DTYPE": getattr(tl, str(row_dtype).removeprefix("torch.")),
            "PRECISION": precision,
            "IMAGE": image,
            "BLOCK_N": prepare_rows,
            "num_warps": max(1, prepare_rows * width // 1024) if image else 4,
            "positions": positions,
            "key_positions": key_positions,
            **shape,
            **_triton.strides("query", query_stride, "bdp"),
            **_triton.strides("key", key_stride, "bdp"),
            **_triton.OPTIONS,
        },
        attend={
            "positions": positions,
            "size": size,
            "per_split": per_split,
            "PRECISION": precision,
            "SUMS": sums,
            "CHUNK_D": config.chunk_d or width,
            **shape,
            **_tile(config),
        },
        combine={
            "size": size,
            "splits": splits,
            "BLOCK_N": combine_rows,
            "num_warps": 8,
            **shape,
            **_triton.OPTIONS,
        },
    )


def plan_grad_negatives(problem: Problem, splits: int | None) -> tuple[int, tuple[int, int], dict[str, Any]]:
    """Splits of the query rows, and the grid and arguments of grad_negatives_kernel."""
    batch, channels, positions = problem.query.shape
    rows, size = batch * positions, problem.negatives.shape[0]
    device = _triton.describe(problem.query.device)
    config = GRAD_NEGATIVES[problem.matmul_dtype.itemsize][_width(channels)]
    slots = device.multiprocessors * config.programs
    per_split = plan_split(size, rows, config.block_k, config.block_n, slots, splits)
    splits = triton.cdiv(rows, per_split)
    arguments = {
        "rows": rows,
        "positions": positions,
        "size": size,
        "per_split": per_split,
        "PRECISION": precision(problem),
        "CHANNELS": channels,
        "BLOCK_D": block_d(channels),
        **_tile(config),
    }
    return splits, (triton.cdiv(size, config.block_k), splits), arguments


def _tile(config: Config) -> dict[str, Any]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **_triton.OPTIONS,
    }


@functools.cache
def plan_split(
    items: int, length: int, block: int, step: int, slots: int, splits: int | None = None, most: int | None = None
) -> int:
    """How much of `length` each program takes, a multiple of `step`.

    `items / block` programs share the device's `slots`. Splitting `length` s ways multiplies the programs; the best s
    is the one whose rounds of programs waste least, counting 1% of a full pass per split for adding it up again. Up to
    four rounds: 98 blocks (N = 12,544) on 132 multiprocessors leave a quarter of them idle, 4 x 98 fill three rounds.
    """
    blocks, steps = triton.cdiv(items, block), triton.cdiv(length, step)

    def cost(s: int) -> float:
        return float(triton.cdiv(blocks * s, slots) * triton.cdiv(steps, s) / steps + 0.01 * s * blocks / slots)

    if splits is None:
        most = min(steps, 4 * slots // blocks, most or steps)
        splits = min(range(1, max(1, most) + 1), key=cost)
    return int(triton.cdiv(steps, splits)) * step


def precision(problem: Problem) -> str:
    """input_precision of the products: float32 ones follow torch's setting for float32 products on CUDA."""
    exact = _triton.float32_precision(problem.matmul_dtype, _triton.describe(problem.query.device).architecture)
    return "tf32" if exact == "tf32x3" and _tf32_is_allowed() else exact


def _tf32_is_allowed() -> bool:
    """From torch 2.9 on by torch.backends; the older setting raises when it is read after a new one was written."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def tile_by_descriptor(architecture: str, config: Config, channels: int) -> list[int] | None:
    """Rows and channels of the tiles that attend_kernel loads by a descriptor; None where it loads by pointers.

    sm_120 has TMA too. That form was not compiled for it.
    """
    has_tma = _triton.family(architecture) in ("wgmma", "tcgen05")
    return [config.block_k, block_d(channels)] if config.descriptor and config.chunk_d is None and has_tma else None


def block_d(channels: int) -> int:
    """D rounded up to what tl.dot takes: a power of two of at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


def _width(channels: int) -> int:
    """Column of the table."""
    return max(0, block_d(channels).bit_length() - 7)
