"""What both Triton backends need of Triton: the device it compiles for, its precision, options of every launch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Architectures the kernels are compiled for in the tests, by the instructions they share, and with them their tiles.
FAMILIES = {
    "sm_80": "mma",
    "sm_86": "mma",
    "sm_89": "mma",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_103": "tcgen05",
    "sm_120": "mma",
    "sm_121": "mma",
    "gfx90a": "mfma",
    "gfx942": "mfma",
    "gfx950": "mfma",
}

# Whether a * b + c becomes one instruction: so by default up to Triton 3.9, which warns, and not from 3.10 on.
OPTIONS = {"enable_fp_fusion": True}


class Device(NamedTuple):
    """A compilation target.

    Attributes:
        architecture: "sm_80", "gfx942", ...
        multiprocessors: How many programs can run side by side, at one per multiprocessor.
    """

    architecture: str
    multiprocessors: int


@functools.cache
def describe(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def family(architecture: str) -> str:
    """The family of an architecture.

    Raises:
        ValueError: No kernel was ever compiled for it.
    """
    if architecture not in FAMILIES:
        raise ValueError(f"backend: {unknown(architecture)}")
    return FAMILIES[architecture]


def unknown(architecture: str) -> str:
    return f"its kernels were never compiled for {architecture}, only for {', '.join(FAMILIES)}"


def strides(prefix: str, stride: tuple[int, ...], dims: str) -> dict[str, int]:
    """Keyword arguments of a kernel: `{prefix}_stride_{dim}`."""
    start = f"{prefix}_stride_" if prefix else "stride_"
    return {start + dim: step for dim, step in zip(dims, stride, strict=True)}


def float32_precision(dtype: torch.dtype, architecture: str) -> str:
    """The `input_precision` of tl.dot that is float32 to its last bit or two; Triton's own default is tf32.

    Three tf32 products on NVIDIA's tensor cores; true float32 has none there and spills at every useful tile.
    """
    return "tf32x3" if dtype == torch.float32 and architecture.startswith("sm_") else "ieee"
