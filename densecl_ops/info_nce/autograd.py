"""Differentiation of the loss, for every backend that returns the gradient together with the loss.

The gradient of a query depends on that query alone, so the forward pass already has it and backward only scales it, for
any reduction. Key gradients follow from what was kept of the queries; only gradients to the negatives read the queue
again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from densecl_ops import _backends, _checks
from densecl_ops._numerics import no_autocast
from densecl_ops._operators import operator
from densecl_ops._recomputation import note_run
from densecl_ops.info_nce import blockwise
from densecl_ops.info_nce.problem import Backend, Problem, Result

Answer = TypeVar("Answer")


def row_loss(problem: Problem, want_rank: bool, backend: str) -> tuple[Tensor, Tensor]:
    """As eager.row_loss, without its memory: loss (B, P_q) and rank (B, P_q), (0,) if not wanted."""
    if not torch.compiler.is_compiling() and _is_forward_mode(problem):
        raise RuntimeError(
            f"dense_info_nce: the {backend!r} backend has no forward-mode derivative (jvp); use backend='eager'"
        )
    wanted = [isinstance(x, Tensor) and _checks.requires_grad(x) for x in problem]
    if torch.is_grad_enabled() and any(wanted):
        want_grad = wanted[Problem._fields.index("query")] or wanted[Problem._fields.index("scale")]
        loss, rank, *_ = _InfoNCE.apply(*problem, want_grad, want_rank, backend)  # type: ignore[no-untyped-call]
    else:
        loss, rank, *_ = _forward(*_flatten(problem), False, want_rank, backend)
    return loss, rank


def _takes_anything(*arguments: Any) -> None:
    """Has the signature that Function.apply binds its arguments to."""


class _InfoNCE(torch.autograd.Function):
    """The fields of a Problem -> the fields of a Result. Differentiable once, by its first four arguments.

    All that backward needs of the result is an output, as torch.func asks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *fields, want_grad, want_rank, backend = arguments
        return _forward(*_flatten(Problem(*fields)), want_grad, want_rank, backend)

    # Function.apply inspects the signature at every call, which is quick where one is given outright.
    forward.__func__.__signature__ = inspect.signature(_takes_anything)  # type: ignore[attr-defined]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *fields, _, _, backend = inputs
        problem, result = Problem(*fields), Result(*output)
        _, *constants = output
        ctx.mark_non_differentiable(*constants)
        # Inputs are kept only for the gradients that need them, above all never a frozen queue or its count:
        # enqueueing into it before backward() is harmless.
        _, needs_key, needs_negatives, *_ = ctx.needs_input_grad
        views = (problem.query, problem.key, problem.index) if needs_key or needs_negatives else (None,) * 3
        queue = (problem.negatives, problem.exclude, problem.count) if needs_negatives else (None,) * 3
        learned = problem.scale if isinstance(problem.scale, Tensor) else None
        ctx.save_for_backward(
            result.log_sum_exp, result.pull, result.grad_query, result.grad_scale, learned, *views, *queue
        )
        ctx.number = None if learned is not None else problem.scale
        ctx.precision = (problem.unit_negatives, problem.dtype, problem.matmul_dtype)
        ctx.query_dtype, ctx.backend = problem.query.dtype, backend

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if _wants_a_graph():
            raise RuntimeError(
                f"dense_info_nce: the {ctx.backend!r} backend can be differentiated once only, got create_graph=True; "
                "use backend='eager' for second derivatives"
            )
        with torch.no_grad():
            return _gradients(ctx, grad_loss)


def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    log_sum_exp, pull, grad_query, grad_scale, learned, query, key, index, negatives, exclude, count = saved
    needs_query, needs_key, needs_negatives, needs_scale, *not_differentiable = ctx.needs_input_grad
    scale = ctx.number if learned is None else learned
    row_weight = _weigh(grad_loss, pull)
    to_query = to_key = to_negatives = to_scale = None
    if needs_query:
        to_query = _weigh(grad_loss[:, :, None], grad_query).transpose(1, 2).to(ctx.query_dtype)
    if needs_key:
        grad = _grad_key(query, key, index, row_weight * scale, grad_loss.dtype, ctx.backend)
        to_key = grad.transpose(1, 2).to(key.dtype)
    if needs_negatives:
        problem = Problem(query, key, negatives, scale, index, exclude, count, *ctx.precision)
        grad = _grad_negatives(*_flatten(problem), log_sum_exp, row_weight, ctx.backend)
        to_negatives = grad.to(negatives.dtype)
    if needs_scale:
        to_scale = _weigh(grad_loss, grad_scale).sum().to(scale.dtype)
    return to_query, to_key, to_negatives, to_scale, *(None,) * len(not_differentiable)


