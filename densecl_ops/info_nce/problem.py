"""The normal form in which the loss reaches a backend, what a backend gives back, and the steps they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from densecl_ops._numerics import inverse_norm


class Problem(NamedTuple):
    """One dense InfoNCE problem: B images, P_q query and P_k key positions, D channels, K negatives.

    Attributes:
        query: (B, D, P_q) raw projections, any strides.
        key: (B, D, P_k) raw projections, any strides.
        negatives: (K, D) rows, used as they are.
        inverse_temperature: 1 / t, a number or a 0-d tensor (learned, hence unknown to the host).
        match_index: (B, P_q) int64 positions in the key grid, or None where position i matches position i.
        exclude: (B,) int64 row of `negatives` that image b must not see, or None.
        negatives_count: 0-d int64, how many of the first negatives exist; None for all.
        unit_negatives: Whether the negatives are known to be unit rows, as those of a queue are; bounds the logits.
        dtype: float32 or float64, for norms, sums, logits and the loss.
        matmul_dtype: What the products with the negatives run in.
    """

    query: Tensor
    key: Tensor
    negatives: Tensor
    inverse_temperature: float | Tensor
    match_index: Tensor | None
    exclude: Tensor | None
    negatives_count: Tensor | None
    unit_negatives: bool
    dtype: torch.dtype
    matmul_dtype: torch.dtype


class Rows(NamedTuple):
    """What one pass over the negatives yields for every query row.

    Attributes:
        loss: (B, P_q).
        rank: (B, P_q) int64, how many negatives score above the positive; (0,) when not asked for.
        log_sum_exp: (B, P_q) over the negatives' logits alone.
        pull: (B, P_q), 1 - p+, the probability that the negatives take; it scales every gradient.
        grad_query: (B, P_q, D) d loss_i / d query_i (raw); (0,) when not asked for.
        grad_inverse_temperature: (B, P_q) d loss_i / d (1/t); (0,) when not asked for.
    """

    loss: Tensor
    rank: Tensor
    log_sum_exp: Tensor
    pull: Tensor
    grad_query: Tensor
    grad_inverse_temperature: Tensor


def unit_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, D, P) raw -> normalised rows (B, P, D), and the inverse norms (B, P, 1) that made them."""
    rows = rearrange(x, "b d p -> b p d").to(dtype).contiguous()
    inverse = inverse_norm(rows, dim=2)
    return rows * inverse, inverse


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The backward of `unit_rows`: d / d x^ -> d / d x, the part across x^ over |x|."""
    return (grad - unit * (grad * unit).sum(2, keepdim=True)) * inverse


def gather_matches(key_rows: Tensor, index: Tensor | None) -> Tensor:
    """(B, P_k, D) -> (B, P_q, D), for each query position the row of its match."""
    if index is None:
        return key_rows
    return key_rows.gather(1, index[:, :, None].expand(-1, -1, key_rows.shape[2]))


def scatter_matches(query_rows: Tensor, index: Tensor | None, keys: int) -> Tensor:
    """The adjoint of `gather_matches`: (B, P_q, D) -> (B, P_k, D), queries that share a key added up."""
    if index is None:
        return query_rows
    batch, _, channels = query_rows.shape
    target = index[:, :, None].expand(-1, -1, channels)
    return query_rows.new_zeros(batch, keys, channels).scatter_add_(1, target, query_rows)
