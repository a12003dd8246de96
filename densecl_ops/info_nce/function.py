"""Stateless dense InfoNCE: checks, normal forms, choice of backend, reduction."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from densecl_ops import _backends, _checks, _pairs
from densecl_ops._checks import Fields, Look
from densecl_ops._numerics import accumulation_dtype, no_autocast
from densecl_ops._recomputation import guard, note
from densecl_ops._types import BackendName, Correspondence, Grids, NegativeQueue, Reduction
from densecl_ops.info_nce import autograd, eager
from densecl_ops.info_nce.problem import Problem


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
    _checks.require_choice("reduction", reduction, _pairs.REDUCTIONS)
    if not isinstance(return_rank, bool):
        return_rank = _checks.require_bool("return_rank", return_rank)
    rows, count, unit_rows = _negatives(negatives)
    index, valid, name = _pairs.parts(correspondence)
    look = _checks.look
    seen = Seen(
        query=look("query", query),
        key=look("key", key),
        negatives=look("negatives", rows),
        existing=None if count is None else look("negatives.count", count),
        matches=None if index is None else look(name, index),
        valid=None if valid is None else look("correspondence.valid", valid),
        exclude=None if exclude is None else look("exclude", exclude),
        weight=None if weight is None else look("weight", weight),
        index_name=name,
        grids=getattr(correspondence, "grids", None) if valid is not None else None,
    )
    traced = _checks.is_traced(query)
    dtype, matmul_dtype = (_check if traced else _check_once)(seen)
    if unit_rows and key.requires_grad and not traced:
        _warn_of_key_gradient()
    if not traced and query.device.type == "cpu":  # where looking at values waits for no device
        _check_values(rows, count, unit_rows, index, key, exclude, name)
    scale, learned_scale = _scales(temperature, query, dtype, traced)
    if dtype != torch.float64 and torch.is_autocast_enabled(query.device.type):
        matmul_dtype = torch.get_autocast_dtype(query.device.type)
    query, key, index, exclude, weight, valid = _checks.outside_inference(query, key, index, exclude, weight, valid)
    problem = Problem(
        query=_checks.flatten(query),
        key=_checks.flatten(key),
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
    chosen = _backends.choose(backend, query, dtype, query.shape[1])
    if not traced:
        note(rows)
    if chosen == "eager":
        with no_autocast(query):
            loss, rank = eager.row_loss(problem, return_rank)
    else:
        loss, rank = autograd.row_loss(problem, return_rank, chosen, traced)
    row_weight = None if weight is None and valid is None else _pairs.row_weight(weight, valid, dtype)
    loss = _pairs.reduce(loss, row_weight, reduction)
    if not traced:
        loss = guard(loss, rows)
    return (loss, rank) if return_rank else loss


def _negatives(negatives: Tensor | NegativeQueue) -> tuple[Tensor, Tensor | None, bool]:
    """Rows, how many of them exist (None: all), and whether they are declared to be unit rows."""
    if isinstance(negatives, Tensor):
        return negatives, None, False
    rows, count = getattr(negatives, "rows", None), getattr(negatives, "count", None)
    if not isinstance(rows, Tensor) or not isinstance(count, Tensor):
        raise TypeError(f"negatives: got {type(negatives).__name__}, expected a (K, D) tensor or a MomentumQueue")
    return rows, count, getattr(negatives, "unit_rows", False) is True


class Seen(NamedTuple):
    """What the host knows of a call without values, by argument. It decides whether the call can be served at all."""

    query: Fields
    key: Fields
    negatives: Fields
    existing: Fields | None
    matches: Fields | None
    valid: Fields | None
    exclude: Fields | None
    weight: Fields | None
    index_name: str
    grids: Grids | None


def _check(seen: Seen) -> tuple[torch.dtype, torch.dtype]:
    """Checks shapes, dtypes and devices; returns the dtypes of the loss and of the products with the negatives."""
    query, key, negatives = Look(*seen.query), Look(*seen.key), Look(*seen.negatives)
    matches, valid, weight = (None if x is None else Look(*x) for x in (seen.matches, seen.valid, seen.weight))
    _pairs.require_pairs(query, key, matches, valid, weight, seen.index_name, seen.grids)
    batch, channels = query.shape[:2]
    _checks.require_float_dtype("negatives", negatives)
    if len(negatives.shape) != 2 or negatives.shape[1] != channels or negatives.shape[0] == 0:
        hint = ""
        if len(negatives.shape) == 2:
            way = _checks.transposed(query, negatives.shape[1])
            if way is not None:
                hint = f"; query, {_checks.shape_of(query)}, looks like {way}"
            elif negatives.shape[0] == channels:
                hint = "; a (D, K) queue, as MoCo stores it, is passed as .T"
        raise ValueError(
            f"negatives: got shape {_checks.shape_of(negatives)}, expected (K, {channels}) with K at least 1, "
            f"{channels} being the channels of query{hint}"
        )
    _checks.require_same_device("negatives", negatives, "query", query)
    if seen.existing is not None:
        _checks.require_index("negatives.count", Look(*seen.existing), (), "query", query)
    if seen.exclude is not None:
        _checks.require_index("exclude", Look(*seen.exclude), (batch,), "query", query)
    dtype = accumulation_dtype(query, key, negatives)
    return dtype, dtype if dtype == torch.float64 else torch.promote_types(query.dtype, negatives.dtype)


# A training loop makes the same few calls again and again. They pass the same checks, which take 25 us.
_check_once = functools.lru_cache(maxsize=256)(_check)


def _check_values(
    rows: Tensor,
    count: Tensor | None,
    unit_rows: bool,
    index: Tensor | None,
    key: Tensor,
    exclude: Tensor | None,
    index_name: str,
) -> None:
    existing = size = rows.shape[0]
    if count is not None:
        existing = int(count)
        if not 0 <= existing <= size:
            raise ValueError(
                f"negatives.count: got {existing}, expected 0 to {size}; a queue that was not initialised "
                "(to_empty, a checkpoint without it) needs reset_parameters()"
            )
    if index is not None:
        _checks.require_range(index_name, index, math.prod(key.shape[2:]))
    if exclude is not None:
        _checks.require_range("exclude", exclude, size)
    _warn_of_lengths(rows, existing, unit_rows)


def _warn_of_lengths(rows: Tensor, existing: int, unit_rows: bool) -> None:
    """Looks at some 64 rows: once for each tensor, and again when it was written (a queue: 64 times)."""
    version, key = 0 if rows.is_inference() else rows._version, id(rows)
    known = _looked_at.get(key)
    if known is not None and known[0]() is rows and version - known[1] < (64 if unit_rows else 1):
        if existing == 0 and unit_rows and version == known[1]:
            _warn_of_empty()
        return
    _looked_at[key] = weakref.ref(rows, functools.partial(_forget, key)), version
    if _checks.find_length(rows[: existing : max(1, existing // 64)]) is not None:
        _warn_of_length(unit_rows)


def _forget(key: int, dead: object) -> None:
    _looked_at.pop(key, None)


_looked_at: dict[int, tuple[weakref.ref[Tensor], int]] = {}


@functools.cache  # once per process
def _warn_of_empty() -> None:
    warnings.warn(
        "negatives: got an empty queue again, beside which every loss is 0; call enqueue(keys) after each loss",
        stacklevel=5,
    )


@functools.cache  # once per process
def _warn_of_key_gradient() -> None:
    warnings.warn(
        "key: got a tensor that requires grad beside a queue, whose rows come from a network that learns by its moving "
        "average alone; compute the key under torch.no_grad()",
        stacklevel=3,
    )


@functools.cache  # once per process
def _warn_of_length(is_queue: bool) -> None:
    way = (
        "averaging of buffers spoils a queue: leave it out (ema-pytorch: ignore_startswith_names; AveragedModel and "
        "EMAWeightAveraging: use_buffers=False)"
        if is_queue
        else "normalise them (torch.nn.functional.normalize(rows, dim=1)) unless that is meant"
    )
    warnings.warn(f"negatives: got rows that are not of length 1, which are used as they are; {way}", stacklevel=5)


def _scales(
    temperature: float | Tensor, query: Tensor, dtype: torch.dtype, traced: bool
) -> tuple[float | None, Tensor | None]:
    """1 / t, as a number or as a tensor."""
    if isinstance(temperature, Tensor):
        _checks.require_float("temperature", temperature)
        if temperature.ndim != 0:
            raise ValueError(
                f"temperature: got shape {_checks.shape_of(temperature)}, expected a number or a 0-d tensor"
            )
        _checks.require_same_device("temperature", temperature, "query", query)
        if not traced and temperature.device.type == "cpu":
            try:
                _checks.require_temperature("temperature", float(temperature.detach()))
            except ValueError as error:
                raise ValueError(f"{error}; a logit_scale that was not initialised needs reset_parameters()") from None
        return None, temperature.to(dtype).reciprocal()
    return 1.0 / _checks.require_temperature("temperature", temperature), None
