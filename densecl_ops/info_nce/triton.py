"""The dense InfoNCE loss in fused Triton kernels: plans and launches. The kernels stand in triton_kernels.py.

prepare_kernel reads and normalises the rows, attend_kernel makes partial sums in one pass over the queue,
combine_kernel turns them into loss and gradient. The queue is split when the blocks of query rows alone would not fill
the device; the number of splits depends on shapes and device only and the parts are added in a fixed order, so results
repeat bit by bit.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from densecl_ops import _devices
from densecl_ops.info_nce import blockwise, triton_configs
from densecl_ops.info_nce import triton_kernels as kernels
from densecl_ops.info_nce.problem import Problem, Rows, unit_rows

_LOG2_E = 1.4426950408889634


def forward(problem: Problem, want_grad: bool, want_rank: bool, splits: int | None = None) -> Rows:
    """Same contract as blockwise.forward. `splits` overrides the plan, for tests and tuning."""
    query = problem.query
    batch, channels, positions = query.shape
    rows, size = batch * positions, problem.negatives.shape[0]
    device = _devices.describe(query.device)
    lean = not want_rank and problem.exclude is None and channels == triton_configs.block_d(channels)
    config = triton_configs.choose(device.architecture, problem.matmul_dtype, channels, lean)
    per_split = plan_split(rows, size, config.block_n, config.block_k, device.multiprocessors * config.programs, splits)
    splits = triton.cdiv(size, per_split)

    def new(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return query.new_empty(shape if wanted else (0,), dtype=dtype)

    result = Rows(
        loss=new(batch, positions),
        rank=new(batch, positions, dtype=torch.int64, wanted=want_rank),
        log_sum_exp=new(batch, positions),
        pull=new(batch, positions),
        grad_query=new(batch, positions, channels, wanted=want_grad),
        grad_inverse_temperature=new(batch, positions, wanted=want_grad),
    )
    scale = problem.inverse_temperature
    running_max = not blockwise.is_bounded_by_contract(problem)
    scaled = new(rows, channels, dtype=_product_dtype(problem))
    positive = new(rows)
    parts = {
        "total_ptr": new(splits, rows),
        "top_ptr": new(splits, rows, wanted=running_max),
        "mean_ptr": new(splits, rows, channels, wanted=want_grad),
        "above_ptr": new(splits, rows, dtype=torch.int32, wanted=want_rank),
    }
    raw = {
        "query_ptr": query,
        "key_ptr": problem.key,
        "index_ptr": problem.match_index,
        "scale_ptr": scale if isinstance(scale, Tensor) else None,
        "scale": 0.0 if isinstance(scale, Tensor) else scale,
        **_devices.strides("query", query, "bdp"),
        **_devices.strides("key", problem.key, "bdp"),
        "QUERY_POSITION_FASTEST": _position_fastest(query),
        "KEY_POSITION_FASTEST": _position_fastest(problem.key),
    }
    common = {
        "rows": rows,
        "positions": positions,
        "CHANNELS": channels,
        "BLOCK_D": triton_configs.block_d(channels),
    }
    row_block = triton_configs.row_block(channels)
    row_grid = (triton.cdiv(rows, row_block),)
    with _devices.launching_on(query):
        kernels.prepare_kernel[row_grid](scaled_ptr=scaled, positive_ptr=positive, **raw, **common, BLOCK_N=row_block)
        kernels.attend_kernel[(triton.cdiv(rows, config.block_n), splits)](
            query_ptr=scaled,
            positive_ptr=positive,
            negatives_ptr=problem.negatives,
            exclude_ptr=problem.exclude,
            count_ptr=problem.negatives_count,
            size=size,
            per_split=per_split,
            **_devices.strides("negatives", problem.negatives, "kd"),
            **parts,
            **common,
            RUNNING_MAX=running_max,
            WANT_MEAN=want_grad,
            WANT_RANK=want_rank,
            PRECISION=_precision(problem),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            CHUNK_D=config.chunk_d or triton_configs.block_d(channels),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        kernels.combine_kernel[row_grid](
            positive_ptr=positive,
            loss_ptr=result.loss,
            rank_ptr=result.rank,
            log_sum_exp_ptr=result.log_sum_exp,
            pull_ptr=result.pull,
            grad_query_ptr=result.grad_query,
            grad_scale_ptr=result.grad_inverse_temperature,
            splits=splits,
            **parts,
            **raw,
            **common,
            RUNNING_MAX=running_max,
            WANT_GRAD=want_grad,
            WANT_RANK=want_rank,
            BLOCK_N=row_block,
        )
    return result


def grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor, splits: int | None = None) -> Tensor:
    """Same contract as blockwise.grad_negatives."""
    batch, channels, positions = problem.query.shape
    rows, size = batch * positions, problem.negatives.shape[0]
    device = _devices.describe(problem.query.device)
    config = triton_configs.choose_grad_negatives(device.architecture, problem.matmul_dtype, channels)
    slots = device.multiprocessors * config.programs
    per_split = plan_split(size, rows, config.block_k, config.block_n, slots, splits)
    splits = triton.cdiv(rows, per_split)

    dtype = _product_dtype(problem)
    unit, _ = unit_rows(problem.query, torch.float32)
    left_out = row_weight == 0  # such a row may hold NaN
    unit = unit.masked_fill(left_out[:, :, None], 0.0)
    shift = log_sum_exp.masked_fill(left_out | (log_sum_exp == float("-inf")), 0.0)
    peak = row_weight.abs().amax()  # weights scaled to 1 at most: a mean over many rows underflows float16
    weighted = unit * (row_weight / peak.masked_fill(peak == 0, 1.0))[:, :, None]
    parts = unit.new_empty(splits, size, channels)
    with _devices.launching_on(unit):
        kernels.grad_negatives_kernel[(triton.cdiv(size, config.block_k), splits)](
            query_ptr=(unit * (problem.inverse_temperature * _LOG2_E)).to(dtype),
            weighted_ptr=weighted.to(dtype),
            negatives_ptr=problem.negatives,
            log_sum_exp_ptr=shift,
            exclude_ptr=problem.exclude,
            count_ptr=problem.negatives_count,
            out_ptr=parts,
            rows=rows,
            positions=positions,
            size=size,
            per_split=per_split,
            **_devices.strides("negatives", problem.negatives, "kd"),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            CHANNELS=channels,
            BLOCK_D=triton_configs.block_d(channels),
            PRECISION=_precision(problem),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return parts.sum(0) * (peak * problem.inverse_temperature)


def grad_key(query: Tensor, key: Tensor, index: Tensor | None, row_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Same contract as blockwise.grad_key; sorts instead of adding with float atomics, whose order changes."""
    if index is None:
        return blockwise.grad_key(query, key, index, row_weight, dtype)
    batch, channels, positions = query.shape
    key_positions = key.shape[2]
    matched, order = index.sort(dim=1, stable=True)
    targets = torch.arange(key_positions + 1, device=index.device).expand(batch, -1).contiguous()
    grad = query.new_empty((batch, key_positions, channels), dtype=torch.float32)
    with _devices.launching_on(query):
        kernels.grad_key_kernel[(key_positions, batch)](
            query_ptr=query,
            key_ptr=key,
            weight_ptr=row_weight.neg(),
            order_ptr=order,
            bound_ptr=torch.searchsorted(matched, targets),
            out_ptr=grad,
            positions=positions,
            key_positions=key_positions,
            **_devices.strides("query", query, "bdp"),
            **_devices.strides("key", key, "bdp"),
            BLOCK_P=8,
            CHANNELS=channels,
            BLOCK_D=triton_configs.block_d(channels),
            num_warps=max(1, triton_configs.block_d(channels) // 128),
        )
    return grad


@functools.cache
def plan_split(items: int, length: int, block: int, step: int, slots: int, splits: int | None = None) -> int:
    """How much of `length` each program takes, a multiple of `step`.

    `items / block` programs share the device's `slots`. Splitting `length` s ways multiplies the programs; the best s
    is the one whose rounds of programs waste least, counting 1% of a full pass per split for adding it up again. Up to
    four rounds: 98 blocks (N = 12,544) on 132 multiprocessors leave a quarter of them idle, 4 x 98 fill three rounds.
    """
    blocks, steps = triton.cdiv(items, block), triton.cdiv(length, step)

    def cost(s: int) -> float:
        return float(triton.cdiv(blocks * s, slots) * triton.cdiv(steps, s) / steps + 0.01 * s * blocks / slots)

    if splits is None:
        splits = min(range(1, max(1, min(steps, 4 * slots // blocks)) + 1), key=cost)
    return int(triton.cdiv(steps, splits)) * step


def _precision(problem: Problem) -> str:
    """float32 products follow torch.set_float32_matmul_precision."""
    exact = _devices.exact_precision(problem.matmul_dtype, _devices.describe(problem.query.device).architecture)
    return "tf32" if exact == "tf32x3" and torch.get_float32_matmul_precision() != "highest" else exact


def _position_fastest(x: Tensor) -> bool:
    """Whether neighbouring positions, not channels, lie side by side, as in an NCHW map."""
    return x.shape[2] > 1 and x.stride(2) < x.stride(1)


def _product_dtype(problem: Problem) -> torch.dtype:
    """The interpreter silently miscomputes bfloat16, so it takes the products in float32."""
    return torch.float32 if problem.query.device.type == "cpu" else problem.matmul_dtype