def _is_forward_mode(problem: Problem) -> bool:
    if forward_ad._current_level < 0:  # neither in a dual_level nor in a jvp
        return False
    duals = [forward_ad.unpack_dual(x) for x in problem if isinstance(x, Tensor)]  # type: ignore[no-untyped-call]
    return TransformType.Jvp in _transforms() or any(dual.tangent is not None for dual in duals)


def _wants_a_graph() -> bool:
    """Whether backward is to be differentiated in turn: create_graph=True, or one torch.func gradient in another."""
    if torch.compiler.is_compiling():
        return False
    transforms = _transforms()
    return transforms.count(TransformType.Grad) > 1 if transforms else torch.is_grad_enabled()


def _transforms() -> list[TransformType]:
    """What torch.func has under way, outermost first; inside a gradient of its own, gradients are always on."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]


def _weigh(grad: Tensor, row: Tensor) -> Tensor:
    """Upstream gradient times row; a row of weight 0 is left out even if it holds NaN."""
    return (grad * row).masked_fill_(grad == 0, 0.0)


def _backend(name: str) -> Backend:
    if name == "blockwise":
        return blockwise
    from densecl_ops.info_nce import triton_launch  # imported on first use: it needs the triton package

    return triton_launch


def _run(
    backend: str, compute: Callable[[Backend], Answer], operation: str, query: Tensor, dtype: torch.dtype
) -> Answer:
    with no_autocast(query):
        return _backends.run(backend, _backend, compute, operation, dtype, f"D = {query.shape[1]}")


def _flatten(problem: Problem) -> tuple[Any, ...]:
    """An operator's schema has no "number or tensor": the scale takes two places."""
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


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, want_grad, want_rank, _ = arguments
    problem = _unflatten(fields)
    batch, channels, positions = problem.query.shape
    row = problem.query.new_empty((batch, positions), dtype=problem.dtype)
    none = (0,)
    return Result(
        loss=row,
        rank=row.new_empty(row.shape if want_rank else none, dtype=torch.int64),
        log_sum_exp=torch.empty_like(row),
        pull=torch.empty_like(row),
        grad_query=row.new_empty((batch, positions, channels) if want_grad else none),
        grad_scale=row.new_empty(row.shape if want_grad else none),
    )


@operator(
    "info_nce",
    f"({_PROBLEM}, bool want_grad, bool want_rank, str backend)"
    " -> (Tensor loss, Tensor rank, Tensor log_sum_exp, Tensor pull, Tensor grad_query, Tensor grad_scale)",
    _fake_forward,
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, want_grad, want_rank, backend = arguments
    problem = _unflatten(fields)
    note_run(problem.negatives)

    def compute(module: Backend) -> Result:
        return module.forward(problem, want_grad, want_rank)

    return _run(backend, compute, "loss", problem.query, problem.matmul_dtype)


def _fake_grad_negatives(*arguments: Any) -> Tensor:
    problem = _unflatten(list(arguments[:-3]))
    return problem.negatives.new_empty(problem.negatives.shape, dtype=problem.dtype)


@operator(
    "info_nce_grad_negatives",
    f"({_PROBLEM}, Tensor log_sum_exp, Tensor row_weight, str backend) -> Tensor",
    _fake_grad_negatives,
)
def _grad_negatives(*arguments: Any) -> Tensor:
    *fields, log_sum_exp, row_weight, backend = arguments
    problem = _unflatten(fields)

    def compute(module: Backend) -> Tensor:
        return module.grad_negatives(problem, log_sum_exp, row_weight)

    return _run(backend, compute, "gradient to the negatives", problem.query, problem.matmul_dtype)


def _fake_grad_key(query: Tensor, key: Tensor, index: Any, row_weight: Any, dtype: torch.dtype, backend: str) -> Tensor:
    batch, channels, positions = key.shape
    return key.new_empty((batch, positions, channels), dtype=dtype)


@operator(
    "info_nce_grad_key",
    "(Tensor query, Tensor key, Tensor? index, Tensor row_weight, ScalarType dtype, str backend) -> Tensor",
    _fake_grad_key,
)
def _grad_key(
    query: Tensor, key: Tensor, index: Tensor | None, row_weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    def compute(module: Backend) -> Tensor:
        return module.grad_key(query, key, index, row_weight, dtype)

    return _run(backend, compute, "gradient to the keys", query, query.dtype)
