"""The dense InfoNCE loss in the ways a user could write it. Every one takes raw rows and returns the mean loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import compiled

TEMPERATURE = 0.2


class Inputs(NamedTuple):
    query: Tensor  # (N, D) raw
    key: Tensor  # (N, D) raw, row i the positive of query i
    queue: Tensor  # (K, D) unit rows
    filled: Tensor | None = None  # K on the device, 0-d, as a MomentumQueue has it


Loss = Callable[[Inputs], Tensor]


def materialise(inputs: Inputs) -> Tensor:
    """As MoCo and DenseCL write it, the clone of the queue included."""
    query, key = F.normalize(inputs.query, dim=1), F.normalize(inputs.key, dim=1)
    positive = torch.einsum("nc,nc->n", query, key).unsqueeze(1)
    negative = torch.einsum("nc,kc->nk", query, inputs.queue.clone())
    logits = torch.cat([positive, negative], dim=1)
    logits /= TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def autocast(inputs: Inputs) -> Tensor:
    """The same as a trainer with mixed precision runs it: a float32 queue, bfloat16 products, float32 softmax."""
    with torch.autocast(inputs.query.device.type, torch.bfloat16):
        return materialise(inputs._replace(queue=inputs.queue.float()))


def chunked(inputs: Inputs, rows: int = 256) -> Tensor:
    """Pieces of the batch, each recomputed in backward."""
    parts = []
    for query, key in zip(inputs.query.split(rows), inputs.key.split(rows), strict=True):  # type: ignore[no-untyped-call]
        loss = checkpoint(materialise, Inputs(query, key, inputs.queue), use_reentrant=False)
        parts.append(loss * len(query))
    return torch.stack(parts).sum() / len(inputs.query)


def linear_cross_entropy(inputs: Inputs, chunks: bool) -> Tensor:
    """Cross-entropy against negative 0 gives log-sum-exp - s_0; adding s_0 leaves the sum over the negatives."""
    query, key = F.normalize(inputs.query, dim=1), F.normalize(inputs.key, dim=1)
    scaled = query / TEMPERATURE
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    options = torch.nn.LinearCrossEntropyOptions() if chunks else None
    lse = F.linear_cross_entropy(scaled, inputs.queue, target, reduction="none", options=options)
    lse = lse + scaled @ inputs.queue[0]
    return F.softplus(lse.float() - (scaled * key).sum(1).float()).mean()


# The rivals that know the trick: attention with K = V = queue gives log-sum-exp and gradient in one pass.
Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # query, queue -> mean row, log-sum-exp


def attend_cpu(query: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    heads = 2 if len(query) % 2 == 0 else 1  # one per thread
    rows = queue.expand(1, heads, -1, -1)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(query.view(1, heads, -1, query.shape[1]), rows, rows, 0.0, False, scale=1 / TEMPERATURE)  # type: ignore[no-any-return]


def attend_flash(query: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    out = attention(query[None, None], queue[None, None], queue[None, None], 0.0, False, scale=1 / TEMPERATURE)
    return out[0], out[1]


def attend_cudnn(query: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    rows = queue[None, None]
    out = attention(query[None, None], rows, rows, None, True, 0.0, False, False, scale=1 / TEMPERATURE)
    return out[0], out[1]


def attend_flex() -> Attend:
    flex = compiled(flex_attention)

    def attend(query: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        rows = queue[None, None]
        return flex(query[None, None], rows, rows, scale=1 / TEMPERATURE, return_lse=True)  # type: ignore[no-any-return]

    return attend


class _QueueAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, queue: Tensor, attend: Attend) -> Tensor:
        mean, lse = attend(query, queue)
        positive = (query * key).sum(1).float() / TEMPERATURE
        margin = lse.reshape(-1).float() - positive
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((mean.reshape(query.shape) - key) * (margin.sigmoid() / TEMPERATURE)[:, None])
        return F.softplus(margin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row,) = ctx.saved_tensors
        return (row * grad[:, None]).to(row.dtype), None, None, None


def attention(inputs: Inputs, attend: Attend) -> Tensor:
    query, key = F.normalize(inputs.query, dim=1), F.normalize(inputs.key, dim=1)
    return _QueueAttention.apply(query, key, inputs.queue, attend).mean()  # type: ignore[no-untyped-call, no-any-return]


def all_rivals(device: torch.device, dtype: torch.dtype) -> dict[str, Loss]:
    """By name, for one case; one that cannot serve it fails there, and its reason is recorded."""
    found: dict[str, Loss] = {"materialise": materialise}
    if dtype == torch.bfloat16:
        found["materialise, autocast"] = autocast
    found["torch.compile"] = compiled(materialise)
    if hasattr(torch._inductor.config, "auto_chunker"):  # inductor cuts the logits by itself
        found["torch.compile, auto-chunk"] = compiled(materialise, options={"auto_chunker.enable": True})
    found["chunked"] = chunked
    if hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = partial(linear_cross_entropy, chunks=False)
        found["linear_cross_entropy, chunks"] = partial(linear_cross_entropy, chunks=True)
    found["attention, flash"] = partial(attention, attend=attend_flash if device.type == "cuda" else attend_cpu)
    if device.type == "cuda":
        found["attention, cuDNN"] = partial(attention, attend=attend_cudnn)
        found["attention, flex"] = partial(attention, attend=attend_flex())  # it serves none of the cases on a CPU
    return found
