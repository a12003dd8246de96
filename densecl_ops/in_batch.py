"""Negatives from the batch itself, over all ranks: for trainers without a queue, such as BYOL and SimCLR."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from densecl_ops import _checks, _distributed
from densecl_ops._numerics import accumulation_dtype, normalize_keys


def in_batch_negatives(
    keys: Tensor,
    *,
    process_group: dist.ProcessGroup | None = None,
    gather_distributed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Unit rows of the keys of every rank, and which of them are this rank's own.

    With B_r the batch of rank r of R and k_b the keys of all ranks in rank order::

        n_j = k_j / |k_j|, j = 0 ... K - 1, K = B_0 + ... + B_(R - 1)
        own_b = b + B_0 + ... + B_(r - 1)

    (SimCLR, arXiv 2002.05709, section 2.1.) Pass them to the loss as `negatives` and `exclude`, so that no image is its
    own negative.

    Where keys require grad, the gradient of `negatives` is summed over the ranks on its way back to the keys.
    DistributedDataParallel averages parameter gradients, and so gives that of one process on the whole batch, if the
    ranks hold equally many images. Every rank then has to run backward through its negatives.

    Args:
        keys: (B, D), any float dtype and strides, one row per image, such as `pooled` or `image` of a Projection. B may
            differ between ranks.
        process_group: The ranks to gather from; each must call. Default: the default group, once initialised.
        gather_distributed: Whether to gather at all. Default True; False keeps to this rank's keys.

    Returns:
        negatives (K, D), unit rows in the dtype of keys (zero keys stay zero), and own (B,) int64.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: keys is not (B, D), process_group is not a group of this process, the ranks disagree on D, dtype or
            requires_grad, or gather inside DistributedDataParallel.join(). An error on one rank raises on all.

    Example:
        >>> import torch
        >>> from densecl_ops.functional import dense_info_nce, in_batch_negatives
        >>> query, key = torch.randn(2, 8, 128, 7, 7)
        >>> negatives, own = in_batch_negatives(key.mean((2, 3)))
        >>> negatives.shape, own.tolist()
        (torch.Size([8, 128]), [0, 1, 2, 3, 4, 5, 6, 7])
        >>> loss = dense_info_nce(query, key, negatives, exclude=own)  # 7 negatives per image
    """
    _checks.require_bool("gather_distributed", gather_distributed)
    _distributed.require_group(process_group)
    group = _distributed.group_of(process_group) if gather_distributed else None
    if group is None:
        unit = _unit_keys(keys)
        return unit, torch.arange(unit.shape[0], device=unit.device)
    return _distributed.outside_graphs(_of_all_ranks)(keys, group)


def _of_all_ranks(keys: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    unit, headers = _distributed.announce(lambda: _unit_keys(keys), group)
    sizes = [header.keys for header in headers]
    own = torch.arange(unit.shape[0], device=unit.device) + sum(sizes[: dist.get_rank(group)])
    return _Gather.apply(unit, sizes, group), own  # type: ignore[no-untyped-call]


def _unit_keys(keys: Tensor) -> Tensor:
    _checks.require_float("keys", keys)
    if keys.ndim != 2:
        raise ValueError(f"keys: got shape {_checks.shape_of(keys)}, expected (B, D); of a Projection pass `pooled`")
    return normalize_keys(keys, keys.dtype)


class _Gather(torch.autograd.Function):
    """Unit keys of all ranks; their gradient is the sum of what every rank's loss asks of this rank's keys."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _distributed.gather(keys, sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Of many ranks a half-precision sum would lose digits, and autograd may still need `grad` as it is.
        total = grad.to(accumulation_dtype(grad), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        own = total.split(ctx.sizes)[dist.get_rank(ctx.group)]  # type: ignore[no-untyped-call]
        return own.to(grad.dtype), None, None
