"""Differentiation of the loss, for every backend that returns the gradient together with the loss.

The gradient of a query depends on that query alone, so the forward pass already has it and backward only scales it, for
any reduction. Key gradients follow from the queries; only gradients to the negatives read the queue again.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from densecl_ops import _backends
from densecl_ops._parallel import SERIAL, limited
from densecl_ops._recomputation import compare, note_compiled, version_of
from densecl_ops._tracing import inside_func, is_traced, operator, transforms
from densecl_ops.info_nce.eager import SCHEMA, Problem, Result, empty_result


def row_loss(problem: Problem, want_rank: bool, backend: str, traced: bool) -> tuple[Tensor, Tensor | None]:
    """As eager.row_loss, without its memory, by a fused backend; `traced` as `_tracing.is_traced` says of the call."""
    enabled, learned = torch.is_grad_enabled(), problem.learned_scale
    want_query = problem.query.requires_grad or (learned is not None and learned.requires_grad)
    want_query = enabled and (want_query or (traced and inside_func()))
    wanted = want_query or (enabled and (problem.key.requires_grad or problem.negatives.requires_grad))
    if traced or not wanted:
        _refuse_tangents(problem, backend, traced)
    if not wanted:
        rest = (False, want_rank, backend)
        loss, rank, *_ = _forward(*problem, *rest) if traced else _solve("forward", problem, *rest)
        return loss, rank
    arguments = (*problem, want_query, want_rank, backend)
    if traced:
        loss, rank, *_ = _InfoNCE.apply(*arguments, None)  # type: ignore[no-untyped-call]
    else:
        try:
            loss, rank, *_ = _apply(*arguments, version_of(problem.negatives))  # type: ignore[no-untyped-call]
        except NotImplementedError:  # what torch raises of a tangent, and others of a device
            _refuse_tangents(problem, backend, traced)
            raise
    return loss, rank


def _refuse_tangents(problem: Problem, backend: str, traced: bool) -> None:
    if traced and torch.compiler.is_dynamo_compiling():
        return
    found = traced and "Jvp" in transforms()
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    if unpack(problem.query).primal is not problem.query:  # else nothing has a tangent
        for x in (problem.query, problem.key, problem.negatives, problem.learned_scale):
            found = found or (x is not None and unpack(x).tangent is not None)
    if found:
        raise RuntimeError(
            f"dense_info_nce: the {backend!r} backend has no forward-mode derivative (jvp); use backend='eager'"
        )


class _InfoNCE(torch.autograd.Function):
    """The fields of a Problem -> the fields of a Result. Differentiable once: by query, key, negatives, learned scale.

    All that backward needs of the result is an output, as torch.func asks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _forward(*arguments[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *fields, _, _, ctx.backend, ctx.version = inputs
        ctx.query_dtype = fields[0].dtype
        _, rank, *saved = output
        ctx.mark_non_differentiable(*(x for x in (rank, *saved) if x is not None))
        ctx.set_materialize_grads(False)  # of those, as large as the query's
        # Inputs are kept only for the gradients that need them, above all never a frozen queue or its count:
        # enqueueing into it before backward() is harmless.
        _, needs_key, needs_negatives, *_ = ctx.needs_input_grad
        if needs_key or needs_negatives:
            dropped = () if needs_negatives else ("negatives", "exclude", "existing")
            kept = [None if name in dropped else x for name, x in zip(Problem._fields, fields, strict=True)]
            saved = [*saved, *(x if isinstance(x, Tensor) else None for x in kept)]
            ctx.others = [None if isinstance(x, Tensor) else x for x in kept]
        ctx.links = None
        if inside_func():  # empty, but followed as far as the inputs are, and with a version of their own
            with torch.enable_grad():
                links = [x.flatten()[:0].clone() for x in fields if isinstance(x, Tensor) and x.is_floating_point()]
            ctx.links, saved = len(links), [*saved, *links]
        ctx.save_for_backward(ctx.version, *saved)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # what follows the loss gave no gradient
            return (None,) * len(ctx.needs_input_grad)
        version, *saved = ctx.saved_tensors
        links = [saved.pop() for _ in range(ctx.links or 0)]
        compiling = torch.compiler.is_compiling()
        again = torch.is_grad_enabled() and not compiling
        if not compiling:
            compare(ctx.version, version)
        if again and ctx.links is None:
            raise _once_only(ctx.backend, "create_graph=True")
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            found = _gradients(ctx, grad_loss, *saved)
        if again:  # torch.func always has grad mode on: whether a derivative follows shows only when it is taken
            found = tuple(x if x is None else _Once.apply(ctx.backend, x, grad_loss, *links) for x in found)  # type: ignore[no-untyped-call]
        return found


class _Once(torch.autograd.Function):
    """A gradient, whose derivative by what it was computed from raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.backend = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise _once_only(ctx.backend, "a second derivative")


def _once_only(backend: str, got: str) -> RuntimeError:
    return RuntimeError(
        f"dense_info_nce: the {backend!r} backend can be differentiated once only, got {got}; "
        "use backend='eager' for second derivatives"
    )


# What Function.apply calls in the end. Before, it binds the arguments to the signature of forward() and unwraps dead
# wrappers of torch.func, which takes as long as a small loss (40 frames).
_apply = super(torch.autograd.Function, _InfoNCE).apply


def _gradients(ctx: Any, grad_loss: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    log_sum_exp, pull, grad_query, grad_scale, *tensors = saved
    needs_query, needs_key, needs_negatives, _, needs_scale, *not_differentiable = ctx.needs_input_grad
    to_query = to_key = to_negatives = to_scale = None
    if needs_key or needs_negatives:
        row_weight = _weigh(grad_loss, pull)
        kept = [other if x is None else x for x, other in zip(tensors, ctx.others, strict=True)]
        query, key, negatives, *rest = kept
        if negatives is None:  # the key's gradient reads none
            kept = [query, key, query.new_empty(0, query.shape[1]), *rest]
        problem = Problem(*kept)
        if needs_negatives:
            to_negatives = _grad_negatives(*problem, log_sum_exp, row_weight, ctx.backend).to(problem.negatives.dtype)
        if needs_key:
            to_key = _grad_key(*problem, row_weight, ctx.backend).mT.to(problem.key.dtype)
    if needs_query:
        to_query = _weigh(grad_loss[:, :, None], grad_query, ctx.query_dtype).mT
    if needs_scale:
        to_scale = _weigh(grad_loss, grad_scale).sum()
    return to_query, to_key, to_negatives, None, to_scale, *(None,) * len(not_differentiable)


def _weigh(grad: Tensor, row: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Upstream gradient times row, by default in its dtype; a row of weight 0 is left out even if it holds NaN."""
    with limited(1) if grad.is_cpu and row.numel() > SERIAL and not is_traced(grad) else nullcontext():
        return (grad * row).masked_fill_(grad == 0, 0.0).to(dtype or row.dtype)


def _solve(name: str, problem: Problem, *given: Any) -> Any:
    """Calls the function `name` of a backend with further arguments, the last of which says which backend."""
    *rest, backend = given
    return _backends.call(backend, "info_nce", name, problem.query, problem.matmul_dtype, problem, *rest)


def _operator(
    name: str, arguments: str, returns: str, fake: Callable[..., Any], **options: Callable[..., Any]
) -> Callable[..., Any]:
    """`_solve` as an operator: the fields of a Problem, further arguments, which backend."""
    fields = len(Problem._fields)

    def body(*given: Any) -> Any:
        return _solve(name, Problem(*given[:fields]), *given[fields:])

    def fake_body(*given: Any) -> Any:
        return fake(Problem(*given[:fields]), *given[fields:])

    operator_name = "info_nce" if name == "forward" else f"info_nce_{name}"
    schema = f"({SCHEMA}, {arguments}, str backend) -> {returns}"
    return operator(operator_name, schema, body, fake_body, **options)


_forward = _operator(
    "forward",
    "bool want_grad, bool want_rank",
    f"(Tensor {', Tensor '.join(Result._fields)})",
    lambda problem, want_grad, want_rank, backend: empty_result(problem, want_grad, want_rank),
    # Of the logits; the gradient to the queries takes as many.
    flops=lambda query, key, negatives, *rest: 2 * query.numel() * (1 + len(negatives)) * (2 if rest[-3] else 1),
    when_traced=lambda query, key, negatives, *_: note_compiled(negatives),
)
_grad_negatives = _operator(
    "grad_negatives",
    "Tensor log_sum_exp, Tensor row_weight",
    "Tensor",
    lambda problem, *_: problem.negatives.new_empty(problem.negatives.shape, dtype=problem.dtype),
    # As in every count of a model's operations, what is computed again is not among them.
    flops=lambda query, key, negatives, *_: 2 * query.numel() * len(negatives),
)
_grad_key = _operator(
    "grad_key",
    "Tensor row_weight",
    "Tensor",
    lambda problem, *_: problem.key.mT.new_empty(problem.key.mT.shape, dtype=problem.dtype),
    flops=lambda query, *_: 2 * query.numel(),
)
