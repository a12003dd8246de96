"""Feature matching one tile of scores at a time, in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ops._numerics import accumulation_dtype, norm
from densecl_ops._parallel import for_blocks
from densecl_ops._processor import by_onednn, matmul
from densecl_ops.correspondence import at_once

TILE_SCORES = 2**24  # 64 MiB: few enough launches, still small beside the features
# On a CPU a thread takes some images at a time: their features, 4 MiB in float32, and a strip of scores stay in a
# cache between the squares, the product, the scaling and the argmax. Half of it takes a quarter longer.
TILE_SCORES_CPU, TILE_FEATURES = 2**19, 2**20


def match(query: Tensor, key: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in eager.py.

    The raw product is scaled by 1 / |key| in place, so no normalised copy of a map is made. Tiles run over images first
    and over query positions when one image alone is too large; a tile always sees every key position, so only the other
    direction of a mutual search has anything to merge.
    """
    if at_once.serves(query, key, mutual):
        return at_once.match(query, key)
    images, channels, queries = query.shape
    keys, on_cpu = key.shape[2], query.device.type == "cpu"
    features = channels * (queries + keys)
    dtype = accumulation_dtype(query, key)
    budget = TILE_SCORES_CPU if on_cpu else TILE_SCORES

    index = torch.empty(images, queries, dtype=torch.int64, device=query.device)
    score = torch.empty(images, queries, dtype=dtype, device=query.device)
    query_norm = torch.empty_like(score)  # they change no maximum, so they wait for the end
    agreed = torch.ones_like(index, dtype=torch.bool)

    def compute(part: slice) -> None:
        q, k = query[part].to(dtype), key[part].to(dtype)
        query_norm[part], key_norm = norm(q, 1, keepdim=False), norm(k, 1)
        back: tuple[Tensor, Tensor] | None = None  # the nearest query position of every key position so far
        per_strip = max(1, budget // (len(q) * keys))
        for top in range(0, queries, per_strip):
            strip = slice(top, top + per_strip)
            products = _products(q[:, :, strip].mT, k)
            if mutual:
                best, where = (products / query_norm[part, strip, None]).max(dim=1)
                back = _better(back, best, where + top)
            torch.max(products.div_(key_norm), 2, out=(score[part, strip], index[part, strip]))
        if back is not None:
            here = torch.arange(queries, device=index.device)
            agreed[part] = back[1].gather(1, index[part]) == here

    per_tile = max(1, budget // (queries * keys))
    if on_cpu:
        for_blocks(compute, images, min(per_tile, max(1, TILE_FEATURES // features)), max(1, at_once.SMALL // features))
    else:
        for first in range(0, images, per_tile):
            compute(slice(first, first + per_tile))
    return index, score.div_(query_norm).float(), agreed


def _better(before: tuple[Tensor, Tensor] | None, score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    if before is None:
        return score, index
    better = score > before[0]  # strictly: the lowest index keeps a tie
    better |= score.isnan() & ~before[0].isnan()
    return torch.where(better, score, before[0]), torch.where(better, index, before[1])


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """(T, Q, C) and (T, C, P) -> (T, Q, P)."""
    if not by_onednn(rows):
        return torch.bmm(rows, columns)
    return torch.stack([matmul(a, b) for a, b in zip(rows, columns, strict=True)])
