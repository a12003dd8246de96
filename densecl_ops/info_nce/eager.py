"""The dense InfoNCE loss as the textbook writes it: all N x K logits, then cross entropy with class 0.

It defines what the other backends compute. Benchmarks compare with it. Autograd alone differentiates it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from densecl_ops._recomputation import note_compiled
from densecl_ops._tracing import inside_func, operator
from densecl_ops.info_nce.problem import TIE_WIDTH, Problem, as_negatives, gather_matches, unit_vectors


@operator("snapshot", "(Tensor negatives) -> Tensor", torch.empty_like, when_traced=note_compiled)
def _snapshot(negatives: Tensor) -> Tensor:
    """A frozen queue is enqueued into before backward() reads it: the copy that MoCo makes."""
    return negatives.clone()


def row_loss(problem: Problem, want_rank: bool) -> tuple[Tensor, Tensor]:
    """Returns loss (B, P_q) and rank (B, P_q) int64, (0,) if not wanted."""
    query, _ = unit_vectors(problem.query, problem.dtype)
    key = gather_matches(unit_vectors(problem.key, problem.dtype)[0], problem.matches)
    negatives = problem.negatives
    if not negatives.requires_grad and not inside_func():
        negatives = _snapshot(negatives)

    positive = einsum(query, key, "b p d, b p d -> b p")
    negative = einsum(query.to(problem.matmul_dtype), negatives.to(problem.matmul_dtype), "b p d, k d -> b p k")
    positive = positive * problem.inverse_temperature
    negative = _leave_out(negative.to(problem.dtype) * problem.inverse_temperature, problem)

    logits = rearrange(torch.cat([positive[:, :, None], negative], dim=2), "b p k -> (b p) k")
    loss = F.cross_entropy(logits, logits.new_zeros(logits.shape[0], dtype=torch.int64), reduction="none")
    if not want_rank:
        return loss.view_as(positive), torch.empty(0, dtype=torch.int64, device=loss.device)
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
