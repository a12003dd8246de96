"""The dense InfoNCE loss one tile of the queue at a time, in plain PyTorch, on any device.

Over the negatives alone, loss and gradient are attention with K = V = negatives. With L the log-sum-exp of the
negatives' logits, o their softmax-weighted mean row and s+ the positive's logit,

    loss = softplus(L - s+)        d loss / d q^ = sigmoid(L - s+) * (o - k^) / t

so one pass gives both, nothing of size N x K is ever held, and a small loss keeps its relative precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from densecl_ops._numerics import inverse_norm
from densecl_ops.info_nce.problem import (
    TIE_WIDTH,
    UNSHIFTED_LIMIT,
    Problem,
    Result,
    as_negatives,
    gather_matches,
    is_bounded_by_contract,
    rows_of,
    scatter_matches,
    through_norm,
    unit_vectors,
)

# torch's CPU flash-attention operator, whose tiles never leave the cache: faster than the tile loop in float32, and in
# bfloat16 where the processor has matrix units (AMX). docs/design-notes.md says what was tried.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_capabilities = getattr(torch.cpu, "get_capabilities", None)
_HAS_AMX = _capabilities is not None and bool(_capabilities().get("amx_bf16"))
# bfloat16 rows per call of it: it packs them into a buffer of its own, whose page faults cost more than the products
# if that is all of the queue.
_FLASH_ROWS = 4096
# Logits that are held at once, in a handful of operations: 128 KiB, 8 queries by 4,096 negatives.
SMALL = 2**15


def forward(problem: Problem, want_grad: bool, want_rank: bool) -> Result:
    """As in Backend."""
    query, query_inverse = unit_vectors(problem.query, problem.dtype)
    key = rows_of(problem.key, problem.dtype)  # raw: its norms are factors of what follows
    key_inverse = gather_matches(inverse_norm(key, dim=2), problem.matches)
    key = gather_matches(key, problem.matches)
    buffer = query * key  # one for all passes
    positive = (buffer.sum(2, keepdim=True) * (key_inverse * problem.inverse_temperature)).squeeze(2)

    operand, ranked = query, None
    if want_rank:
        operand = query.to(problem.matmul_dtype).to(problem.dtype)
        rounded = as_negatives(key * key_inverse, problem).to(problem.dtype)
        ranked = (torch.mul(operand, rounded, out=buffer).sum(2) * problem.inverse_temperature).view(-1, 1)
    scaled = torch.mul(operand, problem.inverse_temperature, out=buffer)
    seen = _attend(scaled.flatten(0, 1), problem, want_grad, ranked)

    log_sum_exp = seen.log_sum_exp.view_as(positive)
    margin = log_sum_exp - positive
    loss = F.softplus(margin, threshold=40)  # beyond which it is `margin`, to the last bit of float64
    pull = margin.sigmoid()
    rank = loss.new_empty(0, dtype=torch.int64) if seen.rank is None else seen.rank.view_as(positive)
    if seen.mean is None:
        return Result(loss, rank, log_sum_exp, pull, loss.new_empty(0), loss.new_empty(0))
    # o - k^, then what lies across q^ of it, then d loss / d query
    grad = seen.mean.view_as(query).addcmul_(key, key_inverse, value=-1)
    along = torch.mul(grad, query, out=buffer).sum(2, keepdim=True)
    grad.addcmul_(query, along, value=-1).mul_(query_inverse * pull[:, :, None] * problem.inverse_temperature)
    return Result(loss, rank, log_sum_exp, pull, grad, along.squeeze(2) * pull)


def grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor) -> Tensor:
    """As in Backend: the same tiles once more, summed over the queries."""
    query, _ = unit_vectors(problem.query, problem.dtype)
    weight = row_weight.reshape(-1, 1)
    left_out = weight == 0  # such a row may hold NaN
    scaled = (query.flatten(0, 1) * problem.inverse_temperature).masked_fill(left_out, 0.0)
    weighted = scaled * weight
    shift = _finite(log_sum_exp).reshape(-1, 1).masked_fill(left_out, 0.0)
    grad = torch.zeros(problem.negatives.shape, dtype=problem.dtype, device=query.device)
    for tile in _tiles(scaled, problem, _product_dtype(problem)):
        probability = tile.logits.sub_(shift).exp_()
        grad[tile.span] = torch.mm(probability.t().to(tile.negatives.dtype), weighted.to(tile.negatives.dtype))
    return grad


def grad_key(query: Tensor, key: Tensor, index: Tensor | None, row_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As in Backend: by d loss_i / d k^ = -(1 - p+) q^ / t, then through the key's norm."""
    unit_query, _ = unit_vectors(query, dtype)
    unit_key, inverse = unit_vectors(key, dtype)
    weight = row_weight[:, :, None]
    grad = scatter_matches((unit_query * -weight).masked_fill(weight == 0, 0.0), index, key.shape[2])
    return through_norm(grad, unit_key, inverse)


class _Attention(NamedTuple):
    log_sum_exp: Tensor  # (N,)
    mean: Tensor | None  # (N, D), softmax-weighted mean of the negatives
    rank: Tensor | None  # (N,)


