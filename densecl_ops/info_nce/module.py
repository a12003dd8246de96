"""The dense InfoNCE loss as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from densecl_ops import _backends, _checks
from densecl_ops._types import Correspondence, NegativeQueue
from densecl_ops.info_nce.functional import REDUCTIONS, dense_info_nce


class DenseInfoNCELoss(nn.Module):
    """InfoNCE for dense projections, and with (B, D) vectors MoCo's image-level loss: one class for both terms.

    See :func:`densecl_ops.functional.dense_info_nce` for the equation and the meaning of every argument.

    Args:
        temperature: t, at least 1e-18. Default 0.2, DenseCL's and MoCo-v2's.
        reduction: "mean" (default, over the total weight), "sum" or "none".
        learnable_temperature: Learns log(1/t) as the parameter `logit_scale` (as CLIP does), from `temperature` on.
            Default: t is constant.
        backend: "auto" (default), "eager", "blockwise" or "triton".

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.

    Example:
        >>> import torch
        >>> from densecl_ops import DenseInfoNCELoss, MomentumQueue
        >>> criterion, queue = DenseInfoNCELoss(temperature=0.2), MomentumQueue(size=1024, dim=128)
        >>> query, key = torch.randn(4, 128, 7, 7, requires_grad=True), torch.randn(4, 128, 7, 7)
        >>> match = torch.randint(49, (4, 49))
        >>> loss = criterion(query, key, queue, match)
        >>> loss.backward()
        >>> image_loss = criterion(torch.randn(4, 128), torch.randn(4, 128), queue)  # MoCo
    """

    logit_scale: Tensor | None

    def __init__(
        self,
        temperature: float = 0.2,
        reduction: str = "mean",
        learnable_temperature: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        temperature = _checks.require_temperature("temperature", temperature)
        _checks.require_choice("reduction", reduction, REDUCTIONS)
        _checks.require_bool("learnable_temperature", learnable_temperature)
        _checks.require_choice("backend", backend, _backends.BACKENDS)
        self._temperature = temperature
        self.reduction = reduction
        self.backend = backend
        scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable_temperature else None
        self.register_parameter("logit_scale", scale)

    @property
    def temperature(self) -> float | Tensor:
        """t: a number, or while it is learned a 0-d tensor that carries the gradient to `logit_scale`."""
        return self._temperature if self.logit_scale is None else (-self.logit_scale).exp()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | NegativeQueue,
        correspondence: Correspondence | Tensor | None = None,
        *,
        weight: Tensor | None = None,
        exclude: Tensor | None = None,
        return_rank: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the loss, or with return_rank the pair of the loss and the rank (B, P_q) of each positive."""
        return dense_info_nce(  # type: ignore[call-overload, misc, no-any-return]  # return_rank is not a literal here
            query,
            key,
            negatives,
            correspondence,
            temperature=self.temperature,
            reduction=self.reduction,
            weight=weight,
            exclude=exclude,
            return_rank=return_rank,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        learned = "" if self.logit_scale is None else ", learnable_temperature=True"
        temperature = float(torch.as_tensor(self.temperature).detach())
        return f"temperature={temperature:.4g}, reduction={self.reduction!r}{learned}, backend={self.backend!r}"
