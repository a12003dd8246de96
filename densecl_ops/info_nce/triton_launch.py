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
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from densecl_ops import _launch
from densecl_ops.info_nce import blockwise, triton_configs
from densecl_ops.info_nce import triton_kernels as kernels
from densecl_ops.info_nce.problem import Problem, Result, is_bounded_by_contract, unit_vectors

_LOG2_E = 1.4426950408889634


class Plan(NamedTuple):
    """What the three launches of `forward` owe to shapes, dtypes and the device alone.

    Attributes:
        splits: In how many parts the queue is read.
        row_grid: Programs of prepare_kernel and combine_kernel.
        attend_grid: Programs of attend_kernel.
        row_arguments: Arguments of prepare_kernel and combine_kernel.
        attend_arguments: Arguments of attend_kernel.
        tile: Rows and channels of a tile that is loaded by a descriptor, or None.
    """

    splits: int
    row_grid: tuple[int]
    attend_grid: tuple[int, int]
    row_arguments: dict[str, Any]
    attend_arguments: dict[str, Any]
    tile: list[int] | None


class Parts(NamedTuple):
    """What each split leaves, to be added up: the arguments of attend_kernel and combine_kernel that both have."""

    denominator_ptr: Tensor
    shift_ptr: Tensor | None
    numerator_ptr: Tensor | None
    above_ptr: Tensor | None


def forward(problem: Problem, want_grad: bool, want_rank: bool, splits: int | None = None) -> Result:
    """As in Backend. `splits` overrides the plan, for tests."""
    plan = _plan(problem, splits)
    with _launch.launching_on(problem.query):
        scaled, positive, rank_positive = _prepare(problem, plan, want_rank)
        parts = _attend(problem, plan, scaled, rank_positive, want_grad)
        return _combine(problem, plan, positive, rank_positive, parts)


def _plan(problem: Problem, splits: int | None) -> Plan:
    query, key, negatives = problem.query, problem.key, problem.negatives
    device = _launch.describe(query.device)
    channels = query.shape[1]
    lean = problem.exclude is None and channels == triton_configs.block_d(channels)
    config = triton_configs.choose(device.architecture, problem.matmul_dtype, channels, lean)
    layouts = (query.shape, query.stride(), key.shape, key.stride())
    return _plan_for(*layouts, negatives.shape[0], device, config, _precision(problem), splits)


