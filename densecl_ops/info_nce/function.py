"""Stateless dense InfoNCE: checks, normal forms, choice of backend, reduction."""

from __future__ import annotations

import functools
import warnings
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from densecl_ops import _backends, _checks
from densecl_ops._numerics import accumulation_dtype, no_autocast
from densecl_ops._recomputation import guard, note_call
from densecl_ops._types import BackendName, Correspondence, NegativeQueue, Reduction
from densecl_ops.info_nce import autograd, eager
from densecl_ops.info_nce.problem import Problem

REDUCTIONS = get_args(Reduction)


@overload
def dense_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    exclude: Tensor | None = None,
    return_rank: Literal[False] = False,
    backend: BackendName = "auto",
) -> Tensor: ...


@overload
def dense_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    exclude: Tensor | None = None,
    return_rank: Literal[True],
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def dense_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    exclude: Tensor | None = None,
    return_rank: bool,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def dense_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    exclude: Tensor | None = None,
    return_rank: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""InfoNCE of every query position against its matching key position and a shared set of negatives.

    With q^ and k^ the normalised projections, s+ = <q^_i, k^_index(i)> / t and s_j = <q^_i, n_j> / t,

    .. math:: \mathrm{loss}_i = \log\Bigl(e^{s_+} + \sum_j e^{s_j}\Bigr) - s_+

    (DenseCL, arXiv 2011.09157, equation 2). Given (B, D) vectors it is MoCo's image-level loss.

    Args:
        query: (B, D, H_q, W_q) projections, normalised inside; (B, D, P_q) and (B, D) also work. Any strides.
        key: The same for the other view. Its grid may differ when a correspondence is given.
        negatives: (K, D) unit rows, used as they are (a warning tells of others, once, where they lie on the CPU), or
            a MomentumQueue.
        correspondence: A Correspondence, or an integer tensor (B, P_q) of key positions. None: position i matches
            position i, and the two grids must agree.
        temperature: t, at least 1e-18; a number, or a 0-d tensor, which receives a gradient if it asks for one.
        reduction: "mean" (over the total weight), "sum" or "none".
        weight: (B, P_q) scales the rows. A row of weight 0 or with an invalid match is left out,
            even if it holds NaN (in the gradients of "eager" a NaN stays).
        exclude: (B,) integer, the row of `negatives` that belongs to the same image, left out of its sum.
        return_rank: Also return how many negatives score above each positive (0: the positive wins). Both are compared
            in the dtype in which the rows are kept and multiplied. Ties, cosines within 2^-18, count half, rounded
            down: a collapsed network ranks K / 2. A positive that is NaN ranks K, the number of rows.
        backend: "auto" takes the Triton kernels on CUDA and ROCm devices, and "blockwise" elsewhere or, with one
            warning, where they cannot serve. "blockwise" is plain PyTorch in tiles, "eager" the textbook formula, to
            check with. "triton" is the kernels or an error.

    Returns:
        The loss in float32 (float64 if query, key or negatives are), under autocast too. It is 0-d, or (B, P_q) for
        "none". It is 0 when every row is left out. With return_rank, a pair of the loss and the rank (B, P_q) int64.

        Gradients flow to query, to key, negatives and temperature where they require grad, and to weight. The
        products run in the autocast dtype under autocast, else in the wider of the query's and the negatives' dtype.
        Except in "eager", nothing of size (B P_q) x K is held, `negatives` may change before backward(), and the result
        can be differentiated once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or values do not fit, or the backend cannot serve; names the argument.
        RuntimeError: backward() differentiates twice, or activation checkpointing computes the loss again after the
            queue was written.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from densecl_ops.functional import dense_correspondence, dense_info_nce
        >>> features_q, features_k = torch.randn(2, 4, 64, 7, 7)
        >>> query = torch.randn(4, 128, 7, 7, requires_grad=True)
        >>> key = torch.randn(4, 128, 7, 7)
        >>> negatives = F.normalize(torch.randn(1024, 128), dim=1)
        >>> match = dense_correspondence(features_q, features_k)
        >>> loss, rank = dense_info_nce(query, key, negatives, match, return_rank=True)
        >>> loss.backward()
        >>> top1 = (rank < 1).float().mean()  # contrastive accuracy
        >>> loss.dtype, rank.shape, query.grad.shape
        (torch.float32, torch.Size([4, 49]), torch.Size([4, 128, 7, 7]))
    """
    _checks.require_choice("reduction", reduction, REDUCTIONS)
    _checks.require_bool("return_rank", return_rank)
    problem, valid = _normal_form(query, key, negatives, correspondence, temperature, exclude)
    row_weight = _row_weight(weight, valid, problem)
    chosen = _backends.choose(backend, problem.query, problem.dtype, problem.query.shape[1])
    if not torch.compiler.is_compiling():
        note_call(problem.negatives)
    with no_autocast(problem.query):
        if chosen == "eager":
            loss, rank = eager.row_loss(problem, return_rank)
        else:
            loss, rank = autograd.row_loss(problem, return_rank, chosen)
        loss = guard(_reduce(loss, row_weight, reduction), problem.negatives)
    return (loss, rank) if return_rank else loss


def _normal_form(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None,
    temperature: float | Tensor,
    exclude: Tensor | None,
) -> tuple[Problem, Tensor | None]:
    """Checks every argument; returns the problem and the (B, P_q) validity of its rows (None: all valid)."""
    q, k = _checks.flatten_map("query", query), _checks.flatten_map("key", key)
    _checks.require_paired_maps("query", q, "key", k)
    batch, channels, positions = q.shape

    rows, count = (negatives, None) if isinstance(negatives, Tensor) else _queue_contents(negatives)
    _checks.require_float("negatives", rows)
    if rows.ndim != 2 or rows.shape[1] != channels or rows.shape[0] == 0:
        hint = ""
        if query.ndim == 3 and rows.ndim == 2 and query.shape[2] == rows.shape[1] != channels:
            hint = f"; query, {_checks.shape_of(query)}, looks like (B, P, D) tokens: pass .transpose(1, 2)"
        raise ValueError(
            f"negatives: got shape {_checks.shape_of(rows)}, expected (K, {channels}) with K at least 1, "
            f"{channels} being the channels of query{hint}"
        )
    size = rows.shape[0]
    _checks.require_same_device("negatives", rows, "query", q)
    if count is not None:
        count = _checks.require_index("negatives.count", count, (), size + 1, "query", q)

    _warn_of_lengths(rows, count)

    index, valid = None, None
    if correspondence is None:
        grids_differ = query.ndim == key.ndim == 4 and query.shape[2:] != key.shape[2:]
        if grids_differ or positions != k.shape[2]:
            raise ValueError(
                f"key: got shape {_checks.shape_of(key)} beside a query of {_checks.shape_of(query)}, "
                "expected the same grid, since correspondence is None"
            )
    elif isinstance(correspondence, Tensor):
        index = _checks.require_index("correspondence", correspondence, (batch, positions), k.shape[2], "query", q)
    else:
        index, valid = _correspondence_contents(correspondence, (batch, positions), k.shape[2], q)
    if exclude is not None:
        exclude = _checks.require_index("exclude", exclude, (batch,), size, "query", q)

    dtype = accumulation_dtype(q, k, rows)
    matmul_dtype = torch.promote_types(q.dtype, rows.dtype)
    if dtype == torch.float64:
        matmul_dtype = torch.float64
    elif torch.is_autocast_enabled(q.device.type):
        matmul_dtype = torch.get_autocast_dtype(q.device.type)
    scale, learned_scale = _scales(temperature, q, dtype)
    problem = Problem(
        query=_checks.outside_inference(q),
        key=_checks.outside_inference(k),
        negatives=rows,
        scale=scale,
        learned_scale=learned_scale,
        matches=index,
        exclude=exclude,
        existing=count,
        unit_negatives=count is not None,  # only a queue brings a count, and it normalises what it stores
        dtype=dtype,
        matmul_dtype=matmul_dtype,
    )
    return problem, valid


def _queue_contents(queue: NegativeQueue) -> tuple[Tensor, Tensor]:
    rows, count = getattr(queue, "rows", None), getattr(queue, "count", None)
    if not isinstance(rows, Tensor) or not isinstance(count, Tensor):
        raise TypeError(f"negatives: got {type(queue).__name__}, expected a (K, D) tensor or a MomentumQueue")
    return rows, count


def _warn_of_lengths(negatives: Tensor, count: Tensor | None) -> None:
    """Looks at some 64 rows, where that waits for no device."""
    if not _checks.host_may_look(negatives):
        return
    existing = negatives if count is None else negatives[: int(count)]
    length = _checks.find_length(existing[:: max(1, len(existing) // 64)])
    if length is not None:
        _warn_of_length()


@functools.cache  # once per process
def _warn_of_length() -> None:
    warnings.warn(
        "negatives: got rows that are not of length 1, which are used as they are; normalise them "
        "(torch.nn.functional.normalize(rows, dim=1)) unless that is meant",
        stacklevel=5,
    )


def _correspondence_contents(
    match: Correspondence, shape: tuple[int, int], key_positions: int, query: Tensor
) -> tuple[Tensor, Tensor]:
    index, valid = getattr(match, "index", None), getattr(match, "valid", None)
    if not isinstance(index, Tensor) or not isinstance(valid, Tensor):
        raise TypeError(
            f"correspondence: got {type(match).__name__}, expected a Correspondence, an integer tensor or None"
        )
    index = _checks.require_index("correspondence.index", index, shape, key_positions, "query", query)
    return index, _checks.require_mask("correspondence.valid", valid, shape, "query", query)


def _scales(temperature: float | Tensor, query: Tensor, dtype: torch.dtype) -> tuple[float | None, Tensor | None]:
    """1 / t, as a number or as a tensor."""
    if isinstance(temperature, Tensor):
        _checks.require_float("temperature", temperature)
        if temperature.ndim != 0:
            raise ValueError(
                f"temperature: got shape {_checks.shape_of(temperature)}, expected a number or a 0-d tensor"
            )
        _checks.require_same_device("temperature", temperature, "query", query)
        if _checks.host_may_look(temperature):
            _checks.require_temperature("temperature", float(temperature.detach()))
        return None, temperature.to(dtype).reciprocal()
    return 1.0 / _checks.require_temperature("temperature", temperature), None


def _row_weight(weight: Tensor | None, valid: Tensor | None, problem: Problem) -> Tensor | None:
    """`weight` with invalid rows at 0, in the dtype of the loss; None if every row counts alike."""
    if weight is None:
        return None if valid is None else valid.to(problem.dtype)
    _checks.require_tensor("weight", weight)
    if weight.dtype != torch.bool:
        _checks.require_float("weight", weight)
    _checks.require_shape("weight", weight, (problem.query.shape[0], problem.query.shape[2]))
    _checks.require_same_device("weight", weight, "query", problem.query)
    weight = _checks.outside_inference(weight).to(problem.dtype)
    return weight if valid is None else weight.masked_fill(~valid, 0.0)


def _reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        loss = loss.masked_fill(weight == 0, 0.0) * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight is None:
        return loss.mean()
    total = weight.sum()
    return loss.sum() / total.masked_fill(total == 0, 1.0)
