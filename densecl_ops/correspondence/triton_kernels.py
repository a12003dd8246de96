"""The Triton kernels of feature matching: products and running argmax, and the norms that large grids need first.

Features come as (B, C, P) with their three strides, so NCHW maps, channels_last maps and token sequences are all read
in place. Products accumulate in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from densecl_ops._triton_kernels import inverse_norm


@triton.jit
def _tile(
    features_ptr, image, first, positions, stride_b, stride_c, stride_p,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Where a map's tile (BLOCK_C, BLOCK_P) from position `first` on begins, its offsets, and which positions exist.

    Offsets are 32 bits wide, since 64 take twice the registers. Rows of channels begin at a multiple of ALIGN.
    """
    base = features_ptr + image * (stride_b // ALIGN * ALIGN) + first * tl.cast(stride_p, tl.int64)
    position = tl.arange(0, BLOCK_P)[None, :]
    tile = (tl.arange(0, BLOCK_C) * stride_c // ALIGN * ALIGN)[:, None] + position * stride_p
    return base, tile, first + position < (positions + ALIGN - 1) // ALIGN * ALIGN


@triton.jit
def _load(base, tile, first, stride_c, channels, mask, EVEN_C: tl.constexpr):
    """A tile from channel `first` on, zero outside the map. EVEN_C: tiles of channels make up C."""
    mask = mask & (first < channels)  # a tile may be loaded ahead
    if not EVEN_C:
        mask = mask & (first + tl.arange(0, tile.shape[0]) < channels)[:, None]
    return tl.load(base + first * tl.cast(stride_c, tl.int64) + tile, mask=mask, other=0.0)


@triton.jit
def _add_squares(squares, part):
    """Squares of channels that one thread holds; the rest of the sum crosses warps, and comes after the loop."""
    ROWS: tl.constexpr = squares.shape[0]
    part = part.to(tl.float32)
    return squares + tl.sum(tl.reshape(part * part, [part.shape[0] // ROWS, ROWS, part.shape[1]]), 0)


@triton.jit
def inverse_norm_kernel(
    features_ptr,  # (B, C, P)
    out_ptr,  # out (B, P) float32
    positions,  # P
    channels,  # C
    stride_b, stride_c, stride_p,
    ALIGN: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program b * tiles + i: 1 / |feature| of the i-th BLOCK_P positions of image b."""
    tiles = tl.cdiv(positions, BLOCK_P)
    image, first_position = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_P
    base, tile, mask = _tile(
        features_ptr, image, first_position, positions, stride_b, stride_c, stride_p, ALIGN, BLOCK_C, BLOCK_P
    )
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in tl.range(0, channels, BLOCK_C):
        squares = _add_squares(squares, _load(base, tile, first, stride_c, channels, mask, EVEN_C))
    squares, position = tl.sum(squares, 0), first_position + tl.arange(0, BLOCK_P)
    tl.store(out_ptr + image * positions + position, inverse_norm(squares), mask=position < positions)


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
def _sum_phases(products, query_squares, key_squares, shift):
    """Sums over the phases of match_kernel, of which phase i lies shift[i] positions further on."""
    BLOCK: tl.constexpr = query_squares.shape[1]
    place = tl.minimum(tl.arange(0, BLOCK)[None, :] + shift[:, None], BLOCK - 1)
    query_squares = tl.sum(tl.gather(tl.sum(tl.reshape(query_squares, [2, 4, BLOCK]), 0), place, 1), 0)
    key_squares = tl.sum(tl.gather(tl.sum(tl.reshape(key_squares, [2, 4, BLOCK]), 0), place, 1), 0)
    place = ((tl.arange(0, 4) * BLOCK)[:, None] + place)[:, :, None] * BLOCK + place[:, None, :]
    products = tl.gather(tl.reshape(products, [4 * BLOCK * BLOCK]), tl.reshape(place, [4 * BLOCK * BLOCK]), 0)
    return tl.sum(tl.reshape(products, [4, BLOCK, BLOCK]), 0), query_squares, key_squares


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
    ALIGN: tl.constexpr,  # elements; strides and positions are multiples of it, or PHASES is 4
    PHASES: tl.constexpr,  # 4: each of 4 warps takes the channels whose rows lie equally far from a multiple of ALIGN
    PREFETCH: tl.constexpr,  # whether tiles come through registers, one ahead
    TRANSPOSE: tl.constexpr,  # whether `back` has products of its own: for tcgen05 no shuffles, an argmax over axis 1
    EVEN_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program b * tiles + i: the i-th BLOCK_Q query positions of image b against all its key positions."""
    image, first_query = tl.program_id(0).to(tl.int64), 0
    if query_inverse_ptr is not None:  # one axis for tiles and images: the other axes end at 65,535 programs
        tiles = tl.cdiv(query_positions, BLOCK_Q)
        image, first_query = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_Q
    query_position = first_query + tl.arange(0, BLOCK_Q)
    query_exists = query_position < query_positions
    query_base, query_tile, query_mask = _tile(
        query_ptr, image, first_query, query_positions, query_stride_b, query_stride_c, query_stride_p,
        ALIGN, BLOCK_C, BLOCK_Q,
    )  # fmt: skip
    out = image * query_positions + query_position
    query_inverse = tl.zeros([BLOCK_Q], tl.float32)
    if query_inverse_ptr is not None:
        query_inverse = tl.load(query_inverse_ptr + out, mask=query_exists, other=0.0)
    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_Q], tl.int32)
    # One tile is no loop for the compiler, which would hoist what follows the products into registers.
    for first_key in tl.range(0, BLOCK_K if key_inverse_ptr is None else key_positions, BLOCK_K):
        key_position = first_key + tl.arange(0, BLOCK_K)
        key_exists = key_position < key_positions
        key_base, key_tile, key_mask = _tile(
            key_ptr, image, first_key, key_positions, key_stride_b, key_stride_c, key_stride_p, ALIGN, BLOCK_C, BLOCK_K
        )
        if PHASES > 1:  # the same grid: registers for one tile of offsets
            key_tile, key_mask = query_tile, query_mask
        products = tl.zeros([BLOCK_Q, BLOCK_K] if PHASES == 1 else [PHASES, BLOCK_Q, BLOCK_K], tl.float32)
        back_products = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        # Channels of one thread: 4 warps load 8 at a time with PHASES, and otherwise perhaps all.
        query_squares = tl.zeros([BLOCK_Q if GRAM else 8 if PHASES > 1 else BLOCK_C, BLOCK_Q], tl.float32)
        key_squares = tl.zeros([BLOCK_K if GRAM else 8 if PHASES > 1 else BLOCK_C, BLOCK_K], tl.float32)
        if PREFETCH:
            query = _load(query_base, query_tile, 0, query_stride_c, channels, query_mask, EVEN_C)
            key = _load(key_base, key_tile, 0, key_stride_c, channels, key_mask, EVEN_C)
        for first_channel in tl.range(0, channels, BLOCK_C):
            first = first_channel + (BLOCK_C if PREFETCH else 0)
            loaded_query = _load(query_base, query_tile, first, query_stride_c, channels, query_mask, EVEN_C)
            loaded_key = _load(key_base, key_tile, first, key_stride_c, channels, key_mask, EVEN_C)
            if not PREFETCH:
                query, key = loaded_query, loaded_key
            if PHASES == 1:
                products = tl.dot(tl.trans(query), key, products, input_precision=PRECISION)
            else:
                left = tl.permute(tl.reshape(query, [BLOCK_C // PHASES, PHASES, BLOCK_Q]), 1, 2, 0)
                right = tl.permute(tl.reshape(key, [BLOCK_C // PHASES, PHASES, BLOCK_K]), 1, 0, 2)
                products = tl.dot(left, right, products, input_precision=PRECISION)
            if TRANSPOSE:
                back_products = tl.dot(tl.trans(key), query, back_products, input_precision=PRECISION)
            if key_inverse_ptr is None and GRAM:
                query_squares = tl.dot(tl.trans(query), query, query_squares, input_precision=PRECISION)
                key_squares = tl.dot(tl.trans(key), key, key_squares, input_precision=PRECISION)
            elif key_inverse_ptr is None:
                query_squares, key_squares = _add_squares(query_squares, query), _add_squares(key_squares, key)
            if PREFETCH:
                query, key = loaded_query, loaded_key
        if key_inverse_ptr is None:
            if PHASES > 1:
                shift = tl.arange(0, PHASES) * query_stride_c % ALIGN
                products, query_squares, key_squares = _sum_phases(products, query_squares, key_squares, shift)
            elif GRAM:
                query_squares, key_squares = _diagonal(query_squares), _diagonal(key_squares)
            else:
                query_squares, key_squares = tl.sum(query_squares, 0), tl.sum(key_squares, 0)
            query_inverse, key_inverse = inverse_norm(query_squares), inverse_norm(key_squares)
            if back_ptr is not None:
                # The key norm cannot change an argmax over queries, nor the query norm one over keys.
                if TRANSPOSE:
                    _, back = _best(back_products * query_inverse[None, :], query_exists[None, :], 1)
                else:
                    _, back = _best(products * query_inverse[:, None], query_exists[:, None], 0)
                tl.store(back_ptr + image * key_positions + key_position, back.to(tl.int64), mask=key_exists)
        else:
            pointers = key_inverse_ptr + image * key_positions + key_position
            key_inverse = tl.load(pointers, mask=key_exists, other=0.0)
        tile_best, tile_index = _best(products * key_inverse[None, :], key_exists[None, :], 1)
        better = tile_best > best  # strictly: the lowest index keeps a tie
        best = tl.where(better, tile_best, best)
        index = tl.where(better, first_key + tile_index, index)

    score = tl.where(best == float("inf"), float("nan"), best * query_inverse)
    tl.store(index_ptr + out, index.to(tl.int64), mask=query_exists)
    tl.store(score_ptr + out, score, mask=query_exists)
