"""The dense InfoNCE loss one tile of logits at a time, in plain PyTorch, on any device.

Over the negatives alone, loss and gradient are attention with K = V = negatives. With L the log-sum-exp of the
negatives' logits, o their softmax-weighted mean row and s+ the positive's logit,

    loss = softplus(L - s+)        d loss / d q^ = sigmoid(L - s+) * (o - k^) / t

so one pass gives both, logits are held a tile at a time, and a small loss keeps its relative precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ops._numerics import cast, inverse_norm, norm
from densecl_ops._parallel import for_blocks, limited, usable
from densecl_ops._processor import matmul, processor
from densecl_ops.info_nce import at_once
from densecl_ops.info_nce.eager import (
    TIE_WIDTH,
    UNSHIFTED_LIMIT,
    Problem,
    Result,
    as_negatives,
    empty_result,
    gather_matches,
    is_bounded_by_contract,
    scatter_matches,
    through_norm,
    unit_vectors,
)

# On a CPU up to FEW_LOGITS are one tile, which the caller computes alone but for the products: a second thread that
# runs operators, too, would wait for Python's lock. 64 rows by 4,096 negatives take 0.85 ms, and shared out 1.1.
# Beyond, up to FEW_ROWS are one block, whose negatives the threads share, in SPANS parts: other work may hold one of
# two threads. Of more rows a thread takes blocks of up to BLOCK_ROWS, from normalisation to gradient.
FEW_LOGITS, FEW_ROWS, SPANS, BLOCK_ROWS, FEWEST_ROWS = 2**19, 1024, 4, 512, 16
# A tile of logits stays in the cache of a core from one pass to the next. One twice as large saves 2 % of the time, one
# half as large loses 5 %. On a GPU: few launches, still nothing like N x K.
TILE_BYTES, GPU_TILE_BYTES = 2**20, 2**26
LOG2_E = math.log2(math.e)  # exp2() of 2^19 values takes 0.07 ms where exp() takes 0.30 (MKL on Zen 5)
# What the sum of exp2() of a row may be without a shift: above, the mean could overflow, below, terms may vanish. The
# gradient is looked at besides: of rows longer than 1e8 the mean overflows before.
LEAST_SUM, MOST_SUM = 1e-24, 1e30


def forward(problem: Problem, want_grad: bool, want_rank: bool) -> Result:
    """As in Backend. Which form serves a call is decided here."""
    if at_once.serves(problem, want_rank):
        return at_once.forward(problem, want_grad)
    batch, _, positions = problem.query.shape
    size, plan = batch * positions, _plan(problem, want_grad, want_rank)
    result = None
    if not problem.query.is_cpu:
        result = _block(plan, slice(0, size), shifted=not is_bounded_by_contract(problem))
    elif size <= FEW_ROWS:
        result = _few_rows(plan, size)
    if result is None:
        return _many_rows(plan, size, shifted=size <= FEW_ROWS)
    return Result._make(None if x is None else x.view(batch, positions, *x.shape[1:]) for x in result)


def _few_rows(plan: _Plan, size: int) -> Result | None:
    """One block of all rows. Sums over parts of the negatives add up, as they need no shift."""
    sums: dict[int, _Sums] = {}
    columns, threads = len(plan.negatives), torch.get_num_threads()

    def product(a: Tensor, b: Tensor) -> Tensor:
        with limited(usable(threads)):
            return matmul(a, b)

    def attend(span: slice) -> None:
        sums[span.start] = _attend(plan, rows, span, _width(plan, size, span.stop - span.start))

    with limited(1):  # a call would wait for the other threads after each of its operators
        rows = _prepare(plan, slice(0, size), shifted=False)
        if size * columns <= FEW_LOGITS:
            return _finish(plan, rows, _attend(plan, rows, slice(0, columns), max(1, columns), product))
    for_blocks(attend, columns, -(-columns // SPANS), max(1, FEW_LOGITS // (SPANS * size)))
    with limited(1):
        return _finish(plan, rows, functools.reduce(_add, (sums[start] for start in sorted(sums))))


def _many_rows(plan: _Plan, size: int, shifted: bool) -> Result:
    """From normalisation to gradient, a block of rows is computed by one thread: with a shift where it must be."""
    result = empty_result(plan.problem, plan.want_grad, plan.want_rank)

    def compute(part: slice) -> None:
        found = _block(plan, part, shifted) or _block(plan, part, shifted=True)
        for whole, piece in zip(result, found or (), strict=True):
            if whole is not None and piece is not None:
                whole.flatten(0, 1)[part] = piece

    for_blocks(compute, size, BLOCK_ROWS, FEWEST_ROWS)
    return result


def grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor) -> Tensor:
    """As in Backend: the same tiles once more, summed over the queries. A thread takes some negatives and all rows."""
    unit, _ = unit_vectors(problem.query, problem.dtype)
    weight = row_weight.reshape(-1, 1)
    left_out = weight == 0  # such a row may hold NaN
    unit = unit.flatten(0, 1).to(problem.matmul_dtype).to(problem.dtype)
    scaled = (unit * problem.inverse_temperature).masked_fill(left_out, 0.0)
    weighted = scaled * weight
    # float32 products, as those of the sum were. With bfloat16 logits a single exp() would be up to 4 % off.
    plan = _plan(problem, want_grad=False, want_rank=True)
    bounded = scaled.device.type == "cpu" and bool(log_sum_exp.abs().max() <= UNSHIFTED_LIMIT)
    base = LOG2_E if bounded else 1.0  # of larger logits the last digits would count
    operand = scaled * base
    shift = base * _finite(log_sum_exp).reshape(-1, 1).masked_fill(left_out, 0.0)
    excluded = None if problem.exclude is None else problem.exclude.repeat_interleave(problem.query.shape[2])
    rows = BLOCK_ROWS if scaled.device.type == "cpu" else len(scaled)
    grad = torch.zeros(problem.negatives.shape, dtype=problem.dtype, device=scaled.device)

    def compute(span: slice) -> None:
        columns = plan.negatives[span].to(problem.matmul_dtype).to(problem.dtype)
        for start in range(0, len(scaled), rows):
            part = slice(start, start + rows)
            logits = matmul(operand[part], columns.t())
            _leave_out(logits, span.start, None if excluded is None else excluded[part], plan)
            logits.sub_(shift[part])
            # Huge logits may exceed that of their sum, by rounding alone, by more than exp() can hold.
            share = logits.exp2_() if bounded else logits.clamp_(max=0.0).exp_()
            grad[span] += matmul(share.t(), weighted[part])
            del logits, share

    width = _width(plan, min(rows, len(scaled)), len(plan.negatives))
    if scaled.device.type == "cpu":
        for_blocks(compute, len(plan.negatives), width, FEWEST_ROWS)
    else:
        for start in range(0, len(plan.negatives), width):
            compute(slice(start, start + width))
    return grad


def grad_key(problem: Problem, row_weight: Tensor) -> Tensor:
    """As in Backend: by d loss_i / d k^ = -(1 - p+) q^ / t, then through the key's norm."""
    unit_query, _ = unit_vectors(problem.query, problem.dtype)
    unit_key, inverse = unit_vectors(problem.key, problem.dtype)
    weight = (row_weight * problem.inverse_temperature)[:, :, None]
    pushed = (unit_query * -weight).masked_fill(weight == 0, 0.0)
    grad = scatter_matches(pushed, problem.matches, problem.key.shape[2])
    return through_norm(grad, unit_key, inverse)


