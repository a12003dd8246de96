"""The dense InfoNCE loss as the textbook writes it: all N x K logits, then cross entropy with class 0.

It defines what the other backends compute. Benchmarks compare with it. Autograd alone differentiates it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from densecl_ops._checks import requires_grad
from densecl_ops._operators import operator
from densecl_ops._recomputation import note_run
from densecl_ops.info_nce.problem import Problem, gather_matches, unit_vectors


@operator("snapshot", "(Tensor negatives) -> Tensor", torch.empty_like)
def _snapshot(negatives: Tensor) -> Tensor:
    """A frozen queue is enqueued into before backward() reads it: the copy that MoCo makes."""
    note_run(negatives)
    return negatives.clone()


def row_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns loss (B, P_q) and rank (B, P_q) int64."""
    query, _ = unit_vectors(problem.query, problem.dtype)
    key = gather_matches(unit_vectors(problem.key, problem.dtype)[0], problem.matches)
    negatives = problem.negatives if requires_grad(problem.negatives) else _snapshot(problem.negatives)

    positive = einsum(query, key, "b p d, b p d -> b p")
    negative = einsum(query.to(problem.matmul_dtype), negatives.to(problem.matmul_dtype), "b p d, k d -> b p k")
    positive = positive * problem.inverse_temperature
    negative = negative.to(problem.dtype) * problem.inverse_temperature

    column = torch.arange(negatives.shape[0], device=negatives.device)
    if problem.existing is not None:
        negative = negative.masked_fill(column >= problem.existing, float("-inf"))
    if problem.exclude is not None:
        negative = negative.masked_fill(column == problem.exclude[:, None, None], float("-inf"))

    logits = rearrange(torch.cat([positive[:, :, None], negative], dim=2), "b p k -> (b p) k")
    loss = F.cross_entropy(logits, logits.new_zeros(logits.shape[0], dtype=torch.int64), reduction="none")
    rank = (negative > positive[:, :, None]).sum(2)
    return loss.view_as(positive), rank
