"""Differentiation of the loss, for every backend that returns the gradient together with the loss.

The gradient of a row depends on that row alone, so the forward pass already has it and backward only scales it, for
any reduction. Key gradients follow from what the rows kept; only gradients to the negatives read the queue again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from densecl_ops._numerics import no_autocast
from densecl_ops.info_nce import blockwise
from densecl_ops.info_nce.problem import Problem, Rows, scatter_matches, through_norm, unit_rows


def row_loss(problem: Problem, want_rank: bool) -> tuple[Tensor, Tensor]:
    """Same contract as eager.row_loss, without its memory: loss (B, P_q) and rank (B, P_q), (0,) if not wanted."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in problem):
        loss, rank = _InfoNCE.apply(*problem, want_rank)  # type: ignore[no-untyped-call]
        return loss, rank
    rows = _forward(problem, want_grad=False, want_rank=want_rank)
    return rows.loss, rows.rank


class _InfoNCE(torch.autograd.Function):
    """The fields of a Problem -> row losses and ranks. Differentiable once, by its first four arguments."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *fields, want_rank = args
        problem = Problem(*fields)
        rows = _forward(problem, want_grad=True, want_rank=want_rank)
        ctx.mark_non_differentiable(rows.rank)
        # Inputs are kept only for the gradients that need them, above all never a frozen queue or its count:
        # enqueueing into it before backward() is harmless.
        _, needs_key, needs_negatives, *_ = ctx.needs_input_grad
        views = (problem.query, problem.key, problem.match_index) if needs_key or needs_negatives else (None,) * 3
        queue = (problem.negatives, problem.exclude, problem.negatives_count) if needs_negatives else (None,) * 3
        ctx.save_for_backward(*rows[2:], *views, *queue)
        ctx.inverse_temperature = problem.inverse_temperature
        ctx.query_dtype, ctx.dtypes = problem.query.dtype, (problem.dtype, problem.matmul_dtype)
        return rows.loss, rows.rank

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        log_sum_exp, pull, grad_query, grad_scale, query, key, index, negatives, exclude, count = ctx.saved_tensors
        needs_query, needs_key, needs_negatives, needs_scale, *_ = ctx.needs_input_grad
        scale, (dtype, matmul_dtype) = ctx.inverse_temperature, ctx.dtypes
        to_query = to_key = to_negatives = to_scale = None
        row_weight = _weigh(grad_loss, pull)
        if needs_query:
            to_query = _weigh(grad_loss[:, :, None], grad_query).transpose(1, 2).to(ctx.query_dtype)
        if needs_key:
            to_key = _grad_key(query, key, index, row_weight * scale, dtype)
        if needs_negatives:
            problem = Problem(query, key, negatives, scale, index, exclude, count, dtype, matmul_dtype)
            to_negatives = _grad_negatives(problem, log_sum_exp, row_weight).to(negatives.dtype)
        if needs_scale:
            to_scale = _weigh(grad_loss, grad_scale).sum().to(scale.dtype)
        return to_query, to_key, to_negatives, to_scale, *(None,) * 6


def _weigh(grad: Tensor, row: Tensor) -> Tensor:
    """Upstream gradient times row; a row of weight 0 is left out even if it holds NaN."""
    return torch.where(grad == 0, 0.0, grad * row)


def _grad_key(query: Tensor, key: Tensor, index: Tensor | None, row_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """d loss_i / d k^ = -(1 - p+) q^ / t, summed over the queries that share a key, then through the key's norm."""
    unit_query, _ = unit_rows(query, dtype)
    unit_key, inverse_norm = unit_rows(key, dtype)
    grad = scatter_matches(unit_query * -row_weight[:, :, None], index, key.shape[2])
    return through_norm(grad, unit_key, inverse_norm).transpose(1, 2).to(key.dtype)


# ---- calls into the backend: directly in eager mode, as one opaque node each in a compiled graph -------------------


def _forward(problem: Problem, want_grad: bool, want_rank: bool) -> Rows:
    with no_autocast(problem.query):
        if torch.compiler.is_compiling():
            return Rows(*_forward_op(*_op_arguments(problem), want_grad, want_rank))
        return blockwise.forward(problem, want_grad, want_rank)


def _grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor) -> Tensor:
    with no_autocast(problem.query):
        if torch.compiler.is_compiling():
            grad: Tensor = _grad_negatives_op(*_op_arguments(problem), log_sum_exp, row_weight)
            return grad
        return blockwise.grad_negatives(problem, log_sum_exp, row_weight)


def _op_arguments(problem: Problem) -> tuple[Any, ...]:
    """An operator's schema has no "number or tensor": the inverse temperature takes two places."""
    scale = problem.inverse_temperature
    pair = (None, scale) if isinstance(scale, Tensor) else (scale, None)
    return *problem[:3], *pair, *problem[4:]


def _problem_of(arguments: tuple[Any, ...]) -> Problem:
    query, key, negatives, number, learned, *rest = arguments
    return Problem(query, key, negatives, number if learned is None else learned, *rest)


_PROBLEM_SCHEMA = (
    "Tensor query, Tensor key, Tensor negatives, float? scale, Tensor? learned_scale, "
    "Tensor? index, Tensor? exclude, Tensor? count, ScalarType dtype, ScalarType matmul_dtype"
)


@torch.library.custom_op(
    "densecl_ops::info_nce_blockwise",
    mutates_args=(),
    schema=f"({_PROBLEM_SCHEMA}, bool want_grad, bool want_rank) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(*arguments: Any) -> tuple[Tensor, ...]:
    *problem, want_grad, want_rank = arguments
    return tuple(blockwise.forward(_problem_of(tuple(problem)), want_grad, want_rank))


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, want_grad, want_rank = arguments
    problem = _problem_of(tuple(fields))
    batch, channels, queries = problem.query.shape
    row = problem.query.new_empty((batch, queries), dtype=problem.dtype)
    none = (0,)
    return (
        row,
        row.new_empty(row.shape if want_rank else none, dtype=torch.int64),
        torch.empty_like(row),
        torch.empty_like(row),
        row.new_empty((batch, queries, channels) if want_grad else none),
        row.new_empty(row.shape if want_grad else none),
    )


@torch.library.custom_op(
    "densecl_ops::info_nce_blockwise_grad_negatives",
    mutates_args=(),
    schema=f"({_PROBLEM_SCHEMA}, Tensor log_sum_exp, Tensor row_weight) -> Tensor",
)
def _grad_negatives_op(*arguments: Any) -> Tensor:
    *problem, log_sum_exp, row_weight = arguments
    return blockwise.grad_negatives(_problem_of(tuple(problem)), log_sum_exp, row_weight)


@_grad_negatives_op.register_fake
def _(*arguments: Any) -> Tensor:
    problem = _problem_of(arguments[:-2])
    return torch.empty(problem.negatives.shape, dtype=problem.dtype, device=problem.negatives.device)