@functools.lru_cache(maxsize=1024)  # built once per shape: small problems are bound by the host
def _plan_for(
    query_shape: tuple[int, int, int],
    query_stride: tuple[int, int, int],
    key_shape: tuple[int, int, int],
    key_stride: tuple[int, int, int],
    size: int,
    device: _launch.Device,
    config: triton_configs.Config,
    precision: str,
    splits: int | None,
) -> Plan:
    batch, channels, positions = query_shape
    rows, block_d = batch * positions, triton_configs.block_d(channels)
    slots = device.multiprocessors * config.programs
    per_split = plan_split(rows, size, config.block_n, config.block_k, slots, splits)
    splits = triton.cdiv(size, per_split)
    row_block = triton_configs.row_block(block_d)
    shape = {"rows": rows, "positions": positions, "CHANNELS": channels, "BLOCK_D": block_d}
    return Plan(
        splits=splits,
        row_grid=(triton.cdiv(rows, row_block),),
        attend_grid=(triton.cdiv(rows, config.block_n), splits),
        row_arguments=shape
        | {"key_positions": key_shape[2], "BLOCK_N": row_block}
        | _launch.strides("query", query_stride, "bdp")
        | _launch.strides("key", key_stride, "bdp")
        | {
            "QUERY_POSITION_FASTEST": _position_fastest(query_shape, query_stride),
            "KEY_POSITION_FASTEST": _position_fastest(key_shape, key_stride),
        },
        attend_arguments=shape
        | {
            "size": size,
            "per_split": per_split,
            "PRECISION": precision,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "CHUNK_D": config.chunk_d or block_d,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
        tile=triton_configs.tile_by_descriptor(device.architecture, config, channels),
    )


def _prepare(problem: Problem, plan: Plan, want_rank: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scaled unit queries (N, D) in the product dtype, those of the positives (B, P), and as the rank sees them."""
    batch, channels, positions = problem.query.shape
    scaled = problem.query.new_empty((batch * positions, channels), dtype=_product_dtype(problem))
    positive = problem.query.new_empty((batch, positions), dtype=torch.float32)
    rank_positive = torch.empty_like(positive) if want_rank else None
    kernels.prepare_kernel[plan.row_grid](
        scaled_ptr=scaled,
        positive_ptr=positive,
        rank_positive_ptr=rank_positive,
        ROW_DTYPE=getattr(tl, str(problem.negatives.dtype).removeprefix("torch.")),
        PRECISION=plan.attend_arguments["PRECISION"],
        **_maps(problem),
        **plan.row_arguments,
    )
    return scaled, positive, rank_positive


def _attend(problem: Problem, plan: Plan, scaled: Tensor, rank_positive: Tensor | None, want_numerator: bool) -> Parts:
    rows, channels = scaled.shape
    denominator = scaled.new_empty((plan.splits, rows), dtype=torch.float32)
    parts = Parts(
        denominator_ptr=denominator,
        shift_ptr=None if is_bounded_by_contract(problem) else torch.empty_like(denominator),
        numerator_ptr=denominator.new_empty((plan.splits, rows, channels)) if want_numerator else None,
        above_ptr=torch.empty_like(denominator, dtype=torch.int32) if rank_positive is not None else None,
    )
    negatives = _operand(problem)
    kernels.attend_kernel[plan.attend_grid](
        scaled_ptr=scaled,
        rank_positive_ptr=rank_positive,
        scale_ptr=problem.learned_scale,
        scale=problem.scale or 0.0,
        negatives_ptr=negatives,
        negatives_descriptor=_descriptor(negatives, plan.tile),
        exclude_ptr=_flat(problem.exclude),
        count_ptr=problem.existing,
        **parts._asdict(),
        **plan.attend_arguments,
    )
    return parts


def _combine(problem: Problem, plan: Plan, positive: Tensor, rank_positive: Tensor | None, parts: Parts) -> Result:
    batch, channels, positions = problem.query.shape
    loss = torch.empty_like(positive)
    rank = torch.empty_like(positive, dtype=torch.int64) if parts.above_ptr is not None else None
    grad_query = grad_scale = None
    if parts.numerator_ptr is not None:
        grad_query, grad_scale = positive.new_empty((batch, positions, channels)), torch.empty_like(positive)
    log_sum_exp, pull = torch.empty_like(positive), torch.empty_like(positive)
    kernels.combine_kernel[plan.row_grid](
        positive_ptr=positive,
        rank_positive_ptr=rank_positive,
        loss_ptr=loss,
        rank_ptr=rank,
        log_sum_exp_ptr=log_sum_exp,
        pull_ptr=pull,
        grad_query_ptr=grad_query,
        grad_scale_ptr=grad_scale,
        size=problem.negatives.shape[0],
        splits=plan.splits,
        **parts._asdict(),
        **_maps(problem),
        **plan.row_arguments,
    )
    return Result(
        loss=loss,
        rank=loss.new_empty(0, dtype=torch.int64) if rank is None else rank,
        log_sum_exp=log_sum_exp,
        pull=pull,
        grad_query=loss.new_empty(0) if grad_query is None else grad_query,
        grad_scale=loss.new_empty(0) if grad_scale is None else grad_scale,
    )


def _maps(problem: Problem) -> dict[str, Any]:
    """Arguments of the kernels that read the projections as the user has them."""
    return {
        "query_ptr": problem.query,
        "key_ptr": problem.key,
        "index_ptr": _flat(problem.matches),
        "scale_ptr": problem.learned_scale,
        "scale": problem.scale or 0.0,
    }


def _flat(indices: Tensor | None) -> Tensor | None:
    """As the kernels read them: an expanded arange or a column of a table has other strides."""
    return None if indices is None else indices.contiguous()


def _operand(problem: Problem) -> Tensor:
    """The negatives as the kernels read them: contiguous, in the product dtype.

    The queue itself where it is so, else a copy that lives as long as the call: a float32 queue under bfloat16 autocast
    would be read at twice the bytes and converted once per block of query rows (docs/kernels.md).
    """
    return problem.negatives.to(_product_dtype(problem)).contiguous()


def _descriptor(negatives: Tensor, tile: list[int] | None) -> TensorDescriptor | None:
    """Of contiguous negatives; None without a tile, or where not every row starts at a multiple of 16 bytes.

    Built on the host: one built in the kernel would need triton.set_allocator, which changes the whole process.
    """
    size, channels = negatives.shape
    if tile is None or negatives.data_ptr() % 16 or channels * negatives.element_size() % 16:
        return None
    return TensorDescriptor(negatives, [size, channels], [channels, 1], tile)


def grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor, splits: int | None = None) -> Tensor:
    """As in Backend. `splits` overrides the plan, for tests."""
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
            scaled_ptr=(unit * (problem.inverse_temperature * _LOG2_E)).to(dtype),
            weighted_ptr=weighted.to(dtype),
            negatives_ptr=_operand(problem),
            log_sum_exp_ptr=shift,
            exclude_ptr=_flat(problem.exclude),
            count_ptr=problem.existing,
            out_ptr=parts,
            rows=rows,
            positions=positions,
            size=size,
            per_split=per_split,
            PRECISION=_precision(problem),
            CHANNELS=channels,
            BLOCK_D=triton_configs.block_d(channels),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return parts.sum(0) * (peak * problem.inverse_temperature)


def grad_key(query: Tensor, key: Tensor, index: Tensor | None, row_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As in Backend: sorts instead of adding with float atomics, whose order changes."""
    if index is None:
        return blockwise.grad_key(query, key, index, row_weight, dtype)
    batch, channels, positions = query.shape
    key_positions, block_d = key.shape[2], triton_configs.block_d(channels)
    # The weight of a row whose index is out of range is NaN, which then reaches the first or the last key of its image.
    matched, order = index.contiguous().clamp(0, key_positions - 1).sort(dim=1, stable=True)
    targets = torch.arange(key_positions + 1, device=index.device).expand(batch, -1).contiguous()
    grad = query.new_empty((batch, key_positions, channels), dtype=torch.float32)
    with _launch.launching_on(query):
        kernels.grad_key_kernel[(batch * key_positions,)](
            query_ptr=query,
            key_ptr=key,
            weight_ptr=row_weight.neg().contiguous(),  # the strides of the upstream gradient
            order_ptr=order,
            bound_ptr=torch.searchsorted(matched, targets),
            out_ptr=grad,
            positions=positions,
            key_positions=key_positions,
            **_launch.strides("query", query.stride(), "bdp"),
            **_launch.strides("key", key.stride(), "bdp"),
            CHANNELS=channels,
            BLOCK_D=block_d,
            BLOCK_P=8,
            num_warps=max(1, block_d // 128),
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
    exact = _launch.float32_precision(problem.matmul_dtype, _launch.describe(problem.query.device).architecture)
    return "tf32" if exact == "tf32x3" and _tf32_is_allowed() else exact


def _tf32_is_allowed() -> bool:
    """From torch 2.9 on by torch.backends; the older setting raises when it is read after a new one was written."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _position_fastest(shape: tuple[int, int, int], stride: tuple[int, int, int]) -> bool:
    """Whether neighbouring positions, not channels, lie side by side, as in an NCHW map."""
    return shape[2] > 1 and stride[2] < stride[1]


def _product_dtype(problem: Problem) -> torch.dtype:
    """The interpreter silently miscomputes bfloat16, so it takes the products in float32."""
    return torch.float32 if problem.query.device.type == "cpu" else problem.matmul_dtype
