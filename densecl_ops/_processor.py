"""What this CPU is good at, asked at first use, and the product of matrices that follows from it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densecl_ops._parallel import has_full_teams


class Processor(NamedTuple):
    """Attributes of the CPU, all False where torch cannot tell.

    Attributes:
        bfloat16: It has instructions for products of it.
        onednn: It multiplies float32 faster in oneDNN, by a private operator, than in MKL, as torch.mm does.
    """

    bfloat16: bool
    onednn: bool


@functools.cache
def processor() -> Processor:
    ask: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = ask()
    # MKL leaves the AVX-512 of AMD processors unused: 114 GFLOP/s a core, where oneDNN reaches 253 (EPYC, Zen 5).
    is_amd = "AMD" in str(capabilities.get("cpu_name")) and bool(capabilities.get("avx512_f"))
    return Processor(
        bfloat16=any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16")),
        onednn=is_amd and hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    )


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies matrices like this one faster."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not processor().onednn:
        return False
    return has_full_teams(torch.get_num_threads())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices. The public form is torch.mm; oneDNN takes less than half the time where it is better."""
    if by_onednn(a):
        if not (b.is_contiguous() or b.t().is_contiguous()):  # a tile of a (D, K) queue's .T: a thousand times as long
            b = b.contiguous()
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return product
    return torch.mm(a, b)