# ---- which form serves a call ---------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What all blocks of a call share."""

    problem: Problem
    want_grad: bool
    want_rank: bool
    negatives: Tensor  # (K', D), those that exist as far as the host can tell
    query: torch.dtype  # to which a unit query is rounded before it is scaled
    logits: torch.dtype  # of the products that give the logits
    mean: torch.dtype  # of those that give the mean row


def _plan(problem: Problem, want_grad: bool, want_rank: bool) -> _Plan:
    negatives, dtype = problem.negatives, problem.matmul_dtype
    exact = want_rank or negatives.requires_grad  # which look at single products, the loss at sums of many
    query = dtype if exact else problem.dtype  # as rows of the queue are rounded, or as little as can be
    if problem.query.is_cpu:
        dtype = _product_dtype(problem)
        if problem.existing is not None:
            negatives = negatives[: int(problem.existing)]
    return _Plan(problem, want_grad, want_rank, negatives, query, problem.dtype if exact else dtype, dtype)


def _product_dtype(problem: Problem) -> torch.dtype:
    """The fastest on this CPU; docs/design-notes.md says what decided."""
    # float32 is exact, and faster where 16-bit products have no instructions, or so few that conversions take longer.
    return torch.bfloat16 if problem.matmul_dtype == torch.bfloat16 and processor().bfloat16 else problem.dtype


