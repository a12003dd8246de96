"""Feature matching of a few positions on a CPU: all scores at once, in as few operations as there can be.

A small call is bound by their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ops._numerics import normalize

MOST_NUMBERS = 2**14  # features and scores


def serves(query: Tensor, key: Tensor, mutual: bool) -> bool:
    """Whether a call is small and plain enough."""
    images, channels, queries = query.shape
    keys = key.shape[2]
    return (
        not mutual
        and query.device.type == "cpu"
        and query.dtype == key.dtype == torch.float32
        and images * (channels * (queries + keys) + queries * keys) <= MOST_NUMBERS
    )


def match(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As in Backend, not mutual."""
    unit = normalize(torch.cat([query, key], 2), 1)
    query, key = unit.tensor_split((query.shape[2],), 2)
    score, index = torch.bmm(query.mT, key).max(2)
    return index, score, torch.ones_like(index, dtype=torch.bool)
