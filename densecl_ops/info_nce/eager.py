"""The dense InfoNCE loss as the textbook writes it: all N x K logits, then cross entropy with class 0.

The specification of its neighbours, the baseline of the benchmarks, and differentiable by autograd alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from densecl_ops.info_nce.problem import Problem, gather_matches, unit_rows


def row_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns loss (B, P_q) and rank (B, P_q) int64."""
    query, _ = unit_rows(problem.query, problem.dtype)
    key = gather_matches(unit_rows(problem.key, problem.dtype)[0], problem.match_index)
    # A frozen queue is enqueued into before backward() reads it: the copy that MoCo makes.
    negatives = problem.negatives if problem.negatives.requires_grad else problem.negatives.clone()

    positive = einsum(query, key, "b p d, b p d -> b p")
    negative = einsum(query.to(problem.matmul_dtype), negatives.to(problem.matmul_dtype), "b p d, k d -> b p k")
    positive = positive * problem.inverse_temperature
    negative = negative.to(problem.dtype) * problem.inverse_temperature

    column = torch.arange(negatives.shape[0], device=negatives.device)
    if problem.negatives_count is not None:
        negative = negative.masked_fill(column >= problem.negatives_count, float("-inf"))
    if problem.exclude is not None:
        negative = negative.masked_fill(column == problem.exclude[:, None, None], float("-inf"))

    logits = rearrange(torch.cat([positive[:, :, None], negative], dim=2), "b p k -> (b p) k")
    loss = F.cross_entropy(logits, logits.new_zeros(logits.shape[0], dtype=torch.int64), reduction="none")
    rank = (negative > positive[:, :, None]).sum(2)
    return loss.view_as(positive), rank
