"""Feature matching as the textbook writes it: all B x P_q x P_k scores. It defines what the other backends compute."""

import torch
from einops import einsum
from torch import Tensor

from densecl_ops._numerics import accumulation_dtype, normalize


def match(query: Tensor, key: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of (B, C, P_q) and (B, C, P_k) features: index (B, P_q) int64, score float32 and agreed bool of that shape.

    A position agrees if its match's own nearest query position is this one; all do where mutual is False. No input asks
    for a gradient, and autocast is off.
    """
    dtype = accumulation_dtype(query, key)
    similarity = einsum(normalize(query.to(dtype), 1), normalize(key.to(dtype), 1), "b c i, b c j -> b i j")
    score, index = similarity.max(dim=2)  # torch's max takes the lowest index of a tie
    agreed = torch.ones_like(index, dtype=torch.bool)
    if mutual:
        here = torch.arange(index.shape[1], device=index.device)
        agreed = similarity.argmax(dim=1).gather(1, index) == here
    return index, score.float(), agreed
