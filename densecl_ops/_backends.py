"""Which implementation serves a call."""

from __future__ import annotations

import functools
import warnings

import torch

from densecl_ops._checks import require_choice

BACKENDS = ("auto", "eager", "blockwise", "triton")


def resolve(requested: str, device: torch.device) -> str:
    """Turns a `backend` argument into "eager", "blockwise" or "triton", or raises ValueError with the reason."""
    require_choice("backend", requested, BACKENDS)
    if requested == "triton":
        raise ValueError(f"backend: got 'triton', which cannot serve: {_why_no_triton()}")
    if requested == "auto":
        if device.type == "cuda" and not torch.compiler.is_compiling():
            _warn_slow(_why_no_triton())
        return "blockwise"
    return requested


def _why_no_triton() -> str:
    return "this release has no Triton kernels; use 'auto', 'blockwise' or 'eager'"


@functools.cache  # once per process and reason
def _warn_slow(reason: str) -> None:
    warnings.warn(f"densecl_ops runs its 'blockwise' backend on a GPU: {reason}", stacklevel=4)
