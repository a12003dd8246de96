"""Feature matching one tile of scores at a time, in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from densecl_ops._numerics import accumulation_dtype, inverse_norm, inverse_root

# Scores held at once. 2^20 float32 (4 MiB) stay in the cache between the product, the scaling and the argmax.
TILE_SCORES_CPU = 2**20
TILE_SCORES = 2**24  # 64 MiB: few enough launches, still small beside the features
# Feature values of both maps in a tile on a CPU: their squares, or the float32 copies of half-precision maps, are then
# small enough to be reused. Half of it for the copies, which are there besides. Smaller tiles are a little faster on a
# quiet machine and much slower on a loaded one, whose threads wait for each other at the end of every pass.
TILE_FEATURES = 2**22
# Features and scores that are matched in a dozen operations, by whose number small calls are bound.
SMALL = 2**14


def match(query: Tensor, key: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in Backend.

    The raw product is scaled by 1 / |key| afterwards: C times less to normalise than the maps themselves. Tiles
    run over images first and over query positions when one image alone is too large; a tile always sees every
    key position, so only the other direction of a mutual search has anything to merge.
    """
    images, channels, queries = query.shape
    keys = key.shape[2]
    small = images * (channels * (queries + keys) + queries * keys) <= SMALL
    if small and not mutual and query.device.type == "cpu" and query.dtype == key.dtype == torch.float32:
        return _match_at_once(query, key)
    budget = TILE_SCORES_CPU if query.device.type == "cpu" else TILE_SCORES
    dtype = accumulation_dtype(query, key)

    index = torch.empty(images, queries, dtype=torch.int64, device=query.device)
    score = torch.empty(images, queries, dtype=torch.float32, device=query.device)
    agreed = torch.ones_like(index, dtype=torch.bool)
    per_tile = max(1, budget // (queries * keys))
    if query.device.type == "cpu":
        features = TILE_FEATURES if query.dtype == key.dtype == dtype else TILE_FEATURES // 2
        per_tile = min(per_tile, max(1, features // (channels * (queries + keys))))
        threads = min(per_tile, torch.get_num_threads())  # the product shares images out among them
        per_tile -= per_tile % threads
        even = -(-images // -(-images // per_tile))  # tiles of one size
        per_tile = -(-even // threads) * threads
    for part, (q, k), (q_inverse, k_inverse) in _Tiles(query, key, per_tile, dtype):
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


def _match_at_once(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inverse = inverse_norm(torch.cat([query, key], 2), 1)
    products = torch.bmm(query.transpose(1, 2), key).mul_(inverse[:, :, query.shape[2] :])
    score, index = products.max(2)
    score.mul_(inverse[:, 0, : query.shape[2]])
    return index, score, torch.ones_like(index, dtype=torch.bool)


class _Tiles:
    """Both maps in the accumulation dtype, some images at a time, with their inverse norms.

    The buffers are made once: fresh ones cost more in page faults than the passes that fill them.
    """

    def __init__(self, query: Tensor, key: Tensor, per_tile: int, dtype: torch.dtype) -> None:
        self.maps, self.per_tile = (query, key), per_tile
        self.copies = [None if x.dtype == dtype else torch.empty_like(x[:per_tile], dtype=dtype) for x in self.maps]
        # A norm along contiguous channels needs no squares; along others it takes many times as long as they do.
        tiles = [x[:per_tile] if copy is None else copy for x, copy in zip(self.maps, self.copies, strict=True)]
        sizes = [x.numel() for x in tiles if x.stride(1) != 1]
        self.squares = query.new_empty(max(sizes, default=0), dtype=dtype)

    def __iter__(self) -> Iterator[tuple[slice, list[Tensor], tuple[Tensor, ...]]]:
        """Yields which images, then for both maps features (T, C, P), then inverse norms (T, 1, P)."""
        for first in range(0, len(self.maps[0]), self.per_tile):
            part = slice(first, first + self.per_tile)
            maps = [
                x[part] if copy is None else copy[: len(x[part])].copy_(x[part])
                for x, copy in zip(self.maps, self.copies, strict=True)
            ]
            inverse = inverse_root(torch.cat([self.sum_of_squares(x) for x in maps], 2))
            yield part, maps, inverse.split_with_sizes([x.shape[2] for x in maps], 2)

    def sum_of_squares(self, x: Tensor) -> Tensor:
        if x.stride(1) == 1:
            length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            return length.square()
        return torch.mul(x, x, out=self.squares[: x.numel()].view(x.shape)).sum(1, keepdim=True)