# ---- one block of query rows ----------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Of a block of R query rows, in the dtype of the loss."""

    unit: Tensor  # (R, D)
    inverse: Tensor  # (R, 1), the inverse norms
    match: Tensor  # (R, D), raw
    length: Tensor  # (R,), of the matches
    positive: Tensor  # (R,), the positives' logits
    excluded: Tensor | None  # (R,)
    shifted: bool  # exp() relative to the running maximum, where exp2() may overflow or vanish
    scale: float | Tensor  # 1 / t, for exp2() over ln 2
    operand: Tensor  # (R, D), whose products with the negatives are the logits in that unit
    compared: Tensor | None  # (R, 1), the positive as the rank compares it, in that unit


class _Sums(NamedTuple):
    """Over some negatives."""

    total: Tensor  # (R, 1), of the powers of the logits
    mean: Tensor | None  # (R, D), of the negatives weighted by them
    twice_rank: Tensor | None  # (R, 1), of which a tie counts one
    top: Tensor | None  # (R, 1), the maximum that the logits were relative to


def _block(plan: _Plan, part: slice, shifted: bool) -> Result | None:
    rows, columns = _prepare(plan, part, shifted), len(plan.negatives)
    return _finish(plan, rows, _attend(plan, rows, slice(0, columns), _width(plan, len(rows.unit), columns)))


def _prepare(plan: _Plan, part: slice, shifted: bool) -> _Rows:
    problem = plan.problem
    raw, match, excluded = _read(problem, part)
    inverse, length = inverse_norm(raw, 1), norm(match, 1, keepdim=False)
    unit = raw * inverse
    positive = torch.linalg.vecdot(unit, match).div_(length).mul_(problem.inverse_temperature)
    scale = problem.inverse_temperature * (1.0 if shifted else LOG2_E)
    rounded = cast(cast(unit, plan.query), problem.dtype)
    compared = None
    if plan.want_rank:
        row = as_negatives(match / length[:, None], problem).to(problem.dtype)
        compared = (rounded * row).sum(1, keepdim=True) * scale
    operand = cast(rounded * scale, plan.logits)
    return _Rows(unit, inverse, match, length, positive, excluded, shifted, scale, operand, compared)


def _attend(
    plan: _Plan, rows: _Rows, span: slice, width: int, product: Callable[[Tensor, Tensor], Tensor] = matmul
) -> _Sums:
    """A block of rows over some of the negatives, in tiles of `width`."""
    problem, operand, compared = plan.problem, rows.operand, rows.compared
    dtype, size = problem.dtype, len(rows.unit)
    total = mean = twice_rank = None
    top = rows.unit.new_full((size, 1), float("-inf")) if rows.shifted else None
    flags = rows.unit.new_empty(0 if compared is None else size * min(width, span.stop - span.start))
    for start in range(span.start, span.stop, width):
        tile = cast(plan.negatives[start : min(start + width, span.stop)], problem.matmul_dtype)
        logits = cast(product(operand, cast(tile, plan.logits).t()), dtype)
        _leave_out(logits, start, rows.excluded, plan)
        if compared is not None:  # a tie is in the second sum alone, so it counts half
            tie = TIE_WIDTH[dtype] * rows.scale
            above = flags[: logits.numel()].view_as(logits)  # of floats: bools take 5 times as long to add
            count = torch.gt(logits, compared + tie, out=above).sum(1, keepdim=True).long()
            count += torch.ge(logits, compared - tie, out=above).sum(1, keepdim=True).long()
            twice_rank = count if twice_rank is None else twice_rank.add_(count)
        if top is not None:  # rescale what is there to the new maximum
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            shift = _finite(higher)
            rescale = (top - shift).exp_()
            total = None if total is None else total.mul_(rescale)
            mean = None if mean is None else mean.mul_(rescale)
            logits.sub_(shift)
            top = higher
        part_total = (logits.exp_() if rows.shifted else logits.exp2_()).sum(1, keepdim=True)
        total = part_total if total is None else total.add_(part_total)
        if plan.want_grad:
            part_mean = cast(product(cast(logits, plan.mean), cast(tile, plan.mean)), dtype)
            mean = part_mean if mean is None else mean.add_(part_mean)
        del logits, tile  # the next take their place: fresh memory costs a third of the time in page faults
    if total is None:  # no negative at all: a mean of zero, which pull = 0 ignores
        total, mean = rows.unit.new_zeros(size, 1), torch.zeros_like(rows.unit) if plan.want_grad else None
        twice_rank = None if compared is None else compared.new_zeros(size, 1, dtype=torch.int64)
    return _Sums(total, mean, twice_rank, top)


