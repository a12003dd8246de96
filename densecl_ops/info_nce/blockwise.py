"""The dense InfoNCE loss one tile of logits at a time, in plain PyTorch, on any device.

Over the negatives alone, loss and gradient are attention with K = V = negatives. With L the log-sum-exp of the
negatives' logits, o their softmax-weighted mean row and s+ the positive's logit,

    loss = softplus(L - s+)        d loss / d q^ = sigmoid(L - s+) * (o - k^) / t

so one pass gives both, logits are held a tile at a time, and a small loss keeps its relative precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ops._numerics import inverse_norm
from densecl_ops._parallel import SERIAL, for_blocks
from densecl_ops._processor import matmul, processor
from densecl_ops.info_nce import at_once
from densecl_ops.info_nce.eager import (
    TIE_WIDTH,
    UNSHIFTED_LIMIT,
    Problem,
    Result,
    as_negatives,
    gather_matches,
    is_bounded_by_contract,
    scatter_matches,
    through_norm,
    unit_vectors,
)

# On a CPU a thread takes up to BLOCK_ROWS query rows at a time. The logits of a tile, 1 MiB in float32, stay in its
# cache from one pass to the next; a tile twice as large saves 5 % of the time, one half as large loses 5 to 10 %.
BLOCK_ROWS, FEWEST_ROWS, TILE_LOGITS, MOST_COLUMNS = 512, 16, 2**18, 4096
# A call of up to SHORT_LOGITS runs in operators on all threads, four for each SHORT_TILE. Threads of our own would
# share the cores with torch's, which spin for some 6 ms after their last operator.
SHORT_LOGITS, SHORT_TILE, SHORT_SERIAL = 2**23, 2**22, 2**20
LOG2_E = math.log2(math.e)  # exp2() of 2^19 values takes 0.07 ms where exp() takes 0.30 (MKL on Zen 5)
# What the sum of exp2() of a row may be without a shift: above, the mean could overflow, below, terms may vanish. The
# mean is looked at besides: of rows longer than 1e8 it overflows before.
LEAST_SUM, MOST_SUM = 1e-24, 1e30


def forward(problem: Problem, want_grad: bool, want_rank: bool) -> Result:
    """As in Backend. From normalisation to gradient, a block of query rows is computed by one thread."""
    if at_once.serves(problem, want_rank):
        return at_once.forward(problem, want_grad)
    batch, channels, positions = problem.query.shape
    size = batch * positions
    plan = _plan(problem, want_rank)
    scale = problem.inverse_temperature
    shifted = problem.query.device.type != "cpu" and not is_bounded_by_contract(problem)

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return problem.query.new_empty(shape, dtype=dtype)

    loss, log_sum_exp, pull = (empty(size, 1) for _ in range(3))
    rank = empty(size, 1, dtype=torch.int64) if want_rank else None
    grad_query, grad_scale = (empty(size, channels), empty(size, 1)) if want_grad else (None, None)

    def prepare(part: slice) -> _Rows:
        raw, match, excluded = _block(problem, part)
        inverse = inverse_norm(raw, 1)
        unit = raw * inverse
        match = match * inverse_norm(match, 1)
        positive = (unit * match).sum(1, keepdim=True) * scale
        return _Rows(part, unit, inverse, match, positive, excluded)

    def finish(rows: _Rows, seen: _Attention) -> None:
        margin = seen.log_sum_exp - rows.positive
        weight = margin.sigmoid()
        log_sum_exp[rows.part], pull[rows.part] = seen.log_sum_exp, weight
        loss[rows.part] = F.softplus(margin, threshold=40)  # beyond which it is `margin`, to the last bit of float64
        if rank is not None and seen.twice_rank is not None:
            rank[rows.part] = seen.twice_rank // 2
        if grad_query is not None and grad_scale is not None and seen.mean is not None:
            grad = seen.mean.div_(seen.total).sub_(rows.match)  # o - k^, then what lies across q^ of it
            along = (grad * rows.unit).sum(1, keepdim=True)
            grad_query[rows.part] = grad.addcmul_(rows.unit, along, value=-1).mul_(rows.inverse * weight * scale)
            grad_scale[rows.part] = along * weight

    def compute(*parts: slice) -> None:
        blocks = [prepare(part) for part in parts]
        seen = None if shifted else _attend(blocks, want_grad, want_rank, plan, shifted=False)
        seen = _attend(blocks, want_grad, want_rank, plan, shifted=True) if seen is None else seen
        assert seen is not None
        for rows in blocks:
            mine = slice(rows.part.start - parts[0].start, rows.part.stop - parts[0].start)
            finish(rows, _Attention._make(None if x is None else x[mine] for x in seen))

    if plan.short:
        most = min(SERIAL // channels, SHORT_TILE // len(plan.negatives))
        parts = _parts(batch, positions, max(1, most))
        group = max(1, SHORT_TILE // len(plan.negatives) // (parts[0].stop - parts[0].start))
        for first in range(0, len(parts), group):
            compute(*parts[first : first + group])
    elif problem.query.device.type == "cpu":
        for_blocks(compute, size, BLOCK_ROWS, FEWEST_ROWS)
    else:
        compute(slice(0, size))

    return Result(
        loss=loss.view(batch, positions),
        rank=None if rank is None else rank.view(batch, positions),
        log_sum_exp=log_sum_exp.view(batch, positions),
        pull=pull.view(batch, positions),
        grad_query=None if grad_query is None else grad_query.view(batch, positions, channels),
        grad_scale=None if grad_scale is None else grad_scale.view(batch, positions),
    )


def grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor) -> Tensor:
    """As in Backend: the same tiles once more, summed over the queries. A thread takes some negatives and all rows."""
    unit, _ = unit_vectors(problem.query, problem.dtype)
    weight = row_weight.reshape(-1, 1)
    left_out = weight == 0  # such a row may hold NaN
    unit = unit.flatten(0, 1).to(problem.matmul_dtype).to(problem.dtype)
    scaled = (unit * problem.inverse_temperature).masked_fill(left_out, 0.0)
    weighted = scaled * weight
    # float32 products, as those of the sum were. With bfloat16 logits a single exp() would be up to 4 % off.
    plan = _plan(problem, want_rank=True)
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

    width = _columns(min(rows, len(scaled)), scaled.device.type == "cpu")
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
    negatives: Tensor  # (K', D), those that exist as far as the host can tell
    short: bool  # few operators on all threads
    query: torch.dtype  # to which a unit query is rounded before it is scaled
    logits: torch.dtype  # of the products that give the logits
    mean: torch.dtype  # of those that give the mean row


def _plan(problem: Problem, want_rank: bool) -> _Plan:
    negatives, dtype = problem.negatives, problem.matmul_dtype
    exact = want_rank or negatives.requires_grad  # which look at single products, the loss at sums of many
    query = dtype if exact else problem.dtype  # as rows of the queue are rounded, or as little as can be
    if not problem.query.is_cpu:
        return _Plan(problem, negatives, False, query, problem.dtype if exact else dtype, dtype)
    if problem.existing is not None:
        negatives = negatives[: int(problem.existing)]
    short = not want_rank and _is_short(problem, negatives)
    dtype = _product_dtype(problem, short)
    if short:
        negatives = _serial_copy(_serial_copy(negatives, problem.matmul_dtype), dtype)
        problem = problem._replace(matmul_dtype=dtype)
    return _Plan(problem, negatives, short, query, problem.dtype if exact else dtype, dtype)


def _product_dtype(problem: Problem, short: bool) -> torch.dtype:
    """The fastest on this CPU; docs/design-notes.md says what decided."""
    # float32 is exact, and faster where 16-bit products have no instructions, or so few that conversions take longer.
    low = problem.matmul_dtype == torch.bfloat16 and processor().bfloat16 and not short
    return torch.bfloat16 if low else problem.dtype


def _is_short(problem: Problem, negatives: Tensor) -> bool:
    """Whether threads of our own would cost more than they save."""
    batch, channels, positions = problem.query.shape
    copied = negatives.dtype != problem.dtype or problem.matmul_dtype != problem.dtype
    if batch * positions * channels > SHORT_SERIAL or (copied and negatives.numel() > SHORT_SERIAL):
        return False  # one thread takes these, and few negatives leave the others little
    return 0 < batch * positions * len(negatives) <= SHORT_LOGITS


def _parts(batch: int, positions: int, most: int) -> list[slice]:
    """Whole images, or pieces of one, of up to `most` rows."""
    parts = -(-batch // max(1, most // positions))  # of images
    step = -(-batch // parts) * positions
    return [
        slice(start, min(start + most, image + step, batch * positions))
        for image in range(0, batch * positions, step)
        for start in range(image, min(image + step, batch * positions), most)
    ]


def _serial_copy(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` in `dtype`, copied by the calling thread alone: torch's copy would wait for all of them."""
    if rows.dtype == dtype:
        return rows
    rows = rows.resolve_neg()  # torch's copy of a negated float32 view to float16 forgets the sign
    copy, step = torch.empty_like(rows, dtype=dtype), max(1, SERIAL // rows.shape[1])
    for ours, theirs in zip(copy.split(step), rows.split(step), strict=True):  # type: ignore[no-untyped-call]
        ours.copy_(theirs)
    return copy


# ---- one block of query rows ----------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Of a block of R query rows, in the dtype of the loss."""

    part: slice  # of B P_q
    unit: Tensor  # (R, D)
    inverse: Tensor  # (R, 1), the inverse norms
    match: Tensor  # (R, D), unit vectors
    positive: Tensor  # (R, 1), the positives' logits
    excluded: Tensor | None  # (R,)


class _Attention(NamedTuple):
    log_sum_exp: Tensor  # (R, 1)
    total: Tensor  # (R, 1), what `mean` is to be divided by
    mean: Tensor | None  # (R, D), the weighted sum of the negatives
    twice_rank: Tensor | None  # (R, 1), of which a tie counts one


def _attend(blocks: list[_Rows], want_mean: bool, want_rank: bool, plan: _Plan, shifted: bool) -> _Attention | None:
    """The rows of all blocks over all negatives. Without `shifted` None if exp2() may have overflowed or vanished."""
    problem, on_cpu = plan.problem, plan.negatives.device.type == "cpu"
    # Powers of 2 where no logit is so large that its last digits would count.
    scale = problem.inverse_temperature * (1.0 if shifted else LOG2_E)
    units = [rows.unit.to(plan.query).to(problem.dtype) for rows in blocks]
    scaled = units[0].new_empty(sum(map(len, units)), units[0].shape[1])
    for unit, mine in zip(units, scaled.split([len(unit) for unit in units]), strict=True):  # type: ignore[no-untyped-call]
        torch.mul(unit, scale, out=mine)
    excluded = None if problem.exclude is None else torch.cat([cast(Tensor, rows.excluded) for rows in blocks])
    total = scaled.new_zeros(len(scaled), 1)
    mean: Tensor | None = None
    top = torch.full_like(total, float("-inf")) if shifted else None
    twice_rank = positive = None
    if want_rank:
        (rows,), (unit,) = blocks, units
        positive = (unit * as_negatives(rows.match, problem).to(problem.dtype)).sum(1, keepdim=True) * scale
        twice_rank = torch.zeros_like(total, dtype=torch.int64)
    tie = TIE_WIDTH[scaled.dtype] * scale
    operand = scaled.to(plan.logits)
    width = len(plan.negatives) if plan.short else min(_columns(len(scaled), on_cpu), len(plan.negatives))
    spare: dict[torch.dtype, Tensor] = {}

    def room(like: Tensor, dtype: torch.dtype) -> Tensor:
        """For as many logits as there are rows in `like`. Kept, as fresh memory costs page faults."""
        if dtype not in spare:
            spare[dtype] = scaled.new_empty(len(scaled) * width, dtype=dtype)
        return spare[dtype][: len(scaled) * len(like)].view(len(scaled), len(like))

    for start in range(0, len(plan.negatives), max(1, width)):
        columns = plan.negatives[start : start + width].to(problem.matmul_dtype)
        if plan.logits == scaled.dtype:
            logits = matmul(operand, columns.to(plan.logits).t())
        else:
            logits = torch.mm(operand, columns.t(), out=room(columns, plan.logits))
            logits = room(columns, scaled.dtype).copy_(logits)
        _leave_out(logits, start, excluded, plan)
        if twice_rank is not None and positive is not None:  # a tie is in the second sum alone, so it counts half
            above = room(columns, scaled.dtype)  # of floats: bools take 5 times as long to add
            torch.gt(logits, positive + tie, out=above)
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
        total += (logits.exp_() if shifted else logits.exp2_()).sum(1, keepdim=True)
        if want_mean:
            share = logits if plan.mean == scaled.dtype else room(columns, plan.mean).copy_(logits)
            part_mean = matmul(share, columns.to(plan.mean)).to(scaled.dtype)
            mean = part_mean if mean is None else mean.add_(part_mean)
            del share
        del logits  # so that the next tile takes its place: fresh memory costs a third of the time in page faults
    if not shifted and on_cpu:
        least, most = total.nan_to_num(1.0, posinf=float("inf")).aminmax()
        # One sum would be shared out to all threads.
        pieces = () if mean is None else mean.split(max(1, SERIAL // mean.shape[1]))  # type: ignore[no-untyped-call]
        if least < LEAST_SUM or most > MOST_SUM or not math.isfinite(sum(float(piece.sum()) for piece in pieces)):
            return None
    log_sum_exp = torch.xlogy(1.0, total)  # log() is MKL's, which shares out any number of values to all threads
    if top is not None:
        log_sum_exp += _finite(top)
    if twice_rank is not None and positive is not None:
        twice_rank.masked_fill_(positive.isnan(), 2 * len(problem.negatives))
    # No negative at all: a mean of zero, which pull = 0 ignores.
    mean = torch.zeros_like(scaled) if want_mean and mean is None else mean
    return _Attention(log_sum_exp, total.masked_fill(total == 0, 1.0), mean, twice_rank)


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


def _columns(rows: int, on_cpu: bool) -> int:
    """Negatives in a tile."""
    if not on_cpu:
        return max(128, 2**24 // rows)  # 64 MiB of logits: few launches, still nothing like N x K
    return min(MOST_COLUMNS, TILE_LOGITS // rows // 64 * 64)  # other widths take up to a sixth longer


def _block(problem: Problem, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
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
