"""Feature matching as the textbook writes it. Holds all B x P_q x P_k scores; the specification of its neighbours."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from densecl_ops._numerics import accumulation_dtype, normalize


def match(query: Tensor, key: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest key position by cosine similarity for every query position.

    Args:
        query: (B, C, P_q) features.
        key: (B, C, P_k) features.
        mutual: Whether to compare with the other direction, the nearest query position of every key position.

    Returns:
        index (B, P_q) int64, score (B, P_q) float32, and agreed (B, P_q) bool, True where the matched key
        position's own nearest query position is this one (all True when mutual is False).
    """
    dtype = accumulation_dtype(query, key)
    similarity = einsum(normalize(query.to(dtype), 1), normalize(key.to(dtype), 1), "b c i, b c j -> b i j")
    score, index = similarity.max(dim=2)  # torch's max takes the lowest index of a tie
    agreed = torch.ones_like(index, dtype=torch.bool)
    if mutual:
        here = torch.arange(index.shape[1], device=index.device)
        agreed = similarity.argmax(dim=1).gather(1, index) == here
    return index, score.float(), agreed
