"""Which implementation serves a call."""

import functools
import importlib
import re
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _triton
from densecl_ops._checks import require_choice, warn_once
from densecl_ops._types import BACKENDS

HAS_TRITON = find_spec("triton") is not None  # looked up here, imported at need: that costs half a second
WIDEST = 512
OLDEST_TRITON = (3, 6)  # the oldest that the kernels were compiled with
KERNEL_DEVICES = ("cuda",)  # ROCm devices, too; tests add "cpu", where they execute what was compiled


def choose(requested: str, tensor: Tensor, dtype: torch.dtype, channels: int, traced: bool = False) -> str:
    """Turns a `backend` argument into "eager", "blockwise", "triton", or "auto" for triton if it can.

    `tensor` tells the device and `dtype` is that of the accumulation. The loss gives its `channels`, since its kernels
    hold whole rows; the matching 0. `traced` is as `is_traced` says of the call.
    """
    require_choice("backend", requested, BACKENDS)
    if requested == "auto" and tensor.device.type != "cuda":  # torch calls ROCm devices cuda too
        return "blockwise"
    if requested in ("eager", "blockwise"):
        return requested
    obstacle = triton_obstacle(tensor, dtype, channels, traced)
    if requested == "triton":
        if obstacle is not None:
            raise ValueError(f"backend: got 'triton', which cannot serve this call: {obstacle}")
        return "triton"
    if obstacle is None:
        return "auto"
    if not torch.compiler.is_compiling():
        _warn_slow(obstacle)
    return "blockwise"


def triton_obstacle(tensor: Tensor, dtype: torch.dtype, channels: int = 0, traced: bool = False) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if tensor.device.type not in KERNEL_DEVICES:
        return f"it runs on CUDA and ROCm devices, not on {tensor.device.type}"
    if not HAS_TRITON:
        return "the triton package is not installed (pip install 'densecl-ops[triton]')"
    import triton  # its distributions have many names

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < OLDEST_TRITON:
        return "it needs triton {}.{}, and {}.{} is installed".format(*OLDEST_TRITON, *version)
    # Code being traced cannot ask the device: there the launchers refuse it, with the same words.
    if not traced:
        architecture = _triton.describe(tensor.device).architecture
        if architecture not in _triton.FAMILIES:
            return _triton.unknown(architecture)
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if channels > WIDEST:
        return f"its kernels hold rows of up to {WIDEST} channels, not {channels}"
    return None


def call(backend: str, operation: str, function: str, query: Tensor, dtype: torch.dtype, *arguments: Any) -> Any:
    """Calls a function of the backend that `choose` chose, with autocast off; inside the operators, compiled or not.

    Under "auto", kernels that do not compile or launch are a warning with the reason, and the blockwise backend serves
    this call and, without another try, every later one of its kind: for `dtype` (of the products) and the channels of
    `query`, which also tells the device. Under "triton" the error is raised.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return call(backend, operation, function, query, dtype, *arguments)
    if backend != "auto":
        return getattr(_module(operation, backend), function)(*arguments)
    kind = (f"{operation}.{function}", dtype, f"{query.shape[1]} channels")
    if kind not in _failed:
        try:
            return getattr(_module(operation, "triton"), function)(*arguments)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # the compiler, its assembler, the driver: each has its own
            if isinstance(error, RuntimeError) and _SYMPTOMS.search(str(error)):
                raise
            _failed.add(kind)
            line = " ".join(str(error).split())
            line = line if len(line) <= 300 else f"{line[:100]} ... {line[-200:]}"  # it can be a whole program
            _warn_slow(
                f"its kernels failed ({', '.join(map(str, kind))}): {type(error).__name__}: {line}; "
                "backend='triton' raises this error, and python -m densecl_ops.selftest tries every kernel"
            )
    return getattr(_module(operation, "blockwise"), function)(*arguments)


@functools.cache
def _module(operation: str, backend: str) -> ModuleType:
    """Imported on first use: the kernels need the triton package."""
    return importlib.import_module(f"densecl_ops.{operation}.{'triton_launch' if backend == 'triton' else backend}")


# What is no fault of the kernels, in the driver's words; torch has types for it, Triton a RuntimeError. Another call
# may well succeed (no memory was free), or none can (an earlier kernel, also a user's own, has failed since).
_SYMPTOMS = re.compile(
    "out of memory|(cuda|hip) error|illegal (memory access|address|instruction)|misaligned address"
    "|invalid program counter|device-side assert|launch (failure|timed out)|ecc error",
    re.IGNORECASE,
)
_failed: set[tuple[object, ...]] = set()


def _warn_slow(reason: str) -> None:
    warn_once(f"densecl_ops runs its slower 'blockwise' backend on a GPU: {reason}", 5)
