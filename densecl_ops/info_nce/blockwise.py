"""The dense InfoNCE loss one tile of logits at a time, in plain PyTorch, on any device.

Over the negatives alone, loss and gradient are attention with K = V = negatives. With L the log-sum-exp of the
negatives' logits, o their softmax-weighted mean row and s+ the positive's logit,

    loss = softplus(L - s+)        d loss / d q^ = sigmoid(L - s+) * (o - k^) / t

so one pass gives both, nothing of size N x K is ever held, and a small loss keeps its relative precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ops._numerics import inverse_norm
from densecl_ops._parallel import for_blocks
from densecl_ops._processor import matmul, processor
from densecl_ops.info_nce import at_once
from densecl_ops.info_nce.problem import (
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
# cache from one pass to the next; twice of it saves 5 % of the time, half of it loses 5 to 10 %.
BLOCK_ROWS, FEWEST_ROWS, TILE_LOGITS, MOST_COLUMNS = 512, 16, 2**18, 4096
LOG2_E = math.log2(math.e)  # exp2() of 2^19 values takes 0.07 ms where exp() takes 0.30 (MKL on Zen 5)


def forward(problem: Problem, want_grad: bool, want_rank: bool) -> Result:
    """As in Backend. From normalisation to gradient, a block of query rows is computed by one thread."""
    if at_once.serves(problem, want_rank):
        return at_once.forward(problem, want_grad)
    batch, channels, positions = problem.query.shape
    size = batch * positions
    plan = _plan(problem, want_grad, want_rank)
    scale = problem.inverse_temperature
    factor = scale * plan.unit

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return problem.query.new_empty(shape, dtype=dtype)

    loss, log_sum_exp, pull = (empty(size, 1) for _ in range(3))
    rank = empty(size, 1, dtype=torch.int64) if want_rank else None
    grad_query, grad_scale = (empty(size, channels), empty(size, 1)) if want_grad else (None, None)

    def compute(part: slice) -> None:
        raw, match, excluded = _block(problem, part)
        query_inverse = inverse_norm(raw, 1)
        unit = raw * query_inverse
        del raw
        match = match * inverse_norm(match, 1)
        positive = (unit * match).sum(1, keepdim=True) * scale

        operand, ranked = unit, None
        if want_rank:
            operand = unit.to(problem.matmul_dtype).to(problem.dtype)
            ranked = (operand * as_negatives(match, problem).to(problem.dtype)).sum(1, keepdim=True) * factor
        seen = _attend(operand * factor, excluded, ranked, want_grad, plan)

        margin = seen.log_sum_exp - positive
        strength = margin.sigmoid()
        log_sum_exp[part], pull[part] = seen.log_sum_exp, strength
        loss[part] = F.softplus(margin, threshold=40)  # beyond which it is `margin`, to the last bit of float64
        if rank is not None and seen.rank is not None:
            rank[part] = seen.rank
        if grad_query is not None and grad_scale is not None and seen.mean is not None:
            grad = seen.mean.sub_(match)  # o - k^, then what lies across q^ of it, then d loss / d query
            along = (grad * unit).sum(1, keepdim=True)
            grad_query[part] = grad.addcmul_(unit, along, value=-1).mul_(query_inverse * strength * scale)
            grad_scale[part] = along * strength

    if problem.query.device.type == "cpu":
        for_blocks(compute, size, BLOCK_ROWS, FEWEST_ROWS)
    else:
        compute(slice(0, size))

    none = empty(0)
    return Result(
        loss=loss.view(batch, positions),
        rank=none.long() if rank is None else rank.view(batch, positions),
        log_sum_exp=log_sum_exp.view(batch, positions),
        pull=pull.view(batch, positions),
        grad_query=none if grad_query is None else grad_query.view(batch, positions, channels),
        grad_scale=none.clone() if grad_scale is None else grad_scale.view(batch, positions),
    )


def grad_negatives(problem: Problem, log_sum_exp: Tensor, row_weight: Tensor) -> Tensor:
    """As in Backend: the same tiles once more, summed over the queries. A thread takes some negatives and all rows."""
    unit, _ = unit_vectors(problem.query, problem.dtype)
    weight = row_weight.reshape(-1, 1)
    left_out = weight == 0  # such a row may hold NaN
    unit = unit.flatten(0, 1).to(problem.matmul_dtype).to(problem.dtype)
    scaled = (unit * problem.inverse_temperature).masked_fill(left_out, 0.0)
    weighted = scaled * weight
    # Exact products, as for a rank: exp() of logits that were rounded otherwise than those of the sum is 4 % off.
    plan = _plan(problem, want_grad=True, want_rank=True)
    operand = scaled * plan.unit
    shift = plan.unit * _finite(log_sum_exp).reshape(-1, 1).masked_fill(left_out, 0.0)
    excluded = None if problem.exclude is None else problem.exclude.repeat_interleave(problem.query.shape[2])
    rows = BLOCK_ROWS if scaled.device.type == "cpu" else len(scaled)
    grad = torch.zeros(problem.negatives.shape, dtype=problem.dtype, device=scaled.device)

    def compute(span: slice) -> None:
        columns = plan.negatives[span].to(problem.matmul_dtype).to(problem.dtype)
        for start in range(0, len(scaled), rows):
            part = slice(start, start + rows)
            logits = matmul(operand[part], columns.t())
            _leave_out(logits, span.start, None if excluded is None else excluded[part], plan)
            probability = plan.exp_(logits.sub_(shift[part])).t()
            grad[span] += matmul(probability, weighted[part])
            del logits, probability

    width = _columns(min(rows, len(scaled)), scaled.device.type)
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
    form: str  # "tiles" or "flash"
    logits: torch.dtype  # of the products that give the logits
    mean: torch.dtype  # of those that give the mean row
    bounded: bool  # no logit can overflow exp() unshifted

    @property
    def unit(self) -> float:
        """What logits are multiplied by: in tiles, and where none is so large that its last digits would count."""
        return LOG2_E if self.bounded and self.form == "tiles" else 1.0

    def exp_(self, tile: Tensor) -> Tensor:
        return tile.exp_() if self.unit == 1.0 else tile.exp2_()


def _plan(problem: Problem, want_grad: bool, want_rank: bool) -> _Plan:
    on_cpu = problem.query.device.type == "cpu"
    negatives = problem.negatives
    if on_cpu and problem.existing is not None:
        negatives = negatives[: int(problem.existing)]
    form, dtype = _choose(problem, want_grad, want_rank) if on_cpu else ("tiles", problem.matmul_dtype)
    if form == "flash":
        bounded = True  # it keeps a maximum of its own
    elif on_cpu:
        bounded = _longest(negatives) * float(problem.inverse_temperature) <= UNSHIFTED_LIMIT
    else:
        bounded = is_bounded_by_contract(problem)
    exact = problem.dtype if want_rank else dtype  # a rank compares exact products
    return _Plan(problem, negatives, form, exact, dtype, bounded)


def _choose(problem: Problem, want_grad: bool, want_rank: bool) -> tuple[str, torch.dtype]:
    """The fastest form on this CPU and the dtype of its products; docs/performance.md has the measurements."""
    cpu, dtype = processor(), problem.matmul_dtype
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu.bfloat16):
        dtype = problem.dtype  # exact, and faster where 16-bit products have no instructions
    plain = not want_rank and problem.exclude is None
    flash_can = plain and cpu.flash
    if dtype == torch.bfloat16:
        return ("flash" if flash_can and cpu.amx else "tiles"), dtype
    if dtype == torch.float32 and cpu.onednn:
        return "tiles", dtype
    return ("flash" if flash_can and want_grad else "tiles"), dtype


def _longest(rows: Tensor) -> float:
    """The largest norm, NaN if one is, to the digits of the rows' own dtype: another one would take a copy of them."""
    norms = [rows.new_zeros(())]

    def compute(part: slice) -> None:
        norms.append(torch.linalg.vector_norm(rows[part], dim=1).max())

    for_blocks(compute, len(rows), max(1, len(rows)), 2048)
    return float(torch.stack(norms).max())


