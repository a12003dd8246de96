"""The Triton kernels of the loss: prepare the rows, attend over the queue, combine its parts, and two more gradients.

Shared vocabulary: N = B * P query rows; row n is position n % P of image n // P. Logits are kept in units of log 2
(queries are scaled by log2(e) / t), so that the exponential is the hardware's exp2. Raw projections come as (B, D, P)
with their three strides; everything that kernels hand to each other is contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS_SQUARED = tl.constexpr(1e-24)  # densecl_ops._numerics.NORM_EPS squared
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _row_mask(row_exists, channel, CHANNELS: tl.constexpr):
    """(rows, BLOCK_D) bool; without the channel test where D is a power of two."""
    mask = row_exists[:, None]
    if channel.shape[0] != CHANNELS:
        mask = mask & (channel < CHANNELS)[None, :]
    return mask


@triton.jit
def _load_rows(
    base, offset, channel, channel_stride, row_exists, CHANNELS: tl.constexpr, POSITION_FASTEST: tl.constexpr
):
    """(rows, BLOCK_D) float32 from `base`, one row per element of `offset`; zero outside the tensor.

    In an NCHW map neighbouring rows, not neighbouring channels, lie side by side: such a tile is read transposed, so
    that a warp reads 64 bytes in one piece instead of 32 pieces of 2.
    """
    step = channel.to(tl.int64) * channel_stride
    mask = _row_mask(row_exists, channel, CHANNELS)
    if POSITION_FASTEST:
        rows = tl.trans(tl.load(base + offset[None, :] + step[:, None], mask=tl.trans(mask), other=0.0))
    else:
        rows = tl.load(base + offset[:, None] + step[None, :], mask=mask, other=0.0)
    return rows.to(tl.float32)


@triton.jit
def _inverse_norm(rows):
    """1 / |row|, 0 for a row with no direction, NaN for one whose square overflows."""
    squares = tl.sum(rows * rows, 1)
    inverse = tl.where(squares > NORM_EPS_SQUARED, 1.0 / tl.sqrt(squares), 0.0)
    return tl.where(squares == float("inf"), float("nan"), inverse)


@triton.jit
def _load_unit_rows(
    base, index_ptr, row, rows, positions, channel, stride_b, stride_d, stride_p,
    CHANNELS: tl.constexpr, POSITION_FASTEST: tl.constexpr,
):  # fmt: skip
    """Normalised rows of a raw map and their inverse norms, at position n % P or where `index` sends it."""
    row_exists = row < rows
    position = row % positions
    if index_ptr is not None:
        position = tl.load(index_ptr + row, mask=row_exists, other=0)
    offset = (row // positions) * stride_b + position * stride_p
    found = _load_rows(base, offset, channel, stride_d, row_exists, CHANNELS, POSITION_FASTEST)
    inverse_norm = _inverse_norm(found)
    return found * inverse_norm[:, None], inverse_norm


@triton.jit
def _inverse_temperature(scale, scale_ptr):
    """1 / t: a constant, or read from the device where it is learned."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    return scale


@triton.jit
def prepare_kernel(
    query_ptr,  # (B, D, P) raw
    key_ptr,  # (B, D, P_k) raw
    index_ptr,  # (B, P) int64 or None: position i matches position i
    scale_ptr,  # 0-d or None: 1 / t when learned
    scaled_ptr,  # out (N, D) in the product dtype: unit query times log2(e) / t
    positive_ptr,  # out (N,) float32: logit of the positive, in units of log 2
    scale,  # 1 / t when constant
    rows,  # N
    positions,  # P
    query_stride_b, query_stride_d, query_stride_p,
    key_stride_b, key_stride_d, key_stride_p,
    QUERY_POSITION_FASTEST: tl.constexpr, KEY_POSITION_FASTEST: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i: BLOCK_N rows, read once in the layout the user has, so that every split of the queue reads fast."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    query, _ = _load_unit_rows(
        query_ptr, None, row, rows, positions, channel, query_stride_b, query_stride_d, query_stride_p,
        CHANNELS, QUERY_POSITION_FASTEST,
    )  # fmt: skip
    key, _ = _load_unit_rows(
        key_ptr, index_ptr, row, rows, positions, channel, key_stride_b, key_stride_d, key_stride_p,
        CHANNELS, KEY_POSITION_FASTEST,
    )  # fmt: skip
    query *= _inverse_temperature(scale, scale_ptr) * LOG2_E
    mask = _row_mask(row < rows, channel, CHANNELS)
    tl.store(scaled_ptr + row[:, None] * CHANNELS + channel[None, :], query, mask=mask)
    tl.store(positive_ptr + row, tl.sum(query * key, 1), mask=row < rows)


