"""The dense InfoNCE loss of a handful of rows on a CPU: all logits at once, in as few operations as there can be.

A small call is bound by their number: blocks and tiles would take twice as long for 8 queries and 64 negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ops._numerics import norm
from densecl_ops.info_nce.eager import Problem, Result, gather_matches, rows_of

MOST_LOGITS = 2**15  # 128 KiB in float32: 8 queries by 4,096 negatives


def serves(problem: Problem, want_rank: bool) -> bool:
    """Whether a problem is small and plain enough."""
    query, negatives = problem.query, problem.negatives
    return (
        not want_rank
        and problem.is_plain
        and query.is_cpu
        and negatives.dtype == problem.matmul_dtype == problem.dtype
        and query.shape[0] * query.shape[2] * negatives.shape[0] <= MOST_LOGITS
    )


def forward(problem: Problem, want_grad: bool) -> Result:
    """As in Backend, without a rank; the formulas are those of blockwise.py."""
    query, key = rows_of(problem.query, problem.dtype), rows_of(problem.key, problem.dtype)
    query_norm, key_norm = norm(query, 2), norm(key, 2, keepdim=False)
    if problem.matches is not None:
        key, key_norm = gather_matches(key, problem.matches), key_norm.gather(1, problem.matches)
    scale, negatives = problem.inverse_temperature, problem.negatives
    if not isinstance(scale, Tensor):  # a product with a number takes twice as long
        scale = torch.scalar_tensor(scale, dtype=problem.dtype, device="cpu")
    if problem.existing is not None:
        negatives = negatives[: int(problem.existing)]

    unit = query / query_norm
    scaled = unit * scale
    logits = torch.mm(scaled.flatten(0, 1), negatives.t())
    if logits.shape[1] == 0:
        log_share, log_sum_exp = logits, torch.full_like(key_norm, float("-inf"))
    else:
        log_share = logits.log_softmax(1)  # one pass; logsumexp takes six, and gives the shares in another
        log_sum_exp = (logits.amax(1) - log_share.amax(1)).view_as(key_norm)  # any column's, but others lose digits
    margin = torch.addcdiv(log_sum_exp, torch.linalg.vecdot(scaled, key), key_norm, value=-1)  # less the positive
    loss = F.softplus(margin, threshold=40)  # beyond which it is `margin`, to the last bit of float64
    pull = margin.sigmoid()
    if not want_grad:
        return Result(loss, None, log_sum_exp, pull, None, None)
    grad = torch.mm(log_share.exp_(), negatives).view_as(unit).addcdiv_(key, key_norm.unsqueeze(2), value=-1)
    along = torch.linalg.vecdot(grad, unit)
    grad.addcmul_(unit, along.unsqueeze(2), value=-1).mul_((pull * scale).unsqueeze(2) / query_norm)
    return Result(loss, None, log_sum_exp, pull, grad, along * pull)