# ---- one block of query rows ----------------------------------------------------------------------------------------


class _Attention(NamedTuple):
    log_sum_exp: Tensor  # (R, 1)
    mean: Tensor | None  # (R, D), softmax-weighted mean of the negatives
    rank: Tensor | None  # (R, 1)


def _attend(
    scaled: Tensor, excluded: Tensor | None, positive: Tensor | None, want_mean: bool, plan: _Plan
) -> _Attention:
    """Log-sum-exp over the negatives of each scaled query row (R, D), with mean and, of `positive` (R, 1), rank."""
    if plan.form == "flash":
        return _attend_by_flash(scaled, want_mean, plan)
    total = scaled.new_zeros(len(scaled), 1)
    mean = torch.zeros_like(scaled) if want_mean else None
    twice_rank = None if positive is None else torch.zeros_like(total, dtype=torch.int64)
    top = None if plan.bounded else torch.full_like(total, float("-inf"))
    tie = TIE_WIDTH[scaled.dtype] * plan.problem.inverse_temperature * plan.unit
    operand = scaled.to(plan.logits)
    width = max(1, min(_columns(len(scaled), scaled.device.type), len(plan.negatives)))
    spare: dict[torch.dtype, Tensor] = {}

    def room(like: Tensor, dtype: torch.dtype) -> Tensor:
        """For as many logits as there are rows in `like`. Kept, as fresh memory costs page faults."""
        if dtype not in spare:
            spare[dtype] = scaled.new_empty(len(scaled) * width, dtype=dtype)
        return spare[dtype][: len(scaled) * len(like)].view(len(scaled), len(like))

    for start in range(0, len(plan.negatives), width):
        rows = plan.negatives[start : start + width].to(plan.problem.matmul_dtype)
        if plan.logits == scaled.dtype:
            logits = matmul(operand, rows.to(plan.logits).t())
        else:
            logits = torch.mm(operand, rows.t(), out=room(rows, plan.logits))
            logits = room(rows, scaled.dtype).copy_(logits)
        _leave_out(logits, start, excluded, plan)
        if twice_rank is not None and positive is not None:  # a tie is in the second sum alone, so it counts half
            above = room(rows, scaled.dtype)  # of floats: bools take 5 times as long to add
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
        total += plan.exp_(logits).sum(1, keepdim=True)
        if mean is not None:
            share = logits if plan.mean == scaled.dtype else room(rows, plan.mean).copy_(logits)
            mean += matmul(share, rows.to(plan.mean))
            del share
        del logits  # so that the next tile takes its place: fresh memory costs a third of the time in page faults
    log_sum_exp = total.log() if top is None else _finite(top) + total.log()
    if mean is not None:
        mean /= total.masked_fill(total == 0, 1.0)  # no negative at all: a mean of zero, which pull = 0 ignores
    if twice_rank is None or positive is None:
        return _Attention(log_sum_exp, mean, None)
    last = plan.problem.negatives.shape[0]
    return _Attention(log_sum_exp, mean, (twice_rank // 2).masked_fill_(positive.isnan(), last))


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


def _attend_by_flash(scaled: Tensor, want_mean: bool, plan: _Plan) -> _Attention:
    """By torch's attention operator, whose tiles never leave the registers; what it returns of each part is merged."""
    log_sum_exp = scaled.new_full((len(scaled), 1), float("-inf"))
    mean = torch.zeros_like(scaled)
    operand = scaled.to(plan.logits).contiguous()[None, None]  # it reads rows, and keys, as if they were
    width = len(plan.negatives) if plan.negatives.dtype == plan.logits == scaled.dtype else 4096  # for small copies
    for start in range(0, len(plan.negatives), max(1, width)):
        rows = plan.negatives[start : start + width].to(plan.problem.matmul_dtype).to(plan.logits)
        rows = rows.contiguous()[None, None]
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        part_mean, part_sum = attention(operand, rows, rows, 0.0, False, scale=1.0)
        part_sum = part_sum.view(-1, 1)
        both = torch.logaddexp(log_sum_exp, part_sum)
        if want_mean:
            mean.lerp_(part_mean[0, 0].to(mean.dtype), (part_sum - both).exp_())
        log_sum_exp = both
    return _Attention(log_sum_exp, mean if want_mean else None, None)


def _columns(rows: int, device_type: str) -> int:
    """Negatives in a tile."""
    if device_type != "cpu":
        return max(128, 2**24 // rows)  # 64 MiB of logits: few launches, still nothing like N x K
    return min(MOST_COLUMNS, TILE_LOGITS // rows // 64 * 64)  # other widths take up to a sixth longer


def _block(problem: Problem, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of query rows `part` of B P_q: raw vectors and their raw matches (R, D), and the negatives to leave out (R,)."""
    positions = problem.query.shape[2]
    images = slice(part.start // positions, -(-part.stop // positions))
    inside = slice(part.start - images.start * positions, part.stop - images.start * positions)
    query, key = (x[images].transpose(1, 2).to(problem.dtype) for x in (problem.query, problem.key))
    key = gather_matches(key, None if problem.matches is None else problem.matches[images])
    excluded = None if problem.exclude is None else problem.exclude[images].repeat_interleave(positions)[inside]
    return query.reshape(-1, query.shape[2])[inside], key.reshape(-1, key.shape[2])[inside], excluded


def _finite(x: Tensor) -> Tensor:
    """-inf, the log-sum-exp of nothing, becomes 0 so that subtracting it gives no NaN."""
    return x.masked_fill(x == float("-inf"), 0.0)
