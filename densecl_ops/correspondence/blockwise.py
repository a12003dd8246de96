"""Feature matching one tile of scores at a time, in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ops._numerics import NORM_EPS, accumulation_dtype, cast, divisor, norm
from densecl_ops._parallel import for_blocks
from densecl_ops._processor import by_onednn, matmul

TILE_SCORES = 2**24  # 64 MiB: few enough launches, still small beside the features
# On a CPU a thread takes up to PART_FEATURES at a time. Of these, GROUP_FEATURES (2 MiB in float32) stay in its cache
# from cast to product. Fewer than twice LEAST_FEATURES are left to operators on all threads.
TILE_SCORES_CPU, PART_FEATURES, GROUP_FEATURES, LEAST_FEATURES = 2**19, 2**21, 2**19, 2**19
SMALL = 2**18  # features and scores, of which few operators take 0.1 ms
ONEDNN_PRODUCT = 2**23  # multiplications of an image from which on a call for each gains more than it costs


def match(query: Tensor, key: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in eager.py.

    The raw product is scaled by 1 / |key| in place, so no normalised copy of a map is made. Tiles run over images first
    and over query positions when one image alone is too large; a tile always sees every key position, so only the other
    direction of a mutual search has anything to merge.
    """
    images, channels, queries = query.shape
    keys, on_cpu, dtype = key.shape[2], query.is_cpu, accumulation_dtype(query, key)
    features = channels * (queries + keys)
    if on_cpu and not mutual and images * (features + queries * keys) <= SMALL:
        return _match_at_once(cast(query, dtype), cast(key, dtype))
    budget = TILE_SCORES_CPU if on_cpu else TILE_SCORES
    per_tile, per_strip = max(1, budget // (queries * keys)), max(1, budget // keys)

    index = query.new_empty(images, queries, dtype=torch.int64)
    score = query.new_empty(images, queries, dtype=dtype)
    agreed = torch.ones_like(index, dtype=torch.bool)
    query_length, key_length = score.new_empty(images, queries), score.new_empty(images, keys)

    def prepare(part: slice) -> tuple[Tensor, Tensor]:
        q, k = cast(query[part], dtype), cast(key[part], dtype)
        _length(q, query_length[part])
        _length(k, key_length[part])
        return q.mT, k

    def finish(part: slice, strip: slice, products: Tensor, key_norm: Tensor) -> tuple[Tensor, Tensor] | None:
        """The best of each query position; of a mutual search also that of each key position."""
        back = (products / divisor(query_length[part, strip, None], NORM_EPS)).max(1) if mutual else None
        torch.max(products.div_(key_norm), 2, out=(score[part, strip], index[part, strip]))
        return back

    def compute(part: slice) -> None:
        size = part.stop - part.start
        group = max(1, GROUP_FEATURES // features) if on_cpu else size
        back: tuple[Tensor, Tensor] | None = None
        if group < size:
            products = score.new_empty(size, queries, keys)
            for first in range(0, size, group):
                mine = slice(first, min(first + group, size))
                _products(*prepare(slice(part.start + mine.start, part.start + mine.stop)), products[mine])
            back = finish(part, slice(None), products, divisor(key_length[part, None], NORM_EPS))
        else:
            q, k = prepare(part)
            key_norm = divisor(key_length[part, None], NORM_EPS)
            for top in range(0, queries, per_strip):
                strip = slice(top, top + per_strip)
                found = finish(part, strip, _products(q[:, strip], k), key_norm)
                back = found if back is None or found is None else _better(back, found[0], found[1] + top)
        if back is not None:
            here = torch.arange(queries, device=index.device)
            agreed[part] = back[1].gather(1, index[part]) == here

    if on_cpu:
        most = min(per_tile, max(1, PART_FEATURES // features))
        for_blocks(compute, images, most, max(1, LEAST_FEATURES // features))
    else:
        for first in range(0, images, per_tile):
            compute(slice(first, min(first + per_tile, images)))
    return index, cast(score.div_(divisor(query_length, NORM_EPS)), torch.float32), agreed


def _match_at_once(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query_norm, key_norm = norm(query, 1, keepdim=False), norm(key, 1)
    score, index = torch.bmm(query.mT, key).div_(key_norm).max(2)
    return index, cast(score.div_(query_norm), torch.float32), torch.ones_like(index, dtype=torch.bool)


def _better(before: tuple[Tensor, Tensor], score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    better = score > before[0]  # strictly: the lowest index keeps a tie
    better |= score.isnan() & ~before[0].isnan()
    return torch.where(better, score, before[0]), torch.where(better, index, before[1])


def _products(rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, Q, C) and (T, C, P) -> (T, Q, P)."""
    if not by_onednn(rows) or rows[0].numel() * columns.shape[2] < ONEDNN_PRODUCT:
        return torch.bmm(rows, columns, out=out)
    out = rows.new_empty(*rows.shape[:2], columns.shape[2]) if out is None else out
    for a, b, c in zip(rows, columns, out, strict=True):
        c.copy_(matmul(a, b))
    return out


def _length(x: Tensor, out: Tensor) -> None:
    """Of (T, C, P) vectors along C, into (T, P): norm() in few operators, as another thread may wait for each."""
    if x.stride(1) == 1:
        torch.linalg.vector_norm(x, dim=1, out=out)
    else:  # vector_norm takes 4 to 10 times as long
        torch.linalg.vecdot(x, x, dim=1, out=out).sqrt_()
