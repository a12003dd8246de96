"""Feature matching in a fused Triton kernel: plans and launches. The kernels stand in triton_kernels.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from densecl_ops import _triton
from densecl_ops.correspondence import triton_kernels as kernels

ONE_TILE = 64  # positions; 128 x 128 tiles that find the norms on the way spill up to 396 bytes (sm_80)


class Config(NamedTuple):
    """Tile of query positions, key positions and channels, warps per program, tiles in flight."""

    block_q: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int


def match(query: Tensor, key: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As in eager.py."""
    if query.dtype != key.dtype:
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(dtype), key.to(dtype)
    queries, keys = query.shape[2], key.shape[2]
    # Offsets in a tile of up to 256 positions are 32 bits wide.
    query, key = (x if max(x.stride()[1:]) < 2**23 else x.contiguous() for x in (query, key))
    one_tile = max(queries, keys) <= ONE_TILE
    inverse_norms = (None, None) if one_tile else (_inverse_norm(query), _inverse_norm(key))
    index, score, back = _search(query, key, inverse_norms, both_ways=mutual and one_tile)
    if not mutual:
        return index, score, torch.ones_like(index, dtype=torch.bool)
    if back is None:  # the other direction is the same search with the roles exchanged
        back, _, _ = _search(key, query, inverse_norms[::-1], both_ways=False)
    return index, score, back.gather(1, index) == torch.arange(queries, device=index.device)


def choose(architecture: str, dtype: torch.dtype, positions: int, odd: bool = False) -> Config:
    """The tile for a grid of so many positions; up to ONE_TILE it holds a whole image, which saves the norms."""
    family = _triton.family(architecture)
    if positions <= ONE_TILE and dtype == torch.float32:
        return Config(64, 64, 16, 4, 4)
    if positions <= ONE_TILE:
        if odd or family == "mma":  # through registers: cp.async leaves a tile with two uses unswizzled, with conflicts
            return Config(64, 64, 64, 4, 1)
        return Config(64, 64, 32, 4, 4) if family == "mfma" else Config(64, 64, 64, 4, 3)
    if dtype == torch.float32:  # three tf32 products of split operands need three times the registers
        return Config(64, 64, 32, 8, 3)  # with 4 warps 14x14 maps spill up to 564 bytes (sm_120)
    if positions > 128 and family != "mfma":  # 14x14 queries are read once, and keys twice
        return Config(128, 256, 16 if family == "mma" else 32, 8, 3)  # with 32 channels mma spills 224 bytes (sm_80)
    return Config(128, 128, 64, 8, 3)


def alignment(*features: Tensor) -> int:
    """Of how many elements strides and positions are multiples; they load together, 16 bytes at most."""
    if any(x.stride(2) != 1 for x in features):
        return 1  # channels_last: C % 16 == 0 is what the compiler sees itself
    return math.gcd(16 // features[0].element_size(), *(n for x in features for n in (*x.stride()[:2], x.shape[2])))


def odd_rows(query: Tensor, key: Tensor) -> bool:
    """Whether the maps are of 7x7 positions or the like, so that only every fourth channel starts at 8 bytes."""
    positions = query.shape[2]
    rows = all(x.stride()[1:] == (positions, 1) and x.stride(0) % 4 == x.shape[1] % 4 == 0 for x in (query, key))
    return rows and positions == key.shape[2] and positions % 4 == 1 and query.element_size() == 2


def _search(
    query: Tensor, key: Tensor, inverse_norms: tuple[Tensor | None, ...], both_ways: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    images, channels, queries = query.shape
    keys = key.shape[2]
    architecture = _triton.describe(query.device).architecture
    family = _triton.family(architecture)
    odd = inverse_norms[0] is None and family in ("mma", "wgmma") and odd_rows(query, key)
    config = choose(architecture, query.dtype, max(queries, keys), odd)
    index = query.new_empty((images, queries), dtype=torch.int64)
    score = query.new_empty((images, queries), dtype=torch.float32)
    back = query.new_empty((images, keys), dtype=torch.int64) if both_ways else None
    with torch.cuda.device(query.get_device()):
        kernels.match_kernel[(images * triton.cdiv(queries, config.block_q),)](
            query_ptr=query,
            key_ptr=key,
            query_inverse_ptr=inverse_norms[0],
            key_inverse_ptr=inverse_norms[1],
            index_ptr=index,
            score_ptr=score,
            back_ptr=back,
            query_positions=queries,
            key_positions=keys,
            channels=channels,
            **_triton.strides("query", query.stride(), "bcp"),
            **_triton.strides("key", key.stride(), "bcp"),
            PRECISION=_triton.float32_precision(query.dtype, architecture),
            # A second use of a tile, beside a wgmma in flight, makes Triton 3.6 to 3.9 allot one buffer too few (issue
            # 6691 there): the next copy overwrites it. Products are no second use. float32 is split in registers.
            GRAM=family in ("wgmma", "tcgen05") and query.element_size() == 2 and not odd,
            ALIGN=4 if odd else alignment(query, key),
            PHASES=4 if odd else 1,
            PREFETCH=config.num_stages == 1,
            TRANSPOSE=both_ways and family == "tcgen05",
            EVEN_C=channels % config.block_c == 0,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **_triton.OPTIONS,
        )
    return index, score, back


def _inverse_norm(features: Tensor) -> Tensor:
    images, channels, positions = features.shape
    out = features.new_empty((images, positions), dtype=torch.float32)
    with torch.cuda.device(features.get_device()):
        kernels.inverse_norm_kernel[(images * triton.cdiv(positions, 64),)](
            features_ptr=features,
            out_ptr=out,
            positions=positions,
            channels=channels,
            **_triton.strides("", features.stride(), "bcp"),
            ALIGN=alignment(features),
            EVEN_C=channels % 64 == 0,
            BLOCK_P=64,
            BLOCK_C=64,
            num_warps=4,
            **_triton.OPTIONS,
        )
    return out
