"""Feature matching of a short call on a CPU: all scores at once, in as few operations as there can be.

A small call is bound by their number. A larger one, of channels_last maps, takes 2.8 ms so where blocks of images take
5.1: threads of our own share the cores with torch's, which spin for some 6 ms after their last operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ops._numerics import norm, normalize
from densecl_ops._parallel import SERIAL

SMALL = 2**14  # features and scores
MOST_SCORES = 2**17  # 32 images of 8 x 8 positions


def serves(query: Tensor, key: Tensor, mutual: bool) -> bool:
    """Whether a call is short and plain enough."""
    if mutual or query.device.type != "cpu" or not query.dtype == key.dtype == torch.float32:
        return False
    scores = query.shape[0] * query.shape[2] * key.shape[2]
    rows = query.stride(1) == key.stride(1) == 1  # along other strides a norm takes 4 times as long
    return scores <= (MOST_SCORES if rows else SMALL - query.numel() - key.numel())


def match(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As in eager.py, not mutual."""
    images, _, queries = query.shape
    if query.numel() + key.numel() <= SMALL:
        query, key = normalize(torch.cat([query, key], 2), 1).tensor_split((queries,), 2)
        score, index = torch.bmm(query.mT, key).max(2)
        return index, score, torch.ones_like(index, dtype=torch.bool)
    products = torch.bmm(query.mT, key)
    query_norm, key_norm = norm(query, 1, keepdim=False), norm(key, 1)
    step = max(1, SERIAL // (queries * key.shape[2]))  # the fifth operator stays serial
    for start in range(0, images, step):
        products[start : start + step].div_(key_norm[start : start + step])
    score, index = products.max(2)
    return index, score.div_(query_norm), torch.ones_like(index, dtype=torch.bool)
