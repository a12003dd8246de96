"""The Triton kernels of feature matching: products and running argmax, and the norms that large grids need first.

Features come as (B, C, P) with their three strides, so NCHW maps, channels_last maps and token sequences are all read
in place. Products accumulate in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS_SQUARED = tl.constexpr(1e-24)  # densecl_ops._numerics.NORM_EPS squared


@triton.jit
def _inverse(squares):
    """1 / norm from a sum of squares, 0 for a feature with no direction, NaN for one whose square overflows."""
    inverse = tl.where(squares > NORM_EPS_SQUARED, 1.0 / tl.sqrt(squares), 0.0)
    return tl.where(squares == float("inf"), float("nan"), inverse)


@triton.jit
def _load(pointers, channel, channels, position_exists, EVEN_C: tl.constexpr):
    """(BLOCK_C, positions) of a map, zero outside it. EVEN_C: tiles of channels make up C."""
    mask = position_exists[None, :]
    if not EVEN_C:
        mask = mask & (channel < channels)[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def inverse_norm_kernel(
    features_ptr,  # (B, C, P)
    out_ptr,  # out (B, P) float32
    positions,  # P
    channels,  # C
    stride_b, stride_c, stride_p,
    EVEN_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program b * tiles + i: 1 / |feature| of the i-th BLOCK_P positions of image b."""
    tiles = tl.cdiv(positions, BLOCK_P)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    position = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    squares = tl.zeros([BLOCK_P], tl.float32)
    for first in tl.range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        offset = channel[:, None].to(tl.int64) * stride_c + position[None, :].to(tl.int64) * stride_p
        pointers = features_ptr + image * stride_b + offset
        part = _load(pointers, channel, channels, position < positions, EVEN_C).to(tl.float32)
        squares += tl.sum(part * part, 0)
    tl.store(out_ptr + image * positions + position, _inverse(squares), mask=position < positions)


@triton.jit
def _best(score, exists, AXIS: tl.constexpr):
    """Largest score along AXIS and its lowest index. NaN counts as the largest, as in torch, and comes as inf."""
    score = tl.where(exists, tl.where(score != score, float("inf"), score), float("-inf"))
    return tl.max(score, AXIS, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _diagonal(square):
    at = tl.arange(0, square.shape[0])
    return tl.sum(tl.where(at[:, None] == at[None, :], square, 0.0), 1)


@triton.jit
def match_kernel(
    query_ptr,  # (B, C, P_q)
    key_ptr,  # (B, C, P_k)
    query_inverse_ptr,  # (B, P_q) float32; None: the whole image is one tile, and the norms are found on the way
    key_inverse_ptr,  # (B, P_k) float32; None likewise
    index_ptr,  # out (B, P_q) int64
    score_ptr,  # out (B, P_q) float32, cosine similarity
    back_ptr,  # out (B, P_k) int64, nearest query of every key; or None, as it must be unless one tile is the image
    query_positions,  # P_q
    key_positions,  # P_k
    channels,  # C
    query_stride_b, query_stride_c, query_stride_p,
    key_stride_b, key_stride_c, key_stride_p,
    PRECISION: tl.constexpr,  # input_precision of the products
    GRAM: tl.constexpr,  # whether the squares are diagonals of products
    EVEN_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program b * tiles + i: the i-th BLOCK_Q query positions of image b against all its key positions."""
    image = tl.program_id(0).to(tl.int64)
    query_position = tl.arange(0, BLOCK_Q)
    if query_inverse_ptr is not None:  # one axis for tiles and images: the other axes end at 65,535 programs
        tiles = tl.cdiv(query_positions, BLOCK_Q)
        image = (tl.program_id(0) // tiles).to(tl.int64)
        query_position += (tl.program_id(0) % tiles) * BLOCK_Q
    query_exists = query_position < query_positions
    query_base = query_ptr + image * query_stride_b + query_position[None, :].to(tl.int64) * query_stride_p

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_Q], tl.int32)
    query_squares = tl.zeros([BLOCK_Q], tl.float32)
    query_gram = tl.zeros([BLOCK_Q, BLOCK_Q], tl.float32)
    for first_key in tl.range(0, key_positions, BLOCK_K):
        key_position = first_key + tl.arange(0, BLOCK_K)
        key_exists = key_position < key_positions
        key_base = key_ptr + image * key_stride_b + key_position[None, :].to(tl.int64) * key_stride_p
        products = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        key_squares = tl.zeros([BLOCK_K], tl.float32)
        key_gram = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
        for first_channel in tl.range(0, channels, BLOCK_C):
            channel = first_channel + tl.arange(0, BLOCK_C)
            step = channel[:, None].to(tl.int64)
            query = _load(query_base + step * query_stride_c, channel, channels, query_exists, EVEN_C)
            key = _load(key_base + step * key_stride_c, channel, channels, key_exists, EVEN_C)
            products = tl.dot(tl.trans(query), key, products, input_precision=PRECISION)
            if key_inverse_ptr is None and GRAM:
                query_gram = tl.dot(tl.trans(query), query, query_gram, input_precision=PRECISION)
                key_gram = tl.dot(tl.trans(key), key, key_gram, input_precision=PRECISION)
            elif key_inverse_ptr is None:
                query_squares += tl.sum(query.to(tl.float32) * query.to(tl.float32), 0)
                key_squares += tl.sum(key.to(tl.float32) * key.to(tl.float32), 0)
        if key_inverse_ptr is None:
            if GRAM:
                query_squares, key_squares = _diagonal(query_gram), _diagonal(key_gram)
            key_inverse = _inverse(key_squares)
            if back_ptr is not None:
                # The key norm cannot change an argmax over queries, nor the query norm one over keys.
                _, back = _best(products * _inverse(query_squares)[:, None], query_exists[:, None], 0)
                tl.store(back_ptr + image * key_positions + key_position, back.to(tl.int64), mask=key_exists)
        else:
            pointers = key_inverse_ptr + image * key_positions + key_position
            key_inverse = tl.load(pointers, mask=key_exists, other=0.0)
        tile_best, tile_index = _best(products * key_inverse[None, :], key_exists[None, :], 1)
        better = tile_best > best  # strictly: the lowest index keeps a tie
        best = tl.where(better, tile_best, best)
        index = tl.where(better, first_key + tile_index, index)

    out = image * query_positions + query_position
    if query_inverse_ptr is None:
        query_inverse = _inverse(query_squares)
    else:
        query_inverse = tl.load(query_inverse_ptr + out, mask=query_exists, other=0.0)
    score = tl.where(best == float("inf"), float("nan"), best * query_inverse)
    tl.store(index_ptr + out, index.to(tl.int64), mask=query_exists)
    tl.store(score_ptr + out, score, mask=query_exists)
