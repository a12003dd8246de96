"""Which implementation serves a call."""

from __future__ import annotations

import functools
import warnings
from typing import get_args

import torch
from torch import Tensor

from densecl_ops import _launch
from densecl_ops._checks import require_choice
from densecl_ops._types import BackendName

BACKENDS = get_args(BackendName)
WIDEST = 512
OLDEST_TRITON = (3, 6)  # the oldest that ran the kernels right; in 3.2 the interpreter corrupts memory


def triton_version() -> tuple[int, int] | None:
    """None without Triton. It is imported, since it comes in distributions of many names; only a GPU asks for it."""
    try:
        import triton
    except ImportError:
        return None
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def resolve(requested: str, tensor: Tensor, dtype: torch.dtype, channels: int = 0) -> str:
    """Turns a `backend` argument into "eager", "blockwise" or "triton".

    Args:
        requested: As the user gave it.
        tensor: Any input; tells the device.
        dtype: The accumulation dtype of the call.
        channels: D, for the loss, whose kernels hold whole rows.

    Raises:
        ValueError: There is no such backend, or it cannot serve this call; says why.
    """
    require_choice("backend", requested, BACKENDS)
    if requested in ("eager", "blockwise"):
        return requested
    obstacle = _triton_obstacle(tensor.device.type, dtype, channels)
    if requested == "triton":
        if obstacle is not None:
            raise ValueError(f"backend: got 'triton', which cannot serve this call: {obstacle}")
        return "triton"
    if tensor.device.type != "cuda":  # torch calls ROCm devices cuda too
        return "blockwise"
    if obstacle is None:
        return "triton"
    if not torch.compiler.is_compiling():
        _warn_slow(obstacle)
    return "blockwise"


def _triton_obstacle(device_type: str, dtype: torch.dtype, channels: int) -> str | None:
    version = triton_version()
    if version is None:
        return "the triton package is not installed (pip install 'densecl-ops[triton]')"
    if version < OLDEST_TRITON:
        return f"it needs triton {_dotted(OLDEST_TRITON)}, and {_dotted(version)} is installed"
    if device_type != "cuda" and not (device_type == "cpu" and _launch.interpreting()):
        return f"it runs on CUDA and ROCm devices (on the CPU only with TRITON_INTERPRET=1), not on {device_type}"
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if channels > WIDEST:
        return f"its kernels hold rows of up to {WIDEST} channels, not {channels}"
    return None


@functools.cache  # once per process and reason
def _warn_slow(reason: str) -> None:
    warnings.warn(f"densecl_ops runs its slower 'blockwise' backend on a GPU: {reason}", stacklevel=4)
