"""The dense InfoNCE loss in fused Triton kernels: plans and launches. The kernels stand in triton_kernels.py.

prepare_kernel reads and normalises the rows, attend_kernel makes partial sums in one pass over the queue,
combine_kernel turns them into loss and gradient. The queue is split when the blocks of query rows alone would not fill
the device; the number of splits depends on shapes and device only and the parts are added in a fixed order, so results
repeat bit by bit.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from densecl_ops import _launch
from densecl_ops.info_nce import blockwise, triton_configs
from densecl_ops.info_nce import triton_kernels as kernels
from densecl_ops.info_nce.problem import Problem, Result, is_bounded_by_contract, unit_vectors

_LOG2_E = 1.4426950408889634


class Plan(NamedTuple):
    """Tiles and splits of one pass over the queue.

    Attributes:
        config: Row of the table.
        per_split: Queue rows of a split.
        splits: How many splits there are.
        running_max: Whether logits may overflow exp() without a running maximum.
    """

    config: triton_configs.Config
    per_split: int
    splits: int
    running_max: bool


class Parts(NamedTuple):
    """What each split leaves, to be added up: the arguments of attend_kernel and combine_kernel that both have."""

    total_ptr: Tensor
    top_ptr: Tensor
    mean_ptr: Tensor
    above_ptr: Tensor


def forward(problem: Problem, want_grad: bool, want_rank: bool, splits: int | None = None) -> Result:
    """As in Backend. `splits` overrides the plan, for tests and tuning."""
    query = problem.query
    plan = _plan(problem, want_rank, splits)
    with _launch.launching_on(query):
        scaled, positive = _prepare(problem)
        parts = _attend(problem, plan, scaled, positive, want_grad, want_rank)
        return _combine(problem, plan, positive, parts, want_grad, want_rank)


def _plan(problem: Problem, want_rank: bool, splits: int | None) -> Plan:
    batch, channels, positions = problem.query.shape
    size = problem.negatives.shape[0]
    device = _launch.describe(problem.query.device)
    lean = not want_rank and problem.exclude is None and channels == triton_configs.block_d(channels)
    config = triton_configs.choose(device.architecture, problem.matmul_dtype, channels, lean)
    slots = device.multiprocessors * config.programs
    per_split = plan_split(batch * positions, size, config.block_n, config.block_k, slots, splits)
    return Plan(config, per_split, triton.cdiv(size, per_split), not is_bounded_by_contract(problem))


def _prepare(problem: Problem) -> tuple[Tensor, Tensor]:
    """Scaled unit queries (N, D) in the product dtype, and the logits of the positives (N,)."""
    batch, channels, positions = problem.query.shape
    scaled = _new(problem, batch * positions, channels, dtype=_product_dtype(problem))
    positive = _new(problem, batch * positions)
    kernels.prepare_kernel[_row_grid(problem)](
        scaled_ptr=scaled,
        positive_ptr=positive,
        **_raw_arguments(problem),
        **_shape_arguments(problem),
        BLOCK_N=triton_configs.row_block(channels),
    )
    return scaled, positive


def _attend(problem: Problem, plan: Plan, scaled: Tensor, positive: Tensor, want_grad: bool, want_rank: bool) -> Parts:
    rows, channels = scaled.shape
    config = plan.config
    parts = Parts(
        total_ptr=_new(problem, plan.splits, rows),
        top_ptr=_new(problem, plan.splits, rows, wanted=plan.running_max),
        mean_ptr=_new(problem, plan.splits, rows, channels, wanted=want_grad),
        above_ptr=_new(problem, plan.splits, rows, dtype=torch.int32, wanted=want_rank),
    )
    kernels.attend_kernel[(triton.cdiv(rows, config.block_n), plan.splits)](
        query_ptr=scaled,
        positive_ptr=positive,
        negatives_ptr=problem.negatives,
        exclude_ptr=problem.exclude,
        count_ptr=problem.count,
        size=problem.negatives.shape[0],
        per_split=plan.per_split,
        **_launch.strides("negatives", problem.negatives, "kd"),
        **parts._asdict(),
        **_shape_arguments(problem),
        RUNNING_MAX=plan.running_max,
        WANT_MEAN=want_grad,
        WANT_RANK=want_rank,
        PRECISION=_precision(problem),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        CHUNK_D=config.chunk_d or triton_configs.block_d(channels),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return parts


def _combine(problem: Problem, plan: Plan, positive: Tensor, parts: Parts, want_grad: bool, want_rank: bool) -> Result:
    batch, channels, positions = problem.query.shape
    result = Result(
        loss=_new(problem, batch, positions),
        rank=_new(problem, batch, positions, dtype=torch.int64, wanted=want_rank),
        log_sum_exp=_new(problem, batch, positions),
        pull=_new(problem, batch, positions),
        grad_query=_new(problem, batch, positions, channels, wanted=want_grad),
        grad_scale=_new(problem, batch, positions, wanted=want_grad),
    )
    kernels.combine_kernel[_row_grid(problem)](
        positive_ptr=positive,
        **{f"{name}_ptr": tensor for name, tensor in result._asdict().items()},
        splits=plan.splits,
        **parts._asdict(),
        **_raw_arguments(problem),
        **_shape_arguments(problem),
        RUNNING_MAX=plan.running_max,
        WANT_GRAD=want_grad,
        WANT_RANK=want_rank,
        BLOCK_N=triton_configs.row_block(channels),
    )
    return result


def _raw_arguments(problem: Problem) -> dict[str, Any]:
    """Of the kernels that read the projections as the user has them."""
    learned = isinstance(problem.scale, Tensor)
    return {
        "query_ptr": problem.query,
        "key_ptr": problem.key,
        "index_ptr": problem.index,
        "scale_ptr": problem.scale if learned else None,
        "scale": 0.0 if learned else problem.scale,
        **_launch.strides("query", problem.query, "bdp"),
        **_launch.strides("key", problem.key, "bdp"),
        "QUERY_POSITION_FASTEST": _position_fastest(problem.query),
        "KEY_POSITION_FASTEST": _position_fastest(problem.key),
    }


def _shape_arguments(problem: Problem) -> dict[str, int]:
    batch, channels, positions = problem.query.shape
    block_d = triton_configs.block_d(channels)
    return {"rows": batch * positions, "positions": positions, "CHANNELS": channels, "BLOCK_D": block_d}


def _row_grid(problem: Problem) -> tuple[int]:
    batch, channels, positions = problem.query.shape
    return (triton.cdiv(batch * positions, triton_configs.row_block(channels)),)


def _new(problem: Problem, *shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
    return problem.query.new_empty(shape if wanted else (0,), dtype=dtype)


def grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor, splits: int | None = None) -> Tensor:
    """As in Backend. `splits` overrides the plan, for tests and tuning."""
    batch, channels, positions = problem.query.shape
    rows, size = batch * positions, problem.negatives.shape[0]
    device = _launch.describe(problem.query.device)
    config = triton_configs.choose_grad_negatives(device.architecture, problem.matmul_dtype, channels)
    slots = device.multiprocessors * config.programs
    per_split = plan_split(size, rows, config.block_k, config.block_n, slots, splits)
    splits = triton.cdiv(rows, per_split)

    dtype = _product_dtype(problem)
    unit, _ = unit_vectors(problem.query, torch.float32)
    left_out = row_weight == 0  # such a row may hold NaN
    unit = unit.masked_fill(left_out[:, :, None], 0.0)
    shift = log_sum_exp.masked_fill(left_out | (log_sum_exp == float("-inf")), 0.0)
    peak = row_weight.abs().amax()  # weights scaled to 1 at most: a mean over many rows underflows float16
    weighted = unit * (row_weight / peak.masked_fill(peak == 0, 1.0))[:, :, None]
    parts = unit.new_empty(splits, size, channels)
    with _launch.launching_on(unit):
        kernels.grad_negatives_kernel[(triton.cdiv(size, config.block_k), splits)](
            query_ptr=(unit * (problem.scale * _LOG2_E)).to(dtype),
            weighted_ptr=weighted.to(dtype),
            negatives_ptr=problem.negatives,
            log_sum_exp_ptr=shift,
            exclude_ptr=problem.exclude,
            count_ptr=problem.count,
            out_ptr=parts,
            rows=rows,
            positions=positions,
            size=size,
            per_split=per_split,
            **_launch.strides("negatives", problem.negatives, "kd"),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            CHANNELS=channels,
            BLOCK_D=triton_configs.block_d(channels),
            PRECISION=_precision(problem),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return parts.sum(0) * (peak * problem.scale)


def grad_key(query: Tensor, key: Tensor, index: Tensor | None, row_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As in Backend: sorts instead of adding with float atomics, whose order changes."""
    if index is None:
        return blockwise.grad_key(query, key, index, row_weight, dtype)
    batch, channels, positions = query.shape
    key_positions = key.shape[2]
    matched, order = index.sort(dim=1, stable=True)
    targets = torch.arange(key_positions + 1, device=index.device).expand(batch, -1).contiguous()
    grad = query.new_empty((batch, key_positions, channels), dtype=torch.float32)
    with _launch.launching_on(query):
        kernels.grad_key_kernel[(key_positions, batch)](
            query_ptr=query,
            key_ptr=key,
            weight_ptr=row_weight.neg(),
            order_ptr=order,
            bound_ptr=torch.searchsorted(matched, targets),
            out_ptr=grad,
            positions=positions,
            key_positions=key_positions,
            **_launch.strides("query", query, "bdp"),
            **_launch.strides("key", key, "bdp"),
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
    """float32 products follow torch's setting for float32 products on CUDA."""
    exact = _launch.exact_precision(problem.matmul_dtype, _launch.describe(problem.query.device).architecture)
    return "tf32" if exact == "tf32x3" and _tf32_is_allowed() else exact


def _tf32_is_allowed() -> bool:
    """From torch 2.9 on by torch.backends; the older setting raises when it is read after a new one was written."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _position_fastest(x: Tensor) -> bool:
    """Whether neighbouring positions, not channels, lie side by side, as in an NCHW map."""
    return x.shape[2] > 1 and x.stride(2) < x.stride(1)


def _product_dtype(problem: Problem) -> torch.dtype:
    """The interpreter silently miscomputes bfloat16, so it takes the products in float32."""
    return torch.float32 if problem.query.device.type == "cpu" else problem.matmul_dtype
