"""The dense InfoNCE loss: the problem, its solution as the textbook writes it, and what a fused backend offers instead.

row_loss() defines what the other backends compute: all N x K logits, then cross entropy with class 0, differentiated by
autograd alone. Benchmarks compare with it.
"""

from typing import Any, NamedTuple, Protocol, get_type_hints

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from densecl_ops._numerics import cast, inverse_norm
from densecl_ops._recomputation import note_compiled
from densecl_ops._tracing import inside_func, operator

# exp() without any shift overflows float32 near 88; |logit| <= 70 leaves room for a sum over e^18 negatives.
UNSHIFTED_LIMIT = 70.0

# Cosines this close are a tie to the rank: the order of summation changes sums of 128 to 512 products by up to 1e-6.
TIE_WIDTH = {torch.float32: 2.0**-18, torch.float64: 2.0**-46}


class Problem(NamedTuple):
    """One dense InfoNCE problem: B images, P_q query and P_k key positions, D channels, K negatives.

    The fields are the arguments of the operators, whose schema is made of them. New ones go to the end.
    """

    query: Tensor  # (B, D, P_q) raw projections, any strides
    key: Tensor  # (B, D, P_k) likewise
    negatives: Tensor  # (K, D) rows, used as they are
    scale: float | None  # 1 / t, a number, or None where it is learned
    learned_scale: Tensor | None  # 1 / t, a 0-d tensor (unknown to the host), or None where it is a number
    matches: Tensor | None  # (B, P_q) int64 positions in the key grid, or None where position i matches position i
    exclude: Tensor | None  # (B,) int64 row of `negatives` that image b must not see
    existing: Tensor | None  # 0-d int64, how many of the first negatives exist; None for all
    unit_negatives: bool  # whether they are known to be unit rows, as those of a queue are; bounds the logits
    dtype: torch.dtype  # float32 or float64, for norms, sums, logits and the loss
    matmul_dtype: torch.dtype  # of the products with the negatives

    @property
    def inverse_temperature(self) -> float | Tensor:
        """1 / t, whichever of the two scales it is."""
        return self.scale if self.learned_scale is None else self.learned_scale  # type: ignore[return-value]

    @property
    def is_plain(self) -> bool:
        """Whether no option is asked for that at_once.py does without."""
        return self.exclude is None


_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", float | None: "float?", bool: "bool", torch.dtype: "ScalarType"}
SCHEMA = ", ".join(f"{_SCHEMA[kind]} {name}" for name, kind in get_type_hints(Problem).items())


# ---- the textbook ---------------------------------------------------------------------------------------------------


# A frozen queue is enqueued into before backward() reads it: the copy that MoCo makes.
_snapshot = operator(
    "snapshot", "(Tensor negatives) -> Tensor", torch.clone, torch.empty_like, when_traced=note_compiled
)


def row_loss(problem: Problem, want_rank: bool) -> tuple[Tensor, Tensor | None]:
    """Returns loss (B, P_q) and rank (B, P_q) int64, None if not wanted."""
    query, _ = unit_vectors(problem.query, problem.dtype)
    key = gather_matches(unit_vectors(problem.key, problem.dtype)[0], problem.matches)
    negatives = problem.negatives
    if not negatives.requires_grad and not inside_func():
        negatives = _snapshot(negatives)

    # Not by the property, which the compiler of torch 2.8 cannot read.
    scale: Any = problem.scale if problem.learned_scale is None else problem.learned_scale
    positive = einsum(query, key, "b p d, b p d -> b p") * scale
    negative = einsum(query.to(problem.matmul_dtype), negatives.to(problem.matmul_dtype), "b p d, k d -> b p k")
    negative = _leave_out(negative.to(problem.dtype) * scale, problem)

    logits = rearrange(torch.cat([positive[:, :, None], negative], dim=2), "b p k -> (b p) k")
    loss = F.cross_entropy(logits, logits.new_zeros(logits.shape[0], dtype=torch.int64), reduction="none")
    if not want_rank:
        return loss.view_as(positive), None
    return loss.view_as(positive), _rank(query.detach(), key.detach(), negatives.detach(), problem)


def _rank(query: Tensor, key: Tensor, negatives: Tensor, problem: Problem) -> Tensor:
    """How many negatives score above the positive; ties count half, a positive that is NaN ranks last.

    All operands are rounded alike, and their products are not: a copy of the positive among the negatives is a tie.
    """
    key = as_negatives(key, problem)
    query, negatives, key = (x.to(problem.matmul_dtype).to(problem.dtype) for x in (query, negatives, key))
    positive = einsum(query, key, "b p d, b p d -> b p")[:, :, None]
    margin = _leave_out(einsum(query, negatives, "b p d, k d -> b p k") - positive, problem)
    width = TIE_WIDTH[problem.dtype]
    rank = (margin > width).sum(2) + (margin.abs() <= width).sum(2) // 2
    return rank.masked_fill(positive.isnan().squeeze(2), negatives.shape[0])


