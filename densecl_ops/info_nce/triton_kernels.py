"""The Triton kernels of the loss: prepare the rows, attend over the queue, combine its parts, and two more gradients.

Shared vocabulary: N = B * P query rows; row n is position n % P of image n // P. Logits are kept in units of log 2
(queries are scaled by log2(e) / t), so that the exponential is the hardware's exp2. Raw projections come as (B, D, P)
with their three strides, and prepare_kernel alone reads them; the negatives and everything that kernels hand to each
other are contiguous. A pointer that is None stands for something not asked for: code that needs it is not compiled.
Offsets within a tile are 32-bit; only where it starts is 64-bit, which saves a fifth of attend_kernel's start and end.

For the rank, a negative counts 2 where it scores above the positive and 1 where it ties with it; the sum is halved at
the end. Only for that comparison is the positive's key rounded as the rows of the queue are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from densecl_ops._triton_kernels import inverse_norm

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TIE = tl.constexpr(2.0**-18)  # of a cosine: the order of summation changes sums of 512 products by about 1e-6


@triton.jit
def _mask(exists, channel, CHANNELS: tl.constexpr):
    """(len(exists), len(channel)) bool; without the channel test where whole tiles of channels make up D."""
    mask = exists[:, None]
    if CHANNELS // channel.shape[0] * channel.shape[0] != CHANNELS:
        mask = mask & (channel < CHANNELS)[None, :]
    return mask


@triton.jit
def _load_tile(pointer, row, channel, exists, CHANNELS: tl.constexpr):
    """(len(row), len(channel)) of a contiguous matrix of CHANNELS columns, zero where nothing exists."""
    pointers = pointer + row[:, None] * CHANNELS + channel[None, :]
    return tl.load(pointers, mask=_mask(exists, channel, CHANNELS), other=0.0)


@triton.jit
def _load_columns(
    features_ptr, image, position, exists, size, stride_b, stride_d, stride_p,
    IMAGE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D, rows) of a map: in column i the feature at position[i] of image[i]; zero where it does not exist.

    An IMAGE is read as it lies, in whole sectors, and gathered in shared memory. Else a warp reads 64 bytes of an NCHW
    map in one piece, since neighbouring rows lie side by side; in other layouts the compiler sees that channels do.
    """
    if IMAGE:
        HALF: tl.constexpr = BLOCK_D // 2  # of 64 x 64 elements, no store to shared memory is 2 bytes wide (LLVM)
        base, flat = features_ptr + image * stride_b, tl.arange(0, HALF * position.shape[0])
        place = tl.reshape(tl.arange(0, HALF)[:, None] * size + position.to(tl.int32)[None, :], flat.shape)
        low = tl.load(base + flat, mask=flat < min(CHANNELS, HALF) * size, other=0.0)
        high = tl.load(base + HALF * size + flat, mask=flat < (CHANNELS - HALF) * size, other=0.0)
        halves = tl.join(tl.gather(low, place, 0), tl.gather(high, place, 0))
        columns = tl.reshape(tl.trans(halves), [BLOCK_D, position.shape[0]])
    else:
        channel = tl.arange(0, BLOCK_D)
        offset = image * stride_b + position.to(tl.int64) * stride_p
        pointers = features_ptr + offset[None, :] + (channel.to(tl.int64) * stride_d)[:, None]
        columns = tl.load(pointers, mask=tl.trans(_mask(exists, channel, CHANNELS)), other=0.0)
    return columns


@triton.jit
def _add_columns(sums, values):
    """Adds columns of a tile, one after another, to sums that one thread has: a loop adds across threads at its end.

    Of 8 sums, column j goes to sum j % 8, as mma and wgmma lay it out (16: mfma); of 2, to its half's, as tcgen05 does.
    """
    ROWS: tl.constexpr = values.shape[0]
    HALF: tl.constexpr = values.shape[1] // 2
    if values.shape[1] == sums.shape[1]:
        sums += values
    else:
        if sums.shape[1] >= 8:
            one, other = tl.split(tl.permute(tl.reshape(values, [ROWS, 2, HALF]), 0, 2, 1))
        else:
            one, other = tl.split(tl.reshape(values, [ROWS, HALF, 2]))
        sums = _add_columns(_add_columns(sums, one), other)
    return sums


