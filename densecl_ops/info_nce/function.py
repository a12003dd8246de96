"""Stateless dense InfoNCE: checks, normal forms, choice of backend, reduction."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from densecl_ops import _backends, _checks, _maps, _pairs
from densecl_ops._numerics import accumulation_dtype, no_autocast
from densecl_ops._recomputation import Guard, note, version_of
from densecl_ops._tracing import is_traced, outside_inference
from densecl_ops._types import REDUCTIONS, BackendName, Correspondence, NegativeQueue, Reduction
from densecl_ops.info_nce import autograd, eager
from densecl_ops.info_nce.eager import Problem

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CallOptions(TypedDict, total=False):
    """What a call of the module may ask for beside the rank, too; each as `dense_info_nce` says."""

    weight: Tensor | None
    exclude: Tensor | None


class Options(CallOptions, total=False):
    """What the module has as its own."""

    temperature: float | Tensor
    reduction: Reduction
    backend: BackendName


@overload
def dense_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None = None,
    *,
    return_rank: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def dense_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None = None,
    *,
    return_rank: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def dense_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Correspondence | Tensor | None = None,
    *,
    return_rank: bool,
    **options: Unpack[Options],
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
    """InfoNCE of every query position against its matching key position and a shared set of negatives.

    With q^ and k^ the normalised projections, s+ = <q^_i, k^_index(i)> / t and s_j = <q^_i, n_j> / t::

        loss_i = log(exp(s+) + sum_j exp(s_j)) - s+

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
        weight: (B, P_q) scales the rows. One of weight 0 or with an invalid match is left out, even if it holds NaN (in
            the gradients of "eager" a NaN stays).
        exclude: (B,) integer, the row of `negatives` that belongs to the same image, left out of its sum.
        return_rank: Also return how many negatives score above each positive (0: the positive wins). Both are compared
            in the dtype in which the rows are kept and multiplied. Ties, cosines within 2^-18 (2^-46 in float64), count
            half, rounded down: a collapsed network ranks K / 2. A positive that is NaN ranks K, the number of rows.
        backend: "auto" takes the Triton kernels on CUDA and ROCm devices, and "blockwise" elsewhere or, with one
            warning, where they cannot serve. "blockwise" is plain PyTorch in tiles, "eager" the textbook formula, to
            check with. "triton" is the kernels or an error.

    Returns:
        The loss in float32 (float64 if query, key or negatives are), under autocast too: 0-d, or (B, P_q) for "none";
        0 when every row is left out. With return_rank, a pair of the loss and the rank (B, P_q) int64.

        Gradients flow to all of query, key, negatives, temperature and weight that require grad. The products run in
        the autocast dtype under autocast, else in the wider of the query's and the negatives' dtype. Negatives that
        need no gradient may change before backward(). Except in "eager" the logits are held a tile at a time (on a CPU
        of up to 4 MiB for each thread), and there are no second derivatives.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or values do not fit, or the backend cannot serve; names the argument.
        RuntimeError: create_graph=True outside "eager", or activation checkpointing computes the loss again after the
            queue was written.

    Example:
        >>> import torch
        >>> from densecl_ops.functional import dense_correspondence, dense_info_nce
        >>> match = dense_correspondence(*torch.randn(2, 4, 64, 7, 7))  # of backbone features
        >>> query, key = torch.randn(4, 128, 7, 7, requires_grad=True), torch.randn(4, 128, 7, 7)
        >>> negatives = torch.nn.functional.normalize(torch.randn(1024, 128), dim=1)
        >>> loss, rank = dense_info_nce(query, key, negatives, match, return_rank=True)
        >>> loss.backward()
        >>> top1 = (rank < 1).float().mean()  # contrastive accuracy
        >>> loss.dtype, rank.shape, query.grad.shape
        (torch.float32, torch.Size([4, 49]), torch.Size([4, 128, 7, 7]))
    """
    _checks.require_choice("reduction", reduction, REDUCTIONS)
    return_rank = _checks.require_bool("return_rank", return_rank)
    rows, count, unit_rows = _negatives(negatives)
    match = _pairs.parts(correspondence)
    traced = is_traced(query)
    check = _check if traced else _check_once
    dtype, matmul_dtype = check(query, key, rows, count, exclude, weight, *match)
    index, valid, index_name, _ = match
    if not traced:
        if unit_rows and key.requires_grad:
            _checks.warn_once(_KEY_GRADIENT, 3)
        if query.is_cpu:  # where looking at values waits for no device
            existing = _existing(rows, count, unit_rows)
            count = None if existing == rows.shape[0] else count
            if index is not None:
                _checks.require_range(index_name, index, math.prod(key.shape[2:]))
            if exclude is not None:
                _checks.require_range("exclude", exclude, rows.shape[0])
        note(rows)
    scale, learned_scale = _scales(temperature, query, dtype, traced)
    if dtype != torch.float64 and torch.is_autocast_enabled(query.device.type):
        matmul_dtype = torch.get_autocast_dtype(query.device.type)
    query, key, index, exclude, weight, valid = outside_inference(query, key, index, exclude, weight, valid)
    problem = Problem(
        query=_maps.flatten(query),
        key=_maps.flatten(key),
        negatives=rows,
        scale=scale,
        learned_scale=learned_scale,
        matches=None if index is None else index.long(),
        exclude=None if exclude is None else exclude.long(),
        existing=None if count is None else count.long(),
        unit_negatives=unit_rows,
        dtype=dtype,
        matmul_dtype=matmul_dtype,
    )
    chosen = _backends.choose(backend, query, dtype, query.shape[1], traced)
    if chosen == "eager":
        with no_autocast(query):
            loss, rank = eager.row_loss(problem, return_rank)
        if not traced:
            loss = Guard.apply(loss, version_of(rows))  # type: ignore[no-untyped-call]
    else:
        loss, rank = autograd.row_loss(problem, return_rank, chosen, traced)
    loss = _pairs.reduce(loss, weight, valid, reduction)
    return (loss, rank) if return_rank and rank is not None else loss


def _negatives(negatives: Tensor | NegativeQueue) -> tuple[Tensor, Tensor | None, bool]:
    """Rows, how many of them exist (None: all), and whether they are declared to be unit rows."""
    if isinstance(negatives, Tensor):
        return negatives, None, False
    rows, count = getattr(negatives, "rows", None), getattr(negatives, "count", None)
    if not isinstance(rows, Tensor) or not isinstance(count, Tensor):
        hint = ""
        if isinstance(negatives, Correspondence):
            hint = "; the order is query, key, negatives, correspondence"
        elif isinstance(negatives, tuple):
            hint = "; in_batch_negatives returns a pair: negatives, own = in_batch_negatives(keys), with exclude=own"
        expected = "expected a (K, D) tensor or a MomentumQueue"
        raise TypeError(f"negatives: got {type(negatives).__name__}, {expected}{hint}")
    return rows, count, getattr(negatives, "unit_rows", False) is True


def _check(
    query: Tensor, key: Tensor, negatives: Tensor, count: Any, exclude: Any, weight: Any, *match: Any
) -> tuple[torch.dtype, torch.dtype]:
    """Checks shapes, dtypes and devices; returns the dtypes of the loss and of the products with the negatives."""
    _pairs.require_pairs(query, key, weight, match)
    batch, channels = query.shape[:2]
    _checks.require_float("negatives", negatives)
    if negatives.ndim != 2 or negatives.shape[1] != channels or negatives.shape[0] == 0:
        hint = ""
        if negatives.ndim == 2:
            way = _maps.transposed(query, negatives.shape[1])
            if way is not None:
                hint = f"; query, {_checks.shape_of(query)}, looks like {way}"
            elif negatives.shape[0] == channels:
                hint = "; a (D, K) queue, as MoCo stores it, is passed as .T"
        raise ValueError(
            f"negatives: got shape {_checks.shape_of(negatives)}, expected (K, {channels}) with K at least 1, "
            f"{channels} being the channels of query{hint}"
        )
    _checks.require_same_device("negatives", negatives, "query", query)
    if count is not None:
        _checks.require_index("negatives.count", count, (), "query", query)
    if exclude is not None:
        _checks.require_index("exclude", exclude, (batch,), "query", query)
    dtype = accumulation_dtype(query, key, negatives)
    return dtype, dtype if dtype == torch.float64 else torch.promote_types(query.dtype, negatives.dtype)


_check_once = _checks.once(_check)


def _existing(rows: Tensor, count: Tensor | None, unit_rows: bool) -> int:
    """How many negatives exist, as far as they can be told; warns of what they hold."""
    existing = size = rows.shape[0]
    if count is not None:
        existing = int(count)
        if not 0 <= existing <= size:
            raise ValueError(
                f"negatives.count: got {existing}, expected 0 to {size}; a queue that was not initialised "
                "(to_empty, a checkpoint without it) needs reset_parameters()"
            )
    # Some 64 rows are looked at: once for each tensor, and again when it was written (a queue: 64 times).
    version, key = 0 if rows.is_inference() else rows._version, id(rows)
    before, seen = _looked_at.get(key, (None, 0))
    if before is None or before() is not rows or version - seen >= (64 if unit_rows else 1):
        _looked_at[key] = weakref.ref(rows, lambda _: _looked_at.pop(key, None)), version
        if _checks.find_length(rows[: existing : max(1, existing // 64)]) is not None:
            _checks.warn_once(_AVERAGED if unit_rows else _NOT_NORMALISED, 4)
    elif existing == 0 and unit_rows and version == seen:
        _checks.warn_once(_EMPTY, 4)
    return existing


_looked_at: dict[int, tuple[weakref.ref[Tensor] | None, int]] = {}  # at which version

_KEY_GRADIENT = (
    "key: got a tensor that requires grad beside a queue, whose rows come from a network that learns by its moving "
    "average alone; compute the key under torch.no_grad()"
)
_EMPTY = "negatives: got an empty queue again, beside which every loss is 0; call enqueue(keys) after each loss"
_LENGTHS = "negatives: got rows that are not of length 1, which are used as they are; "
_NOT_NORMALISED = _LENGTHS + "normalise them (torch.nn.functional.normalize(rows, dim=1)) unless that is meant"
_AVERAGED = _LENGTHS + (
    "averaging of buffers spoils a queue: leave it out (ema-pytorch: ignore_startswith_names; AveragedModel and "
    "EMAWeightAveraging: use_buffers=False)"
)


def _scales(
    temperature: float | Tensor, query: Tensor, dtype: torch.dtype, traced: bool
) -> tuple[float | None, Tensor | None]:
    """1 / t, as a number or as a tensor."""
    if not isinstance(temperature, Tensor):
        return 1.0 / _checks.require_temperature("temperature", temperature), None
    _checks.require_float("temperature", temperature)
    if temperature.ndim != 0:
        raise ValueError(f"temperature: got shape {_checks.shape_of(temperature)}, expected a number or a 0-d tensor")
    _checks.require_same_device("temperature", temperature, "query", query)
    if not traced and temperature.device.type == "cpu":
        try:
            _checks.require_temperature("temperature", float(temperature.detach()))
        except ValueError as error:
            raise ValueError(f"{error}; a logit_scale that was not initialised needs reset_parameters()") from None
    return None, temperature.to(dtype).reciprocal()