@triton.jit
def _load_negatives(
    negatives_ptr, column, stop, channel, stride_k, stride_d,
    CHANNELS: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, width of `channel`) of the queue, zero past `stop` and past D."""
    pointers = negatives_ptr + column[:, None].to(tl.int64) * stride_k + channel[None, :] * stride_d
    if MASKED:
        negatives = tl.load(pointers, mask=(column < stop)[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    elif EVEN_D:
        negatives = tl.load(pointers)
    else:
        negatives = tl.load(pointers, mask=(channel < CHANNELS)[None, :], other=0.0)
    return negatives


@triton.jit
def _attend_tile(
    total, top, mean, above, query, query_ptr, row, rows, positive, excluded, negatives_ptr, start, stop, channel,
    stride_k, stride_d,
    CHUNK_D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, RUNNING_MAX: tl.constexpr,
    WANT_MEAN: tl.constexpr, WANT_RANK: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes queue rows [start, start + BLOCK_K) into the running state of a block of query rows."""
    column = start + tl.arange(0, BLOCK_K)
    EVEN_D: tl.constexpr = BLOCK_D == CHANNELS
    EVEN_CHUNK: tl.constexpr = CHANNELS % CHUNK_D == 0
    if CHUNK_D == BLOCK_D:
        negatives = _load_negatives(negatives_ptr, column, stop, channel, stride_k, stride_d, CHANNELS, EVEN_D, MASKED)
        negatives = negatives.to(query.dtype)  # one load feeds both products
        logits = tl.dot(query, tl.trans(negatives), input_precision=PRECISION)
    else:
        logits = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
        for first in tl.range(0, CHANNELS, CHUNK_D):
            part = first + tl.arange(0, CHUNK_D)
            mask = (row < rows)[:, None] & (part < CHANNELS)[None, :]
            left = tl.load(query_ptr + row[:, None] * CHANNELS + part[None, :], mask=mask, other=0.0)
            right = _load_negatives(negatives_ptr, column, stop, part, stride_k, stride_d, CHANNELS, EVEN_CHUNK, MASKED)
            logits = tl.dot(left, tl.trans(right.to(left.dtype)), logits, input_precision=PRECISION)
        if WANT_MEAN:
            negatives = _load_negatives(
                negatives_ptr, column, stop, channel, stride_k, stride_d, CHANNELS, EVEN_D, MASKED
            )
            negatives = negatives.to(query_ptr.dtype.element_ty)
    if MASKED:
        logits = tl.where((column < stop)[None, :], logits, float("-inf"))
    if EXCLUDE:
        logits = tl.where(column[None, :] == excluded[:, None], float("-inf"), logits)
    if WANT_RANK:
        above += tl.sum((logits > positive[:, None]).to(tl.int32), 1)
    if RUNNING_MAX:
        higher = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp2(top - shift)
        logits -= shift[:, None]
        total *= rescale
        if WANT_MEAN:
            mean *= rescale[:, None]
        top = higher
    # Without a running maximum there is no shift at all: |logit| <= 70 / ln 2 keeps exp2 and its sum in float32.
    weight = tl.exp2(logits)
    total += tl.sum(weight, 1)
    if WANT_MEAN:
        mean = tl.dot(weight.to(negatives.dtype), negatives, mean, input_precision=PRECISION)
    return total, top, mean, above