class _Tile(NamedTuple):
    span: slice  # rows of the queue
    negatives: Tensor  # (T, D) in the matmul dtype
    logits: Tensor  # (N, T) in the accumulation dtype, -inf where masked; a buffer the next tile reuses
    operand: Tensor  # (N, T) in the matmul dtype, for what becomes of the logits; the same buffer if the dtypes agree


def _attend(scaled: Tensor, problem: Problem, want_mean: bool, positive: Tensor | None) -> _Attention:
    """Log-sum-exp over the negatives of each scaled query row (N, D), with mean and, of `positive` (N, 1), rank."""
    if positive is None and _is_small(scaled, problem):
        return _attend_at_once(scaled, _existing_negatives(problem), want_mean)
    if positive is None and _flash_is_better(problem, want_mean):
        return _flash_attend(scaled, problem, want_mean)

    total = scaled.new_zeros(scaled.shape[0], 1)
    mean = torch.zeros_like(scaled) if want_mean else None
    twice_rank = None if positive is None else total.new_zeros(total.shape, dtype=torch.int64)
    top = None if _is_bounded(problem) else torch.full_like(total, float("-inf"))
    product_dtype = _product_dtype(problem, want_rank=positive is not None)
    tie = TIE_WIDTH[problem.dtype] * problem.inverse_temperature
    for tile in _tiles(scaled, problem, product_dtype, of_the_caller=0 if positive is None else total.element_size()):
        logits = tile.logits
        if twice_rank is not None and positive is not None:  # a tie is in the second sum alone, so it counts half
            above = torch.gt(logits, positive + tie, out=torch.empty_like(logits))  # bools take 5 times as long to add
            twice_rank += above.sum(1, keepdim=True).long()
            twice_rank += torch.ge(logits, positive - tie, out=above).sum(1, keepdim=True).long()
        if top is not None:  # running maximum: rescale what is there to the new shift
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            shift = _finite(higher)
            rescale = (top - shift).exp_()
            total *= rescale
            if mean is not None:
                mean *= rescale
            logits.sub_(shift)
            top = higher
        logits.exp_()
        total += logits.sum(1, keepdim=True)
        if mean is not None:
            if tile.negatives.dtype == mean.dtype:
                mean.addmm_(logits, tile.negatives)
            else:
                mean += torch.mm(tile.operand.copy_(logits), tile.negatives)
    log_sum_exp = total.log() if top is None else _finite(top) + total.log()
    if mean is not None:
        mean /= total.masked_fill(total == 0, 1.0)  # no negative at all: a mean of zero, which pull = 0 ignores
    if twice_rank is None or positive is None:
        return _Attention(log_sum_exp, mean, None)
    return _Attention(log_sum_exp, mean, (twice_rank // 2).masked_fill_(positive.isnan(), problem.negatives.shape[0]))


def _is_small(scaled: Tensor, problem: Problem) -> bool:
    """Whether all logits together are small enough to be bound by the number of operations; knows no `exclude`."""
    return (
        scaled.device.type == "cpu"
        and problem.exclude is None
        and problem.negatives.dtype == problem.matmul_dtype == problem.dtype
        and scaled.shape[0] * problem.negatives.shape[0] <= SMALL
    )


def _attend_at_once(scaled: Tensor, negatives: Tensor, want_mean: bool) -> _Attention:
    logits = torch.mm(scaled, negatives.t())
    if logits.shape[1] == 0:
        return _Attention(logits.logsumexp(1), torch.zeros_like(scaled) if want_mean else None, None)
    log_share = logits.log_softmax(1)  # one pass; logsumexp takes six, and gives the shares in another
    log_sum_exp = logits[:, 0] - log_share[:, 0]
    return _Attention(log_sum_exp, torch.mm(log_share.exp_(), negatives) if want_mean else None, None)


def _tiles(scaled: Tensor, problem: Problem, dtype: torch.dtype, of_the_caller: int = 0) -> Iterator[_Tile]:
    """Cuts over the queue only: cutting the query rows too makes the products slower on a CPU.

    The caller's own buffers take `of_the_caller` bytes for every logit of a tile.
    """
    negatives = _existing_negatives(problem)
    queries, size = scaled.shape[0], negatives.shape[0]
    bytes_per_logit = problem.dtype.itemsize + of_the_caller + (dtype.itemsize if dtype != problem.dtype else 0)
    width = min(max(size, 1), _tile_rows(queries, bytes_per_logit, scaled.device.type))
    excluded = None
    if problem.exclude is not None:
        excluded = repeat(problem.exclude, "b -> (b p)", p=problem.query.shape[2])
    count = problem.existing if scaled.device.type != "cpu" else None  # on a CPU, `negatives` ends there
    scaled = scaled.to(dtype)
    # Buffers made once: a fresh float32 copy per tile costs bfloat16 a sixth of its time in page faults.
    products = scaled.new_empty(queries * width)
    exact = products if dtype == problem.dtype else products.new_empty(products.shape, dtype=problem.dtype)
    for start in range(0, size, width):
        span = slice(start, min(size, start + width))
        tile = negatives[span].to(problem.matmul_dtype).to(dtype)
        operand, logits = (buffer[: queries * tile.shape[0]].view(queries, -1) for buffer in (products, exact))
        torch.mm(scaled, tile.t(), out=operand)
        if dtype != problem.dtype:
            logits.copy_(operand)
        if count is not None:
            column = torch.arange(span.start, span.stop, device=logits.device)
            logits.masked_fill_(column >= count, float("-inf"))
        if excluded is not None:  # N gathers and scatters instead of an N x T comparison
            column = (excluded - start)[:, None]
            inside = (column >= 0) & (column < tile.shape[0])
            column = column.clamp(0, tile.shape[0] - 1)
            logits.scatter_(1, column, logits.gather(1, column).masked_fill(inside, float("-inf")))
        yield _Tile(span, tile, logits, operand)


def _existing_negatives(problem: Problem) -> Tensor:
    """The rows filled so far, where the host can read the count without waiting for a device."""
    if problem.existing is None or problem.query.device.type != "cpu":
        return problem.negatives
    return problem.negatives[: int(problem.existing)]


def _product_dtype(problem: Problem, want_rank: bool = False) -> torch.dtype:
    """float16 products are slower than float32 ones on a CPU, so they only lose there; a rank needs exact products."""
    if want_rank or (problem.matmul_dtype == torch.float16 and problem.query.device.type == "cpu"):
        return problem.dtype
    return problem.matmul_dtype


def _tile_rows(queries: int, bytes_per_logit: int, device_type: str) -> int:
    """Queue rows per tile; docs/design-notes.md says how they were chosen."""
    if device_type != "cpu":
        return max(128, 2**24 // queries)  # 64 MiB of logits: few launches, still nothing like N x K
    rows = max(128, min(4096, 2**23 // (queries * bytes_per_logit)))  # 8 MiB of buffers
    return -(-rows // 64) * 64  # products and exp over 167 or 1,337 columns take a sixth longer than over 192 or 1,344


def _is_bounded(problem: Problem) -> bool:
    """Whether no logit can overflow exp() unshifted; on a CPU, where values cost no waiting, for any negatives."""
    if problem.query.device.type != "cpu":
        return is_bounded_by_contract(problem)
    # In parts: a norm in another dtype than its rows' makes a copy of them all (512 MiB of a bfloat16 million).
    norms = [
        torch.linalg.vector_norm(part, dim=1, dtype=problem.dtype).max()
        for part in torch.split(problem.negatives, 8192)
    ]
    return float(torch.stack(norms).max()) * float(problem.inverse_temperature) <= UNSHIFTED_LIMIT


def _flash_is_better(problem: Problem, want_mean: bool) -> bool:
    """The operator knows no `exclude`, and always computes the mean: in float32 the loop's forward alone is faster."""
    if _FLASH is None or problem.query.device.type != "cpu" or problem.exclude is not None:
        return False
    if problem.matmul_dtype == torch.bfloat16:
        return _HAS_AMX and problem.dtype == torch.float32
    return want_mean and problem.negatives.dtype == problem.matmul_dtype == problem.dtype


def _flash_attend(scaled: Tensor, problem: Problem, want_mean: bool) -> _Attention:
    assert _FLASH is not None
    queries, channels = scaled.shape
    negatives = _existing_negatives(problem)
    log_sum_exp = mean = None
    dtype = problem.matmul_dtype
    # It shares work out by head and block of 256 rows; one head per thread balances: 0.75 of the time of one head.
    # Its result lies in memory as (rows, heads, D): heads that take turns at the rows leave nothing to copy.
    threads = torch.get_num_threads()
    heads = threads if queries % threads == 0 else 1
    operand = scaled.to(dtype).view(1, -1, heads, channels).transpose(1, 2)
    width = _FLASH_ROWS if dtype == torch.bfloat16 else max(1, len(negatives))
    for start in range(0, len(negatives), width):  # no negatives, no call: the operator divides by their number
        rows = negatives[start : start + width].to(dtype).contiguous()  # it reads rows as if they were
        rows = rows.expand(1, heads, -1, -1)
        results = _FLASH(operand, rows, rows, 0.0, False, scale=1.0)
        part_mean, part_sum = (x.transpose(1, 2).reshape(queries, -1) for x in results)
        if log_sum_exp is None:
            log_sum_exp, mean = part_sum, part_mean.to(scaled.dtype) if want_mean else None
            continue
        both = torch.logaddexp(log_sum_exp, part_sum)
        if mean is not None:
            mean.lerp_(part_mean.to(mean.dtype), (part_sum - both).exp_())
        log_sum_exp = both
    if log_sum_exp is None:
        log_sum_exp = scaled.new_full((queries,), float("-inf"))
        mean = torch.zeros_like(scaled) if want_mean else None
    return _Attention(log_sum_exp.view(-1), mean, None)


def _finite(x: Tensor) -> Tensor:
    """-inf, the log-sum-exp of nothing, becomes 0 so that subtracting it gives no NaN."""
    return x.masked_fill(x == float("-inf"), 0.0)
