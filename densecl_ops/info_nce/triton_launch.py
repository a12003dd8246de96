"""The dense InfoNCE loss in fused Triton kernels: their launches. triton_plan.py plans, triton_kernels.py computes.

prepare_kernel reads and normalises the rows, attend_kernel makes partial sums in one pass over the queue,
combine_kernel turns them into loss and gradient. The queue is split when the blocks of query rows alone would not fill
the device; the number of splits depends on shapes and device only and the parts are added in a fixed order, so results
repeat bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from densecl_ops import _triton
from densecl_ops.info_nce import blockwise, triton_plan
from densecl_ops.info_nce import triton_kernels as kernels
from densecl_ops.info_nce.eager import Problem, Result, empty_result, is_bounded_by_contract, through_norm, unit_vectors

_LOG2_E = 1.4426950408889634


def forward(problem: Problem, want_grad: bool, want_rank: bool, splits: int | None = None) -> Result:
    """As in Backend. `splits` overrides the plan, for tests."""
    plan = triton_plan.plan_forward(problem, splits)
    batch, channels, positions = problem.query.shape
    rows, new = batch * positions, problem.query.new_empty
    scale = {"scale_ptr": problem.learned_scale, "scale": problem.scale or 0.0}
    scaled = new((rows, channels), dtype=problem.matmul_dtype)
    positive = new((batch, positions), dtype=torch.float32)
    prepared = {
        "query_rows_ptr": new((rows, channels)) if want_grad else None,
        "key_rows_ptr": problem.key.new_empty((rows, channels)) if want_grad else None,
        "positive_ptr": positive,
        "rank_positive_ptr": torch.empty_like(positive) if want_rank else None,
    }
    with torch.cuda.device(problem.query.get_device()):
        kernels.prepare_kernel[plan.prepare_grid](
            query_ptr=problem.query,
            key_ptr=problem.key,
            index_ptr=_flat(problem.matches),
            scaled_ptr=scaled,
            **prepared,
            **scale,
            **plan.prepare,
        )
        # What the first kernel does not need is made while it runs.
        denominator = new((plan.splits, rows), dtype=torch.float32)
        parts = {
            "denominator_ptr": denominator,
            "shift_ptr": None if is_bounded_by_contract(problem) else torch.empty_like(denominator),
            "numerator_ptr": new((plan.splits, rows, channels), dtype=torch.float32) if want_grad else None,
            "above_ptr": torch.empty_like(denominator, dtype=torch.int32) if want_rank else None,
        }
        result = empty_result(problem, want_grad, want_rank)
        negatives = _operand(problem)
        kernels.attend_kernel[plan.attend_grid](
            scaled_ptr=scaled,
            rank_positive_ptr=prepared["rank_positive_ptr"],
            negatives_ptr=negatives,
            negatives_descriptor=_descriptor(negatives, plan.tile),
            exclude_ptr=_flat(problem.exclude),
            count_ptr=problem.existing,
            **parts,
            **scale,
            **plan.attend,
        )
        kernels.combine_kernel[plan.combine_grid](
            loss_ptr=result.loss,
            rank_ptr=result.rank,
            log_sum_exp_ptr=result.log_sum_exp,
            pull_ptr=result.pull,
            grad_query_ptr=result.grad_query,
            grad_scale_ptr=result.grad_scale,
            **prepared,
            **parts,
            **scale,
            **plan.combine,
        )
    return result


def _flat(indices: Tensor | None) -> Tensor | None:
    """As the kernels read them: an expanded arange or a column of a table has other strides."""
    return None if indices is None else indices.contiguous()


def _operand(problem: Problem) -> Tensor:
    """The negatives as the kernels read them: contiguous, in the product dtype.

    The queue itself where it is so, else a copy that lives as long as the call: a float32 queue under bfloat16 autocast
    would be read at twice the bytes and converted once per block of query rows (docs/kernels.md).
    """
    return problem.negatives.to(problem.matmul_dtype).contiguous()


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
    splits, grid, arguments = triton_plan.plan_grad_negatives(problem, splits)
    dtype = problem.matmul_dtype
    unit, _ = unit_vectors(problem.query, torch.float32)
    left_out = row_weight == 0  # such a row may hold NaN
    unit = unit.masked_fill(left_out[:, :, None], 0.0)
    shift = log_sum_exp.masked_fill(left_out | (log_sum_exp == float("-inf")), 0.0)
    peak = row_weight.abs().amax()  # weights scaled to 1 at most: a mean over many rows underflows float16
    weighted = unit * (row_weight / peak.masked_fill(peak == 0, 1.0))[:, :, None]
    parts = unit.new_empty(splits, *problem.negatives.shape)
    with torch.cuda.device(unit.get_device()):
        kernels.grad_negatives_kernel[grid](
            scaled_ptr=(unit * (problem.inverse_temperature * _LOG2_E)).to(dtype),
            weighted_ptr=weighted.to(dtype),
            negatives_ptr=_operand(problem),
            log_sum_exp_ptr=shift,
            exclude_ptr=_flat(problem.exclude),
            count_ptr=problem.existing,
            out_ptr=parts,
            **arguments,
        )
    return parts.sum(0) * (peak * problem.inverse_temperature)


def grad_key(problem: Problem, row_weight: Tensor) -> Tensor:
    """As in Backend, and as blockwise.py does it, but sorted: float atomics would add in an order that changes."""
    query, key, index = problem.query, problem.key, problem.matches
    if index is None:
        return blockwise.grad_key(problem, row_weight)
    batch, channels, positions = query.shape
    key_positions, width = key.shape[2], triton_plan.block_d(channels)
    unit_query, _ = unit_vectors(query, torch.float32)
    unit_key, inverse = unit_vectors(key, torch.float32)
    weight = (row_weight * problem.inverse_temperature)[:, :, None]
    # The weight of a row whose index is out of range is NaN, which then reaches the first or the last key of its image.
    matched, order = index.contiguous().clamp(0, key_positions - 1).sort(dim=1, stable=True)
    targets = torch.arange(key_positions + 1, device=index.device).expand(batch, -1).contiguous()
    grad = torch.empty_like(unit_key)
    with torch.cuda.device(query.get_device()):
        kernels.grad_key_kernel[(batch * key_positions,)](
            rows_ptr=(unit_query * -weight).masked_fill(weight == 0, 0.0),
            order_ptr=order,
            bound_ptr=torch.searchsorted(matched, targets),
            out_ptr=grad,
            positions=positions,
            key_positions=key_positions,
            CHANNELS=channels,
            BLOCK_D=width,
            BLOCK_P=8,
            num_warps=max(1, width // 128),
            **_triton.OPTIONS,
        )
    return through_norm(grad, unit_key, inverse)
