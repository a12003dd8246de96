"""Differentiation of the loss, for every backend that returns the gradient together with the loss.

The gradient of a row depends on that row alone, so the forward pass already has it and backward only scales it, for
any reduction. Key gradients follow from what the rows kept; only gradients to the negatives read the queue again.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from densecl_ops._numerics import no_autocast
from densecl_ops.info_nce import blockwise
from densecl_ops.info_nce.problem import Problem, Rows


def row_loss(problem: Problem, want_rank: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Same contract as eager.row_loss, without its memory: loss (B, P_q) and rank (B, P_q), (0,) if not wanted."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in problem):
        loss, rank = _InfoNCE.apply(*problem, want_rank, backend)  # type: ignore[no-untyped-call]
        return loss, rank
    rows = _forward(problem, False, want_rank, backend)
    return rows.loss, rows.rank


class _InfoNCE(torch.autograd.Function):
    """The fields of a Problem -> row losses and ranks. Differentiable once, by its first four arguments."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *fields, want_rank, backend = args
        problem = Problem(*fields)
        rows = _forward(problem, True, want_rank, backend)
        ctx.mark_non_differentiable(rows.rank)
        # Inputs are kept only for the gradients that need them, above all never a frozen queue or its count:
        # enqueueing into it before backward() is harmless.
        _, needs_key, needs_negatives, *_ = ctx.needs_input_grad
        views = (problem.query, problem.key, problem.match_index) if needs_key or needs_negatives else (None,) * 3
        queue = (problem.negatives, problem.exclude, problem.negatives_count) if needs_negatives else (None,) * 3
        _, _, *kept = rows
        ctx.save_for_backward(*kept, *views, *queue)
        ctx.inverse_temperature, ctx.query_dtype, ctx.backend = (
            problem.inverse_temperature,
            problem.query.dtype,
            backend,
        )
        ctx.precision = (problem.unit_negatives, problem.dtype, problem.matmul_dtype)
        return rows.loss, rows.rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # on inside backward: create_graph=True
            raise RuntimeError(
                f"dense_info_nce: the {ctx.backend!r} backend can be differentiated once only, got create_graph=True; "
                "use backend='eager' for second derivatives"
            )
        log_sum_exp, pull, grad_query, grad_scale, query, key, index, negatives, exclude, count = ctx.saved_tensors
        needs_query, needs_key, needs_negatives, needs_scale, *not_differentiable = ctx.needs_input_grad
        scale = ctx.inverse_temperature
        row_weight = _weigh(grad_loss, pull)
        to_query = to_key = to_negatives = to_scale = None
        if needs_query:
            to_query = _weigh(grad_loss[:, :, None], grad_query).transpose(1, 2).to(ctx.query_dtype)
        if needs_key:
            to_key = _grad_key(query, key, index, row_weight * scale, grad_loss.dtype, ctx.backend).to(key.dtype)
        if needs_negatives:
            problem = Problem(query, key, negatives, scale, index, exclude, count, *ctx.precision)
            to_negatives = _grad_negatives(problem, log_sum_exp, row_weight, ctx.backend).to(negatives.dtype)
        if needs_scale:
            to_scale = _weigh(grad_loss, grad_scale).sum().to(scale.dtype)
        return to_query, to_key, to_negatives, to_scale, *(None,) * len(not_differentiable)


def _weigh(grad: Tensor, row: Tensor) -> Tensor:
    """Upstream gradient times row; a row of weight 0 is left out even if it holds NaN."""
    return torch.where(grad == 0, 0.0, grad * row)


# ---- calls into the backend: directly in eager mode, as one opaque node each in a compiled graph -------------------
# A registered operator costs about 60 us of host time per eager call, so eager mode goes around it.


def _module(backend: str) -> ModuleType:
    if backend == "blockwise":
        return blockwise
    from densecl_ops.info_nce import triton  # imported on first use: it needs the triton package

    return triton


def _forward(problem: Problem, want_grad: bool, want_rank: bool, backend: str) -> Rows:
    with no_autocast(problem.query):
        if torch.compiler.is_compiling():
            return Rows(*_forward_op(*_flatten(problem), want_grad, want_rank, backend))
        rows: Rows = _module(backend).forward(problem, want_grad, want_rank)
        return rows


def _grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor, backend: str) -> Tensor:
    with no_autocast(problem.query):
        if torch.compiler.is_compiling():
            grad: Tensor = _grad_negatives_op(*_flatten(problem), log_sum_exp, row_weight, backend)
        else:
            grad = _module(backend).grad_negatives(problem, log_sum_exp, row_weight)
        return grad


def _grad_key(
    query: Tensor, key: Tensor, index: Tensor | None, row_weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    with no_autocast(query):
        if torch.compiler.is_compiling():
            grad: Tensor = _grad_key_op(query, key, index, row_weight, dtype, backend)
        else:
            grad = _module(backend).grad_key(query, key, index, row_weight, dtype)
        return grad.transpose(1, 2)


def _flatten(problem: Problem) -> tuple[Any, ...]:
    """An operator's schema has no "number or tensor": the inverse temperature takes two places."""
    query, key, negatives, scale, *rest = problem
    number, learned = (None, scale) if isinstance(scale, Tensor) else (scale, None)
    return query, key, negatives, number, learned, *rest


def _unflatten(arguments: list[Any]) -> Problem:
    query, key, negatives, number, learned, *rest = arguments
    return Problem(query, key, negatives, number if learned is None else learned, *rest)


_PROBLEM = (
    "Tensor query, Tensor key, Tensor negatives, float? scale, Tensor? learned_scale, Tensor? index, "
    "Tensor? exclude, Tensor? count, bool unit_negatives, ScalarType dtype, ScalarType matmul_dtype"
)


@torch.library.custom_op(
    "densecl_ops::info_nce",
    mutates_args=(),
    schema=f"({_PROBLEM}, bool want_grad, bool want_rank, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(*arguments: Any) -> tuple[Tensor, ...]:
    *problem, want_grad, want_rank, backend = arguments
    return tuple(_module(backend).forward(_unflatten(problem), want_grad, want_rank))


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, want_grad, want_rank, _ = arguments
    problem = _unflatten(fields)
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
    "densecl_ops::info_nce_grad_negatives",
    mutates_args=(),
    schema=f"({_PROBLEM}, Tensor log_sum_exp, Tensor row_weight, str backend) -> Tensor",
)
def _grad_negatives_op(*arguments: Any) -> Tensor:
    *problem, log_sum_exp, row_weight, backend = arguments
    grad: Tensor = _module(backend).grad_negatives(_unflatten(problem), log_sum_exp, row_weight)
    return grad


@_grad_negatives_op.register_fake
def _(*arguments: Any) -> Tensor:
    problem = _unflatten(list(arguments[:-3]))
    return torch.empty(problem.negatives.shape, dtype=problem.dtype, device=problem.negatives.device)


@torch.library.custom_op(
    "densecl_ops::info_nce_grad_key",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor? index, Tensor row_weight, ScalarType dtype, str backend) -> Tensor",
)
def _grad_key_op(*arguments: Any) -> Tensor:
    *inputs, backend = arguments
    grad: Tensor = _module(backend).grad_key(*inputs)
    return grad


@_grad_key_op.register_fake
def _(query: Tensor, key: Tensor, index: Tensor, row_weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    batch, channels, positions = key.shape
    return torch.empty((batch, positions, channels), dtype=dtype, device=key.device)
