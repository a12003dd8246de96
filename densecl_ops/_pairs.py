"""What the losses over matched positions share: which positions pair, what each row weighs, the reduction."""

import torch
from torch import Tensor

from densecl_ops import _checks, _maps
from densecl_ops._types import Correspondence, Grids

Parts = tuple[Tensor | None, Tensor | None, str, Grids | None]  # index, validity, what to call the index, grids


def parts(match: Correspondence | Tensor | None) -> Parts:
    """Of a `correspondence` as the user gave it."""
    if match is None or isinstance(match, Tensor):
        return match, None, "correspondence", None
    index, valid = getattr(match, "index", None), getattr(match, "valid", None)
    if not isinstance(index, Tensor) or not isinstance(valid, Tensor):
        if isinstance(match, Correspondence):
            _checks.require_tensor("correspondence.index", index)
            _checks.require_tensor("correspondence.valid", valid)
        raise TypeError(
            f"correspondence: got {type(match).__name__}, expected a Correspondence, an integer tensor or None"
        )
    known = not torch.compiler.is_dynamo_compiling()  # to which a tuple is its items
    return index, valid, "correspondence.index", getattr(match, "grids", None) if known else None


def require_pairs(query: Tensor, key: Tensor, weight: Tensor | None, match: Parts) -> None:
    """Two maps of the same images, and what belongs to the query positions: shapes, dtypes and devices, no values."""
    index, valid, index_name, grids = match
    batch, _, positions = _maps.require_map("query", query)
    *_, key_positions = _maps.require_map("key", key)
    _maps.require_paired_maps("query", query, "key", key)
    rows, both = (batch, positions), (tuple(query.shape[2:]), tuple(key.shape[2:]))
    are_maps = query.ndim == key.ndim == 4
    if index is None:
        if positions != key_positions or (are_maps and both[0] != both[1]):
            raise ValueError(
                f"key: got shape {_checks.shape_of(key)} beside a query of {_checks.shape_of(query)}, "
                "expected the same grid, since correspondence is None"
            )
    else:
        _checks.require_tensor(index_name, index)
        if index.ndim == 2 and index.shape[1] != positions:
            raise ValueError(
                f"{index_name}: got shape {_checks.shape_of(index)}, expected {rows}, one for each position of query; "
                + _likely_cause(query, swapped=index.shape[1] == key_positions)
            )
        _checks.require_index(index_name, index, rows, "query", query)
    if grids is not None and are_maps and grids != both:
        (h, w), (i, j) = grids
        raise ValueError(
            f"correspondence: got a match from a {h} x {w} grid into {i} x {j}, expected {both[0]} and {both[1]}, "
            "the grids of query and key; " + _likely_cause(query, swapped=grids == both[::-1])
        )
    if valid is not None:
        _checks.require_mask("correspondence.valid", valid, rows, "query", query)
    if weight is not None:
        _checks.require_weight("weight", weight, rows, "query", query)


def _likely_cause(query: Tensor, swapped: bool) -> str:
    if query.ndim == 2:
        return "an image loss, of (B, D) vectors, takes no correspondence"
    if swapped:
        return "it looks like a match from key to query: give the matching the map of the query first"
    if query.ndim == 3:
        return "give matching and loss (B, C, P); of (B, P, C) tokens that is .transpose(1, 2)"
    return "give matching and head the same grid_size"


def reduce(loss: Tensor, weight: Tensor | None, valid: Tensor | None, reduction: str) -> Tensor:
    """Rows that are invalid or weigh 0 are left out, whatever they hold."""
    if weight is None:
        weight = None if valid is None else valid.to(loss.dtype)
    else:
        weight = weight.to(loss.dtype)
        weight = weight if valid is None else weight.masked_fill(~valid, 0.0)
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
