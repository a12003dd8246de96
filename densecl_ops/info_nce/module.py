"""The dense InfoNCE loss as a module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from densecl_ops import _checks, _tracing
from densecl_ops._types import BACKENDS, REDUCTIONS, BackendName, Correspondence, NegativeQueue, Reduction
from densecl_ops.info_nce.function import CallOptions, dense_info_nce

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DenseInfoNCELoss(nn.Module):
    """InfoNCE for dense projections, and with (B, D) vectors MoCo's image-level loss: one class for both terms.

    See :func:`densecl_ops.functional.dense_info_nce` for the equation and the meaning of every argument.

    Args:
        temperature: t, at least 1e-18. Default 0.2, DenseCL's and MoCo-v2's.
        reduction: "mean" (default, over the total weight), "sum" or "none".
        learnable_temperature: Learns log(1/t) as the parameter `logit_scale` (as CLIP does), from `temperature` on.
            Give `criterion.parameters()` to the optimizer, and move the loss to the device. Default: t is constant.
        backend: "auto" (default), "blockwise", "eager" or "triton".

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
        reduction: Reduction = "mean",
        learnable_temperature: bool = False,
        *,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        _checks.require_choice("reduction", reduction, REDUCTIONS)
        _checks.require_bool("learnable_temperature", learnable_temperature)
        _checks.require_choice("backend", backend, BACKENDS)
        self._start = _checks.require_temperature("temperature", temperature)
        self.reduction = reduction
        self.learnable_temperature = learnable_temperature
        self.backend = backend
        # One element, not 0-d: neither form of FSDP shards a 0-d parameter.
        self.register_parameter("logit_scale", nn.Parameter(torch.empty(1)) if learnable_temperature else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Puts a learned temperature back to its start: what deferred initialisation calls after `to_empty`."""
        if self.logit_scale is not None:
            self.logit_scale.fill_(-math.log(self._start))

    @property
    def temperature(self) -> float | Tensor:
        """t: a number, which may be set, or while it is learned a 0-d tensor that carries a gradient to `logit_scale`.

        Raises:
            RuntimeError: FSDP holds `logit_scale` in shards, as it does outside of the forward() that it wraps.
        """
        if not self.learnable_temperature:
            return self._start
        assert self.logit_scale is not None
        if _tracing.is_sharded(self.logit_scale):
            raise RuntimeError(
                "temperature: got a logit_scale in shards, expected a whole one; call the loss inside the forward() of "
                "the module that fully_shard was given, and read logit_scale.full_tensor() on every rank"
            )
        return (-self.logit_scale).exp().squeeze()

    @temperature.setter
    def temperature(self, value: float) -> None:
        if self.logit_scale is not None:
            raise AttributeError(
                "temperature: it is learned here, expected learnable_temperature=False; set logit_scale"
            )
        self._start = _checks.require_temperature("temperature", value)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            query: Tensor,
            key: Tensor,
            negatives: Tensor | NegativeQueue,
            correspondence: Correspondence | Tensor | None = None,
            *,
            return_rank: Literal[False] = False,
            **options: Unpack[CallOptions],
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            query: Tensor,
            key: Tensor,
            negatives: Tensor | NegativeQueue,
            correspondence: Correspondence | Tensor | None = None,
            *,
            return_rank: Literal[True],
            **options: Unpack[CallOptions],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            query: Tensor,
            key: Tensor,
            negatives: Tensor | NegativeQueue,
            correspondence: Correspondence | Tensor | None = None,
            *,
            return_rank: bool,
            **options: Unpack[CallOptions],
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | NegativeQueue,
        correspondence: Correspondence | Tensor | None = None,
        *,
        return_rank: bool = False,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the loss, or with return_rank the pair of the loss and the rank (B, P_q) of each positive.

        Options of a call, such as `weight` (B, P_q) and `exclude` (B,), are as
        :func:`densecl_ops.functional.dense_info_nce` says.
        """
        for name in ("temperature", "reduction", "backend"):
            if name in options:
                raise TypeError(f"{name}: got one in the call, expected it where the loss is made, or dense_info_nce()")
        return dense_info_nce(
            query,
            key,
            negatives,
            correspondence,
            temperature=self.temperature,
            reduction=self.reduction,
            return_rank=return_rank,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        learned = "" if self.logit_scale is None else ", learnable_temperature=True"
        scale = self.logit_scale
        known = scale is None or (not (scale.is_meta or _tracing.is_sharded(scale)) and not _tracing.is_traced(scale))
        shown = f"{float(torch.as_tensor(self.temperature).detach()):.4g}" if known else "?"
        return f"temperature={shown}, reduction={self.reduction!r}{learned}, backend={self.backend!r}"