@triton.jit
def attend_kernel(
    query_ptr,  # (N, D) as prepare_kernel left it
    positive_ptr,  # (N,) likewise; read only for the rank
    negatives_ptr,  # (K, D)
    exclude_ptr,  # (B,) int64 or None
    count_ptr,  # 0-d int64 or None: how many of the K rows exist
    total_ptr,  # out (S, N): sum of 2^(logit - shift)
    top_ptr,  # out (S, N): largest logit, the shift; untouched without RUNNING_MAX
    mean_ptr,  # out (S, N, D): sum of 2^(logit - shift) * negative; untouched without WANT_MEAN
    above_ptr,  # out (S, N) int32: logits above the positive's; untouched without WANT_RANK
    rows,  # N
    positions,  # P
    size,  # K
    per_split,  # queue rows per split, a multiple of BLOCK_K
    negatives_stride_k, negatives_stride_d,
    RUNNING_MAX: tl.constexpr, WANT_MEAN: tl.constexpr, WANT_RANK: tl.constexpr,
    PRECISION: tl.constexpr,  # input_precision of the products
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK_D: tl.constexpr,  # channels per step of the first product; BLOCK_D keeps the queries in place instead
):  # fmt: skip
    """Program (i, s): BLOCK_N query rows over the s-th part of the queue."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists = row < rows
    channel = tl.arange(0, BLOCK_D)
    mask = _row_mask(row_exists, channel, CHANNELS)
    query = mask
    if CHUNK_D == BLOCK_D:
        query = tl.load(query_ptr + row[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)

    total = tl.zeros([BLOCK_N], tl.float32)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    above = tl.zeros([BLOCK_N], tl.int32)
    positive = total
    if WANT_RANK:
        positive = tl.load(positive_ptr + row, mask=row_exists, other=0.0)
    excluded = above
    if exclude_ptr is not None:
        excluded = tl.load(exclude_ptr + row // positions, mask=row_exists, other=-1).to(tl.int32)

    existing = size
    if count_ptr is not None:
        existing = tl.minimum(tl.load(count_ptr), size).to(tl.int32)
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, existing)
    whole = start + (tl.maximum(stop - start, 0) // BLOCK_K) * BLOCK_K
    for k in tl.range(start, whole, BLOCK_K):
        total, top, mean, above = _attend_tile(
            total, top, mean, above, query, query_ptr, row, rows, positive, excluded, negatives_ptr, k, stop, channel,
            negatives_stride_k, negatives_stride_d,
            CHUNK_D, CHANNELS, BLOCK_D, BLOCK_K, False, RUNNING_MAX,
            WANT_MEAN, WANT_RANK, exclude_ptr is not None, PRECISION,
        )  # fmt: skip
    if whole < stop:  # peeled: masking every tile would cost two instructions per logit
        total, top, mean, above = _attend_tile(
            total, top, mean, above, query, query_ptr, row, rows, positive, excluded, negatives_ptr, whole, stop,
            channel, negatives_stride_k, negatives_stride_d,
            CHUNK_D, CHANNELS, BLOCK_D, BLOCK_K, True, RUNNING_MAX,
            WANT_MEAN, WANT_RANK, exclude_ptr is not None, PRECISION,
        )  # fmt: skip

    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(total_ptr + out, total, mask=row_exists)
    if RUNNING_MAX:
        tl.store(top_ptr + out, top, mask=row_exists)
    if WANT_RANK:
        tl.store(above_ptr + out, above, mask=row_exists)
    if WANT_MEAN:
        tl.store(mean_ptr + out[:, None] * CHANNELS + channel[None, :], mean, mask=mask)


@triton.jit
def combine_kernel(
    query_ptr,  # (B, D, P) raw
    key_ptr,  # (B, D, P_k) raw
    index_ptr,  # (B, P) int64 or None
    scale_ptr,  # 0-d or None: 1 / t when learned
    positive_ptr,  # as prepare_kernel left it
    total_ptr, top_ptr, mean_ptr, above_ptr,  # as attend_kernel left them
    loss_ptr,  # out (N,)
    rank_ptr,  # out (N,) int64; untouched without WANT_RANK
    log_sum_exp_ptr,  # out (N,): natural log, over the negatives alone
    pull_ptr,  # out (N,): 1 - p+
    grad_query_ptr,  # out (N, D); untouched without WANT_GRAD
    grad_scale_ptr,  # out (N,); untouched without WANT_GRAD
    scale, rows, positions,
    splits,  # S
    query_stride_b, query_stride_d, query_stride_p,
    key_stride_b, key_stride_d, key_stride_p,
    QUERY_POSITION_FASTEST: tl.constexpr, KEY_POSITION_FASTEST: tl.constexpr,
    RUNNING_MAX: tl.constexpr, WANT_GRAD: tl.constexpr, WANT_RANK: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i: adds the splits of BLOCK_N rows in a fixed order, then loss and gradient as in blockwise.py."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists = row < rows
    channel = tl.arange(0, BLOCK_D)
    mask = _row_mask(row_exists, channel, CHANNELS)
    flat = row[:, None] * CHANNELS + channel[None, :]

    top = tl.zeros([BLOCK_N], tl.float32)
    if RUNNING_MAX:
        top = tl.full([BLOCK_N], float("-inf"), tl.float32)
        part = row
        for _ in tl.range(0, splits):
            top = tl.maximum(top, tl.load(top_ptr + part, mask=row_exists, other=0.0))
            part += rows
        top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    above = tl.zeros([BLOCK_N], tl.int64)
    part = row
    for _ in tl.range(0, splits):
        rescale = tl.full([BLOCK_N], 1.0, tl.float32)
        if RUNNING_MAX:
            rescale = tl.exp2(tl.load(top_ptr + part, mask=row_exists, other=0.0) - top)
        total += tl.load(total_ptr + part, mask=row_exists, other=0.0) * rescale
        if WANT_RANK:
            above += tl.load(above_ptr + part, mask=row_exists, other=0)
        if WANT_GRAD:
            pointers = mean_ptr + part[:, None] * CHANNELS + channel[None, :]
            mean += tl.load(pointers, mask=mask, other=0.0) * rescale[:, None]
        part += rows

    log_sum_exp = (top + tl.log2(total)) * LN_2
    margin = log_sum_exp - tl.load(positive_ptr + row, mask=row_exists, other=0.0) * LN_2
    # softplus and sigmoid of the margin without overflow; log1p by its series where 1 + x would round x away.
    small = tl.exp(-tl.abs(margin))
    log1p = tl.where(small < 1e-3, small * (1.0 - small * (0.5 - small * (1.0 / 3.0))), tl.log(1.0 + small))
    loss = tl.where(margin != margin, margin, tl.maximum(margin, 0.0) + log1p)
    pull = tl.where(margin < 0, small, 1.0) / (1.0 + small)
    tl.store(loss_ptr + row, loss, mask=row_exists)
    tl.store(log_sum_exp_ptr + row, log_sum_exp, mask=row_exists)
    tl.store(pull_ptr + row, pull, mask=row_exists)
    if WANT_RANK:
        tl.store(rank_ptr + row, above, mask=row_exists)
    if WANT_GRAD:
        query, inverse_norm = _load_unit_rows(
            query_ptr, None, row, rows, positions, channel, query_stride_b, query_stride_d, query_stride_p,
            CHANNELS, QUERY_POSITION_FASTEST,
        )  # fmt: skip
        key, _ = _load_unit_rows(
            key_ptr, index_ptr, row, rows, positions, channel, key_stride_b, key_stride_d, key_stride_p,
            CHANNELS, KEY_POSITION_FASTEST,
        )  # fmt: skip
        grad = (mean / tl.where(total == 0, 1.0, total)[:, None] - key) * pull[:, None]
        along = tl.sum(grad * query, 1)
        grad_query = (grad - query * along[:, None]) * (inverse_norm * _inverse_temperature(scale, scale_ptr))[:, None]
        tl.store(grad_query_ptr + flat, grad_query, mask=mask)
        tl.store(grad_scale_ptr + row, along, mask=row_exists)


@triton.jit
def grad_negatives_kernel(
    query_ptr,  # (N, D) unit rows times log2(e) / t, in the product dtype
    weighted_ptr,  # (N, D) unit rows times their weight, in the product dtype
    negatives_ptr,  # (K, D)
    log_sum_exp_ptr,  # (N,) natural log, finite
    exclude_ptr,  # (B,) int64 or None
    count_ptr,  # 0-d int64 or None
    out_ptr,  # out (S, K, D) float32
    rows, positions, size,
    per_split,  # query rows per split, a multiple of BLOCK_N
    negatives_stride_k, negatives_stride_d,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (j, s): BLOCK_K queue rows, each the sum over the s-th part of the query rows that it repels."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)
    mask = _row_mask(column < size, channel, CHANNELS)
    pointers = negatives_ptr + column[:, None] * negatives_stride_k + channel[None, :] * negatives_stride_d
    negatives = tl.load(pointers, mask=mask, other=0.0).to(query_ptr.dtype.element_ty)

    grad = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start = split * per_split
    for n in tl.range(start, tl.minimum(start + per_split, rows), BLOCK_N):
        row = n + tl.arange(0, BLOCK_N).to(tl.int64)
        row_exists = row < rows
        row_mask = _row_mask(row_exists, channel, CHANNELS)
        flat = row[:, None] * CHANNELS + channel[None, :]
        query = tl.load(query_ptr + flat, mask=row_mask, other=0.0)
        weighted = tl.load(weighted_ptr + flat, mask=row_mask, other=0.0)
        shift = tl.load(log_sum_exp_ptr + row, mask=row_exists, other=0.0) * LOG2_E
        logits = tl.dot(negatives, tl.trans(query), input_precision=PRECISION)
        probability = tl.exp2(logits - shift[None, :])
        if exclude_ptr is not None:
            excluded = tl.load(exclude_ptr + row // positions, mask=row_exists, other=-1)
            probability = tl.where(column[:, None] == excluded[None, :], 0.0, probability)
        grad = tl.dot(probability.to(weighted.dtype), weighted, grad, input_precision=PRECISION)
    if count_ptr is not None:
        grad = tl.where((column < tl.load(count_ptr))[:, None], grad, 0.0)
    out = (split.to(tl.int64) * size + column)[:, None] * CHANNELS + channel[None, :]
    tl.store(out_ptr + out, grad, mask=mask)


@triton.jit
def grad_key_kernel(
    query_ptr,  # (B, D, P) raw
    key_ptr,  # (B, D, P_k) raw
    weight_ptr,  # (B, P): -(upstream gradient) * (1 - p+) / t
    order_ptr,  # (B, P) int64: query positions sorted by the key position they match
    bound_ptr,  # (B, P_k + 1) int64: where each key position's queries start in `order`
    out_ptr,  # out (B, P_k, D) float32
    positions, key_positions,
    query_stride_b, query_stride_d, query_stride_p,
    key_stride_b, key_stride_d, key_stride_p,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (j, b): key position j of image b, the sum over the queries that share it, in a fixed order."""
    target = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    bound = bound_ptr + image * (key_positions + 1) + target
    start = tl.load(bound)
    stop = tl.load(bound + 1)
    grad = tl.zeros([BLOCK_D], tl.float32)
    for p in tl.range(start, stop, BLOCK_P):
        slot = p + tl.arange(0, BLOCK_P)
        exists = slot < stop
        position = tl.load(order_ptr + image * positions + slot, mask=exists, other=0)
        offset = image * query_stride_b + position * query_stride_p
        query = _load_rows(query_ptr, offset, channel, query_stride_d, exists, CHANNELS, False)
        weight = tl.load(weight_ptr + image * positions + position, mask=exists, other=0.0)
        query = query * (_inverse_norm(query) * weight)[:, None]
        grad += tl.sum(tl.where((weight == 0)[:, None], 0.0, query), 0)  # a row left out may hold NaN

    row = tl.full([1], 0, tl.int64)
    offset = image * key_stride_b + target * key_stride_p + row
    key = _load_rows(key_ptr, offset, channel, key_stride_d, row == 0, CHANNELS, False)
    inverse_norm = _inverse_norm(key)[:, None]
    key *= inverse_norm
    grad = (grad[None, :] - key * tl.sum(grad[None, :] * key, 1)[:, None]) * inverse_norm
    pointers = out_ptr + (image * key_positions + target) * CHANNELS + channel[None, :]
    tl.store(pointers, grad, mask=(channel < CHANNELS)[None, :])