@triton.jit
def _sum(values, IMAGE: tl.constexpr):
    """Over channels. Those of an IMAGE lie in 4 warps, whose sums tl.sum would store with 4-way bank conflicts."""
    if IMAGE:
        warps = tl.sum(tl.reshape(values, [values.shape[0] // 4, 4, values.shape[1]]), 0)
        zero = tl.zeros([values.shape[1], 1], tl.float32)
        total = tl.reshape(_add_columns(zero, tl.trans(warps)), [values.shape[1]])
    else:
        total = tl.sum(values, 0)
    return total


@triton.jit
def _inverse_temperature(scale, scale_ptr):
    """1 / t: a constant, or read from the device where it is learned."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    return scale


@triton.jit
def _operand(values, PRECISION: tl.constexpr):
    """float32 of what a product reads: tensor cores cut the last 13 bits off a tf32 operand, without rounding."""
    values = values.to(tl.float32)
    if PRECISION == "tf32":
        values = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return values


@triton.jit
def prepare_kernel(
    query_ptr,  # (B, D, P) raw
    key_ptr,  # (B, D, P_k) raw
    index_ptr,  # (B, P) int64 or None: position i matches position i
    scale_ptr,  # 0-d or None: 1 / t when learned
    scaled_ptr,  # out (N, D) in the product dtype: unit query times log2(e) / t
    query_rows_ptr,  # out (N, D): raw query; or None
    key_rows_ptr,  # out (N, D): the raw key that it matches, NaN where the index has none; or None
    positive_ptr,  # out (N,) float32: logit of the positive, in units of log 2
    rank_positive_ptr,  # out (N,) float32: the same with the key rounded as a negative is; None: no rank
    scale,  # 1 / t when constant
    rows,  # N
    positions,  # P
    key_positions,  # P_k
    query_stride_b, query_stride_d, query_stride_p,
    key_stride_b, key_stride_d, key_stride_p,
    ROW_DTYPE: tl.constexpr,  # in which the negatives are kept
    PRECISION: tl.constexpr,  # input_precision of the products
    IMAGE: tl.constexpr,  # whether a program takes an image; both maps are then NCHW, of at most BLOCK_N positions
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i: BLOCK_N rows, or image i. They are read once in the user's layout, so that all else is contiguous."""
    tile_row, channel = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    first = tl.program_id(0) * (positions if IMAGE else BLOCK_N)
    row = first + tile_row
    if IMAGE:
        image, position, exists = tl.program_id(0).to(tl.int64), tile_row, tile_row < positions
    else:
        image, position, exists = (row // positions).to(tl.int64), row % positions, row < rows
    query_raw = _load_columns(
        query_ptr, image, position, exists, positions, query_stride_b, query_stride_d, query_stride_p,
        IMAGE, CHANNELS, BLOCK_D,
    )  # fmt: skip
    match = position.to(tl.int64)
    if index_ptr is not None:
        index = tl.load(index_ptr + row, mask=exists, other=0)
        inside = (index >= 0) & (index < key_positions)
        match = tl.where(inside, index, 0)
    key_raw = _load_columns(
        key_ptr, image, match, exists, key_positions, key_stride_b, key_stride_d, key_stride_p,
        IMAGE, CHANNELS, BLOCK_D,
    )  # fmt: skip
    if index_ptr is not None and not IMAGE:
        key_raw = tl.where(inside[None, :], key_raw, float("nan"))

    query, key = query_raw.to(tl.float32), key_raw.to(tl.float32)
    query_inverse, key_inverse = inverse_norm(_sum(query * query, IMAGE)), inverse_norm(_sum(key * key, IMAGE))
    if IMAGE:  # What depends on a sum is moved to the layout of its store; else it would be gathered there once more.
        if index_ptr is not None:
            key_inverse = tl.where(inside, key_inverse, float("nan"))
        query_raw = tl.where((query_inverse == query_inverse)[None, :], query_raw, float("nan"))
        key_raw = tl.where((key_inverse == key_inverse)[None, :], key_raw, float("nan"))
    key *= key_inverse[None, :]
    query *= (query_inverse * (_inverse_temperature(scale, scale_ptr) * LOG2_E))[None, :]
    scaled = query.to(scaled_ptr.dtype.element_ty)
    out = (first.to(tl.int64) + tile_row)[None, :] * CHANNELS + channel[:, None]
    mask = tl.trans(_mask(exists, channel, CHANNELS))
    tl.store(scaled_ptr + out, scaled, mask=mask)
    if query_rows_ptr is not None:
        tl.store(query_rows_ptr + out, query_raw, mask=mask)
        tl.store(key_rows_ptr + out, key_raw, mask=mask)
    tl.store(positive_ptr + row, _sum(query * key, IMAGE), mask=exists)
    if rank_positive_ptr is not None:
        negative = key.to(ROW_DTYPE).to(scaled.dtype)
        positive = _sum(_operand(scaled, PRECISION) * _operand(negative, PRECISION), IMAGE)
        tl.store(rank_positive_ptr + row, positive, mask=exists)


@triton.jit
def attend_kernel(
    scaled_ptr,  # (N, D) as prepare_kernel left it
    rank_positive_ptr,  # (N,) likewise, or None
    scale_ptr,  # 0-d or None: 1 / t when learned; read only for the rank
    negatives_ptr,  # (K, D) in the product dtype
    negatives_descriptor,  # tensor descriptor of the same, for whole tiles; or None
    exclude_ptr,  # (B,) int64 or None
    count_ptr,  # 0-d int64 or None: how many of the K rows exist
    denominator_ptr,  # out (S, N): sum of 2^(logit - shift)
    shift_ptr,  # out (S, N): the shift, the largest logit; None: there is no shift
    numerator_ptr,  # out (S, N, D): sum of 2^(logit - shift) * negative; or None
    above_ptr,  # out (S, N) int32: twice the logits above the positive's, and once those that tie; or None
    scale,  # 1 / t when constant
    rows,  # N
    positions,  # P
    size,  # K
    per_split,  # queue rows per split, a multiple of BLOCK_K
    PRECISION: tl.constexpr,  # input_precision of the products
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SUMS: tl.constexpr,  # of a row, over some of its columns each: see _add_columns
    CHUNK_D: tl.constexpr,  # channels per step of the first product; BLOCK_D keeps the queries in place instead
):  # fmt: skip
    """Program (i, s): BLOCK_N query rows over the s-th part of the queue."""
    tile_row, channel = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * BLOCK_N + tile_row
    row_exists = row < rows
    scaled_ptr += tl.program_id(0).to(tl.int64) * (BLOCK_N * CHANNELS)
    if CHUNK_D == BLOCK_D:
        scaled = _load_tile(scaled_ptr, tile_row, channel, row_exists, CHANNELS)
    if exclude_ptr is not None:
        excluded = tl.load(exclude_ptr + row // positions, mask=row_exists, other=-1)
        excluded = tl.where((excluded >= 0) & (excluded < size), excluded, -1).to(tl.int32)

    denominator = tl.zeros([BLOCK_N, SUMS], tl.float32)
    if shift_ptr is not None:
        shift = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if numerator_ptr is not None:
        numerator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if above_ptr is not None:
        # The difference to the positive's logit in units of 4 ties, plus 1/2, is cut to [0, 1]. A tie may be off 1/2 by
        # 1/16, so each sum is rounded to multiples of 1/2: from 2^22 on float32 has no others, and its bits count them.
        # 2 instructions a logit (FFMA.SAT, FADD); two comparisons take 4.5.
        above = tl.full([BLOCK_N, SUMS], 4194304.0, tl.float32)
        per_tie = 0.25 / (TIE * LOG2_E * _inverse_temperature(scale, scale_ptr))
        offset = 0.5 - per_tie * tl.load(rank_positive_ptr + row, mask=row_exists, other=0.0)

    existing = size
    if count_ptr is not None:
        existing = tl.minimum(tl.load(count_ptr), size).to(tl.int32)
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, existing)
    whole = start + (tl.maximum(stop - start, 0) // BLOCK_K) * BLOCK_K
    # Whole tiles, then what is left: masking every tile would cost two instructions per logit. The second loop runs at
    # most once; pipelined and with its pointers hoisted it would take 254 registers (sm_90, 128 x 128) instead of 186.
    for MASKED in tl.static_range(2):
        for first in tl.range(
            whole if MASKED else start,
            stop if MASKED else whole,
            BLOCK_K,
            num_stages=1 if MASKED else None,
            disable_licm=MASKED == 1,
        ):
            column = first + tl.arange(0, BLOCK_K)
            exists = column < stop if MASKED else tl.full([BLOCK_K], True, tl.int1)
            tile_ptr, tile_column = negatives_ptr + first.to(tl.int64) * CHANNELS, tl.arange(0, BLOCK_K)
            if CHUNK_D == BLOCK_D:  # one load feeds both products
                if MASKED or negatives_descriptor is None:
                    negatives = _load_tile(tile_ptr, tile_column, channel, exists, CHANNELS)
                else:
                    negatives = negatives_descriptor.load([first, 0])
                logits = tl.dot(scaled, tl.trans(negatives), input_precision=PRECISION)
            else:
                logits = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for first_channel in tl.range(0, CHANNELS, CHUNK_D):
                    part = first_channel + tl.arange(0, CHUNK_D)
                    left = _load_tile(scaled_ptr, tile_row, part, row_exists, CHANNELS)
                    right = _load_tile(tile_ptr, tile_column, part, exists, CHANNELS)
                    logits = tl.dot(left, tl.trans(right), logits, input_precision=PRECISION)
                if numerator_ptr is not None:
                    negatives = _load_tile(tile_ptr, tile_column, channel, exists, CHANNELS)
            if MASKED:
                logits = tl.where(exists[None, :], logits, float("-inf"))
            if exclude_ptr is not None:
                # A thread holds the same of every 8 columns. So it compares with constants, which take no registers.
                eights, ones = 8 * tl.arange(0, BLOCK_K // 8), tl.arange(0, 8)
                left_out = eights[None, :, None] == (excluded - first)[:, None, None] - ones[None, None, :]
                logits = tl.where(tl.reshape(left_out, [BLOCK_N, BLOCK_K]), float("-inf"), logits)
            if above_ptr is not None:
                above = _add_columns(above, tl.minimum(tl.maximum(logits * per_tie + offset[:, None], 0.0), 1.0))
            # Without a shift |logit| <= 70 / ln 2 keeps exp2 and its sum in float32.
            if shift_ptr is not None:
                higher = tl.maximum(shift, tl.max(logits, 1))
                finite = tl.where(higher == float("-inf"), 0.0, higher)
                rescale = tl.exp2(shift - finite)
                shift = higher
                logits -= finite[:, None]
                denominator *= rescale[:, None]
                if numerator_ptr is not None:
                    numerator *= rescale[:, None]
            weight = tl.exp2(logits)
            if SUMS >= 8:
                denominator += tl.sum(tl.reshape(weight, [BLOCK_N, BLOCK_K // SUMS, SUMS]), 1)
            else:
                denominator += tl.sum(tl.reshape(weight, [BLOCK_N, 2, BLOCK_K // 2]), 2)
            if numerator_ptr is not None:
                numerator = tl.dot(weight.to(negatives.dtype), negatives, numerator, input_precision=PRECISION)

    out = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0) * BLOCK_N
    tl.store(denominator_ptr + out + tile_row, tl.sum(denominator, 1), mask=row_exists)
    if shift_ptr is not None:
        tl.store(shift_ptr + out + tile_row, shift, mask=row_exists)
    if above_ptr is not None:
        halves = above.to(tl.int32, bitcast=True) - 0x4A800000  # the bits of 2^22
        tl.store(above_ptr + out + tile_row, tl.sum(halves, 1), mask=row_exists)
    if numerator_ptr is not None:
        pointers = numerator_ptr + out * CHANNELS + tile_row[:, None] * CHANNELS + channel[None, :]
        tl.store(pointers, numerator, mask=_mask(row_exists, channel, CHANNELS))


@triton.jit
def combine_kernel(
    scale_ptr,  # 0-d or None: 1 / t when learned
    query_rows_ptr, key_rows_ptr,  # as prepare_kernel left them, or None, as numerator_ptr
    positive_ptr, rank_positive_ptr,  # likewise; no rank_positive_ptr: no rank
    denominator_ptr, shift_ptr, numerator_ptr, above_ptr,  # as attend_kernel left them, or None
    loss_ptr,  # out (N,)
    rank_ptr,  # out (N,) int64; or None, as above_ptr and rank_positive_ptr
    log_sum_exp_ptr,  # out (N,): natural log, over the negatives alone
    pull_ptr,  # out (N,): 1 - p+
    grad_query_ptr,  # out (N, D); or None, as numerator_ptr
    grad_scale_ptr,  # out (N,); or None, as numerator_ptr
    scale, rows,
    size,  # K
    splits,  # S
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i: adds the splits of BLOCK_N rows in a fixed order, then loss and gradient as in blockwise.py."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists = row < rows
    channel = tl.arange(0, BLOCK_D)

    shift = tl.zeros([BLOCK_N], tl.float32)
    if shift_ptr is not None:
        shift = tl.full([BLOCK_N], float("-inf"), tl.float32)
        part = row
        for _ in tl.range(0, splits):
            shift = tl.maximum(shift, tl.load(shift_ptr + part, mask=row_exists, other=0.0))
            part += rows
        shift = tl.where(shift == float("-inf"), 0.0, shift)
    denominator = tl.zeros([BLOCK_N], tl.float32)
    numerator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    above = tl.zeros([BLOCK_N], tl.int64)
    part = row
    for _ in tl.range(0, splits):
        rescale = tl.full([BLOCK_N], 1.0, tl.float32)
        if shift_ptr is not None:
            rescale = tl.exp2(tl.load(shift_ptr + part, mask=row_exists, other=0.0) - shift)
        denominator += tl.load(denominator_ptr + part, mask=row_exists, other=0.0) * rescale
        if above_ptr is not None:
            above += tl.load(above_ptr + part, mask=row_exists, other=0)
        if numerator_ptr is not None:
            numerator += _load_tile(numerator_ptr, part, channel, row_exists, CHANNELS) * rescale[:, None]
        part += rows

    log_sum_exp = (shift + tl.log2(denominator)) * LN_2
    margin = log_sum_exp - tl.load(positive_ptr + row, mask=row_exists, other=0.0) * LN_2
    # softplus and sigmoid of the margin without overflow; log1p with what rounding 1 + x loses given back.
    small = tl.exp(-tl.abs(margin))
    above_one = 1.0 + small
    log1p = tl.log(above_one) + (small - (above_one - 1.0)) / above_one
    loss = tl.where(margin != margin, margin, tl.maximum(margin, 0.0) + log1p)
    pull = tl.where(margin < 0, small, 1.0) / (1.0 + small)
    tl.store(loss_ptr + row, loss, mask=row_exists)
    tl.store(log_sum_exp_ptr + row, log_sum_exp, mask=row_exists)
    tl.store(pull_ptr + row, pull, mask=row_exists)
    if rank_ptr is not None:
        positive = tl.load(rank_positive_ptr + row, mask=row_exists, other=0.0)
        tl.store(rank_ptr + row, tl.where(positive == positive, above // 2, size), mask=row_exists)  # NaN ranks last
    if grad_query_ptr is not None:
        query = _load_tile(query_rows_ptr, row, channel, row_exists, CHANNELS).to(tl.float32)
        key = _load_tile(key_rows_ptr, row, channel, row_exists, CHANNELS).to(tl.float32)
        inverse = inverse_norm(tl.sum(query * query, 1))
        query *= inverse[:, None]
        key *= inverse_norm(tl.sum(key * key, 1))[:, None]
        mean = numerator / tl.where(denominator == 0, 1.0, denominator)[:, None]
        grad = (mean - key) * pull[:, None]
        along = tl.sum(grad * query, 1)
        grad_query = (grad - query * along[:, None]) * (inverse * _inverse_temperature(scale, scale_ptr))[:, None]
        pointers = grad_query_ptr + row[:, None] * CHANNELS + channel[None, :]
        tl.store(pointers, grad_query, mask=_mask(row_exists, channel, CHANNELS))
        tl.store(grad_scale_ptr + row, along, mask=row_exists)


@triton.jit
def grad_negatives_kernel(
    scaled_ptr,  # (N, D) unit rows times log2(e) / t, in the product dtype
    weighted_ptr,  # (N, D) unit rows times their weight, in the product dtype
    negatives_ptr,  # (K, D) in the product dtype
    log_sum_exp_ptr,  # (N,) natural log, finite
    exclude_ptr,  # (B,) int64 or None
    count_ptr,  # 0-d int64 or None
    out_ptr,  # out (S, K, D) float32
    rows, positions, size,
    per_split,  # query rows per split, a multiple of BLOCK_N
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (j, s): BLOCK_K queue rows, each the sum over the s-th part of the query rows that it repels."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_D)
    negatives = _load_tile(negatives_ptr, column, channel, column < size, CHANNELS)

    grad = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    split = tl.program_id(1)
    start = split * per_split
    for first in tl.range(start, tl.minimum(start + per_split, rows), BLOCK_N):
        row = first + tl.arange(0, BLOCK_N).to(tl.int64)
        row_exists = row < rows
        scaled = _load_tile(scaled_ptr, row, channel, row_exists, CHANNELS)
        weighted = _load_tile(weighted_ptr, row, channel, row_exists, CHANNELS)
        shift = tl.load(log_sum_exp_ptr + row, mask=row_exists, other=0.0) * LOG2_E
        logits = tl.dot(negatives, tl.trans(scaled), input_precision=PRECISION)
        probability = tl.exp2(logits - shift[None, :])
        if exclude_ptr is not None:
            excluded = tl.load(exclude_ptr + row // positions, mask=row_exists, other=-1)
            probability = tl.where(column[:, None] == excluded[None, :], 0.0, probability)
        grad = tl.dot(probability.to(weighted.dtype), weighted, grad, input_precision=PRECISION)
    if count_ptr is not None:
        grad = tl.where((column < tl.load(count_ptr))[:, None], grad, 0.0)
    pointers = out_ptr + (split.to(tl.int64) * size + column)[:, None] * CHANNELS + channel[None, :]
    tl.store(pointers, grad, mask=_mask(column < size, channel, CHANNELS))


@triton.jit
def grad_key_kernel(
    rows_ptr,  # (B, P, D) float32: what each query adds to the gradient of the unit key that it matches
    order_ptr,  # (B, P) int64: query positions sorted by the key position they match
    bound_ptr,  # (B, P_k + 1) int64: where each key position's queries start in `order`
    out_ptr,  # out (B, P_k, D) float32
    positions, key_positions,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program b * P_k + j: key position j of image b, the sum over the queries that share it, in a fixed order."""
    target = (tl.program_id(0) % key_positions).to(tl.int64)
    image = (tl.program_id(0) // key_positions).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    bound = bound_ptr + image * (key_positions + 1) + target
    stop = tl.load(bound + 1)
    grad = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(tl.load(bound), stop, BLOCK_P):
        slot = first + tl.arange(0, BLOCK_P)
        position = tl.load(order_ptr + image * positions + slot, mask=slot < stop, other=0)
        grad += tl.sum(_load_tile(rows_ptr, image * positions + position, channel, slot < stop, CHANNELS), 0)
    pointers = out_ptr + (image * key_positions + target) * CHANNELS + channel
    tl.store(pointers, grad, mask=channel < CHANNELS)