def _add(one: _Sums, other: _Sums) -> _Sums:
    return _Sums._make(None if x is None or y is None else x.add_(y) for x, y in zip(one, other, strict=True))


def _finish(plan: _Plan, rows: _Rows, sums: _Sums) -> Result | None:
    """The result of R rows, (R,) and (R, D). On a CPU None if exp2() may have overflowed or vanished."""
    total, mean, twice_rank, top = sums
    checked, scale = plan.problem.query.is_cpu and not rows.shifted, plan.problem.inverse_temperature
    if checked:
        least, most = map(float, total.aminmax())
        if not (least >= LEAST_SUM and most <= MOST_SUM):
            return None
    log_sum_exp = torch.xlogy(1.0, total)  # log() is MKL's, which shares out any number of values to all threads
    log_sum_exp = (log_sum_exp if top is None else log_sum_exp.add_(_finite(top))).squeeze(1)
    margin = log_sum_exp - rows.positive
    loss = F.softplus(margin, threshold=40)  # beyond which it is `margin`, to the last bit of float64
    pull, rank, along = margin.sigmoid(), None, None
    if twice_rank is not None and rows.compared is not None:
        twice_rank.masked_fill_(rows.compared.isnan(), 2 * len(plan.problem.negatives))
        rank = twice_rank.squeeze(1) // 2
    if mean is not None:
        mean.div_(total.masked_fill_(total == 0, 1.0)).addcdiv_(rows.match, rows.length[:, None], value=-1)  # o - k^
        along = torch.linalg.vecdot(mean, rows.unit)
        if checked and not math.isfinite(along.sum()):
            return None
        mean.addcmul_(rows.unit, along[:, None], value=-1)  # what lies across q^
        mean.mul_(rows.inverse * (pull * scale)[:, None])
        along *= pull
    return Result(loss, rank, log_sum_exp, pull, grad_query=mean, grad_scale=along)


def _leave_out(logits: Tensor, first: int, excluded: Tensor | None, plan: _Plan) -> None:
    """-inf where a negative, counted from `first` on, does not exist or is excluded."""
    width = logits.shape[1]
    if plan.problem.existing is not None and logits.device.type != "cpu":
        column = torch.arange(first, first + width, device=logits.device)
        logits.masked_fill_(column >= plan.problem.existing, float("-inf"))
    if excluded is not None:  # R gathers and scatters instead of an R x T comparison
        column = excluded[:, None] - first
        inside = (column >= 0) & (column < width)
        column = column.clamp(0, width - 1)
        logits.scatter_(1, column, logits.gather(1, column).masked_fill(inside, float("-inf")))


def _width(plan: _Plan, rows: int, columns: int) -> int:
    """Negatives in a tile. Tiles of even size, but multiples of 64: others take up to a sixth longer."""
    dtype = plan.problem.dtype
    size = rows * columns * (dtype.itemsize + (plan.mean.itemsize if plan.mean != dtype else 0))  # with their copy
    if plan.negatives.dtype != plan.logits:  # beside few rows that of the negatives is the larger one
        size = max(size, columns * plan.negatives.shape[1] * dtype.itemsize // 4)
    tiles = max(1, size // (TILE_BYTES if plan.problem.query.is_cpu else GPU_TILE_BYTES))
    return max(64, -(-columns // tiles // 64) * 64)


def _read(problem: Problem, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of query rows `part` of B P_q: raw vectors and their raw matches (R, D), and the negatives to leave out (R,)."""
    positions = problem.query.shape[2]
    images = slice(part.start // positions, -(-part.stop // positions))
    inside = slice(part.start - images.start * positions, part.stop - images.start * positions)
    excluded = None if problem.exclude is None else problem.exclude[images].repeat_interleave(positions)[inside]
    query, key = (x[images].transpose(1, 2) for x in (problem.query, problem.key))
    matches = None if problem.matches is None else problem.matches[images]
    if len(query) == 1:  # a piece of one image: what is outside of it is not read
        query = query[:, inside]
        key, matches = (key[:, inside], None) if matches is None else (key, matches[:, inside])
        inside = slice(None)
    key = gather_matches(key, matches)
    query, key = (x.to(problem.dtype).reshape(-1, x.shape[2])[inside] for x in (query, key))
    return query, key, excluded


def _finite(x: Tensor) -> Tensor:
    """-inf, the log-sum-exp of nothing, becomes 0 so that subtracting it gives no NaN."""
    return x.masked_fill(x == float("-inf"), 0.0)
