"""What the losses over matched positions share: which positions pair, what each row weighs, the reduction."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from densecl_ops import _checks
from densecl_ops._checks import Look
from densecl_ops._types import Correspondence, Grids, Reduction

REDUCTIONS = get_args(Reduction)


def parts(match: Correspondence | Tensor | None) -> tuple[Tensor | None, Tensor | None, str]:
    """Index and validity of a `correspondence`, and what to call the index."""
    if match is None or isinstance(match, Tensor):
        return match, None, "correspondence"
    index, valid = getattr(match, "index", None), getattr(match, "valid", None)
    if not isinstance(index, Tensor) or not isinstance(valid, Tensor):
        raise TypeError(
            f"correspondence: got {type(match).__name__}, expected a Correspondence, an integer tensor or None"
        )
    return index, valid, "correspondence.index"


def require_pairs(
    query: Tensor | Look,
    key: Tensor | Look,
    index: Tensor | Look | None,
    valid: Tensor | Look | None,
    weight: Tensor | Look | None,
    index_name: str,
    grids: Grids | None = None,
) -> None:
    """Two maps of the same images, and what belongs to the query positions: shapes, dtypes and devices, no values."""
    batch, _, positions = _checks.require_map("query", query)
    *_, key_positions = _checks.require_map("key", key)
    _checks.require_paired_maps("query", query, "key", key)
    rows = (batch, positions)
    if index is None:
        grids_differ = len(query.shape) == len(key.shape) == 4 and query.shape[2:] != key.shape[2:]
        if grids_differ or positions != key_positions:
            raise ValueError(
                f"key: got shape {_checks.shape_of(key)} beside a query of {_checks.shape_of(query)}, "
                "expected the same grid, since correspondence is None"
            )
    else:
        if len(index.shape) == 2 and index.shape[1] != positions:
            raise ValueError(
                f"{index_name}: got shape {_checks.shape_of(index)}, expected {rows}, one for each position of query; "
                "give matching and head the same grid_size"
            )
        _checks.require_index(index_name, index, rows, "query", query)
    if grids is not None and len(query.shape) == len(key.shape) == 4:
        expected = (query.shape[2:], key.shape[2:])
        if grids != expected:
            (h, w), (i, j) = grids
            raise ValueError(
                f"correspondence: got a match from a {h} x {w} grid into {i} x {j}, expected {tuple(expected[0])} and "
                f"{tuple(expected[1])}, the grids of query and key; give matching and head the same grid_size"
            )
    if valid is not None:
        _checks.require_mask_like("correspondence.valid", valid, rows, "query", query)
    if weight is not None:
        if weight.dtype != torch.bool:
            _checks.require_float_dtype("weight", weight)
        _checks.require_shape("weight", weight, rows)
        _checks.require_same_device("weight", weight, "query", query)


def row_weight(weight: Tensor | None, valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`weight` with invalid rows at 0, in the dtype of the loss; None if every row counts alike."""
    if weight is None:
        return None if valid is None else valid.to(dtype)
    weight = weight.to(dtype)
    return weight if valid is None else weight.masked_fill(~valid, 0.0)


def reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
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
