"""Feature matching one tile of scores at a time, in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ops._numerics import accumulation_dtype, inverse_norm

# Scores held at once. 2^20 float32 (4 MiB) stay in the cache between the product, the scaling and the argmax.
TILE_SCORES_CPU = 2**20
TILE_SCORES = 2**24  # 64 MiB: few enough launches, still small beside the features
# Feature values of both maps in a tile on a CPU. The squares, and the float32 copies of half-precision maps, are then
# small enough to be reused (docs/performance.md: half the time for 256 images, a third in bfloat16).
TILE_FEATURES = 2**21


def match(query: Tensor, key: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in Backend.

    The raw product is scaled by 1 / |key| afterwards: C times less to normalise than the maps themselves. Tiles
    run over images first and over query positions when one image alone is too large; a tile always sees every
    key position, so only the other direction of a mutual search has anything to merge.
    """
    images, channels, queries = query.shape
    keys = key.shape[2]
    budget = TILE_SCORES_CPU if query.device.type == "cpu" else TILE_SCORES
    dtype = accumulation_dtype(query, key)

    index = torch.empty(images, queries, dtype=torch.int64, device=query.device)
    score = torch.empty(images, queries, dtype=torch.float32, device=query.device)
    agreed = torch.ones_like(index, dtype=torch.bool)
    per_tile = max(1, budget // (queries * keys))
    if query.device.type == "cpu":
        per_tile = min(per_tile, max(1, TILE_FEATURES // (channels * (queries + keys))))
    for first in range(0, images, per_tile):
        part = slice(first, first + per_tile)
        q, k = query[part].to(dtype), key[part].to(dtype)
        q_inverse, k_inverse = inverse_norm(q, dim=1), inverse_norm(k, dim=1)
        back_score = q.new_full((q.shape[0], keys), float("-inf"))
        back_index = index.new_zeros((q.shape[0], keys))
        per_strip = max(1, budget // (q.shape[0] * keys))
        for top in range(0, queries, per_strip):
            strip = slice(top, top + per_strip)
            products = torch.bmm(q[:, :, strip].transpose(1, 2), k)
            if mutual:
                best, where = (products * q_inverse[:, 0, strip, None]).max(dim=1)
                better = best > back_score  # strictly: the lowest index keeps a tie
                better |= best.isnan() & ~back_score.isnan()
                back_score = torch.where(better, best, back_score)
                back_index = torch.where(better, where + top, back_index)
            best, where = products.mul_(k_inverse).max(dim=2)
            index[part, strip] = where
            score[part, strip] = best.mul_(q_inverse[:, 0, strip]).float()
        if mutual:
            here = torch.arange(queries, device=index.device)
            agreed[part] = back_index.gather(1, index[part]) == here
    return index, score, agreed
