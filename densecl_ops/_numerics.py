"""Arithmetic that every backend and module must do alike."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# A vector shorter than this has no direction: it normalises to zero and gets zero gradient. torch's own
# F.normalize divides by the same 1e-12, which turns a zero float16 row into an infinite gradient.
NORM_EPS = 1e-12


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32: what sums, norms and losses are kept in."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which would take 1 us to do nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def divisor(lengths: Tensor, least: float) -> Tensor:
    """Lengths to divide by: infinite where one is below `least`, NaN where its square overflowed."""
    # inf + 0 inf is NaN. Two operations, where masks take five: small calls are bound by their number.
    return torch.threshold_(lengths.add(lengths, alpha=0), least, float("inf"))


def norm(x: Tensor, dim: int, keepdim: bool = True) -> Tensor:
    """|x| along `dim` as a divisor. F.normalize would write a normalised copy of the whole map besides."""
    if x.stride(dim) == 1:  # along other strides it takes 4 times as long as the squares
        return divisor(torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim), NORM_EPS)
    # The threshold comes first: a root's gradient is infinite at 0.
    return divisor(x.square().sum(dim, keepdim=keepdim), NORM_EPS**2).sqrt_()


def inverse_norm(x: Tensor, dim: int) -> Tensor:
    """1 / |x| along `dim` (kept as size 1), 0 where |x| is below NORM_EPS, NaN where its square overflows."""
    return norm(x, dim).reciprocal()


def normalize(x: Tensor, dim: int) -> Tensor:
    """Unit vectors along `dim`; zero vectors stay zero."""
    return x / norm(x, dim)


def normalize_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, D) keys as negatives: unit rows in `dtype`, autocast or not."""
    # As exact as the loss is beside such rows, to which a key and its own row are a tie.
    return cast(normalize(cast(keys, torch.promote_types(accumulation_dtype(keys), dtype)), dim=1), dtype)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off for our own arithmetic: each backend casts exactly what the contract says."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no meta device
        return nullcontext()
    return torch.autocast(device, enabled=False)