def _leave_out(logits: Tensor, problem: Problem) -> Tensor:
    """(B, P_q, K) with -inf for negatives that do not exist or are excluded."""
    column = torch.arange(logits.shape[2], device=logits.device)
    if problem.existing is not None:
        logits = logits.masked_fill(column >= problem.existing, float("-inf"))
    if problem.exclude is not None:
        logits = logits.masked_fill(column == problem.exclude[:, None, None], float("-inf"))
    return logits


# ---- what fused backends offer and share ----------------------------------------------------------------------------


class Result(NamedTuple):
    """What one pass over the negatives yields for every query position; what is not asked for is None."""

    loss: Tensor  # (B, P_q)
    rank: Tensor | None  # (B, P_q) int64, as `_rank` defines it
    log_sum_exp: Tensor  # (B, P_q) over the negatives' logits alone
    pull: Tensor  # (B, P_q), 1 - p+, the probability that the negatives take; it scales every gradient
    grad_query: Tensor | None  # (B, P_q, D) d loss_i / d query_i (raw)
    grad_scale: Tensor | None  # (B, P_q) d loss_i / d scale


def empty_result(problem: Problem, want_grad: bool, want_rank: bool) -> Result:
    """To be written into."""
    batch, channels, positions = problem.query.shape
    row = problem.query.new_empty((batch, positions), dtype=problem.dtype)
    return Result(
        loss=row,
        rank=torch.empty_like(row, dtype=torch.int64) if want_rank else None,
        log_sum_exp=torch.empty_like(row),
        pull=torch.empty_like(row),
        grad_query=row.new_empty((batch, positions, channels)) if want_grad else None,
        grad_scale=torch.empty_like(row) if want_grad else None,
    )


class Backend(Protocol):
    """What a fused backend offers: loss and gradient in one pass, and the two gradients that need a pass of their own.

    Each runs under no_grad and with autocast off.
    """

    def forward(self, problem: Problem, want_grad: bool, want_rank: bool) -> Result:
        """Loss of every query position and, as asked, its gradients and the rank of its positive."""

    def grad_negatives(self, problem: Problem, log_sum_exp: Tensor, row_weight: Tensor) -> Tensor:
        """d (sum_i w_i loss_i) / d negatives, (K, D) in problem.dtype; `log_sum_exp` as forward() returned it.

        `row_weight` (B, P_q) is w, upstream gradient, times `pull`; a row of 0 is left out, whatever it holds.
        """

    def grad_key(self, problem: Problem, row_weight: Tensor) -> Tensor:
        """d (sum_i w_i loss_i) / d key, (B, P_k, D) in problem.dtype. Reads no negatives."""


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D, P) raw -> (B, P, D), contiguous; `x` itself where that is what it holds."""
    return cast(x.mT.contiguous(), dtype)


def unit_vectors(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, D, P) raw -> unit vectors (B, P, D), and the inverse norms (B, P, 1) that made them."""
    rows = rows_of(x, dtype)
    inverse = inverse_norm(rows, dim=2)
    return rows * inverse, inverse


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The backward of `unit_vectors`: d / d x^ -> d / d x, the part across x^ over |x|."""
    return (grad - unit * (grad * unit).sum(2, keepdim=True)) * inverse


def gather_matches(key: Tensor, index: Tensor | None) -> Tensor:
    """(B, P_k, D) -> (B, P_q, D), for each query position the vector of its match."""
    if index is None:
        return key
    return key.gather(1, index[:, :, None].expand(-1, -1, key.shape[2]))


def as_negatives(unit: Tensor, problem: Problem) -> Tensor:
    """Unit keys rounded as a row of `negatives` is before it meets the query: the rank compares alike with alike."""
    return unit.to(problem.negatives.dtype).to(problem.matmul_dtype)


def scatter_matches(query: Tensor, index: Tensor | None, key_positions: int) -> Tensor:
    """The adjoint of `gather_matches`: (B, P_q, D) -> (B, P_k, D), queries that share a key added up."""
    if index is None:
        return query
    batch, _, channels = query.shape
    target = index[:, :, None].expand(-1, -1, channels)
    return query.new_zeros(batch, key_positions, channels).scatter_add_(1, target, query)


def is_bounded_by_contract(problem: Problem) -> bool:
    """Whether the host knows, without looking at any value, that no logit can overflow exp() unshifted."""
    if not problem.unit_negatives or problem.matmul_dtype == torch.float16:  # whose range is too small
        return False
    return problem.scale is not None and problem.scale <= UNSHIFTED_LIMIT
