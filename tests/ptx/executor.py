"""In place of a GPU: launches of Triton kernels on CPU tensors compile for it and run instruction by instruction.

Inside of `installed()` the library believes in a device. Every launch of a kernel then compiles by Triton's own binder,
with the library's own table of tiles. What comes out is executed and checked (core.cpp).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from ptx.program import Program, build
from torch import Tensor

from benchmarks.kernels import in_place_of

TARGET = int(os.environ.get("PTX_TARGET", "90"))  # 80 or 90
STATS = ("count", "lanes", "sectors", "bytes", "waves", "ideal")  # of every instruction, in the order of core.cpp


class FaultError(AssertionError):
    """What the checks of core.cpp found."""


class Launch(NamedTuple):
    """What one launch did; `stats` has a row per instruction and a column for each of STATS."""

    program: Program
    name: str
    grid: tuple[int, ...]
    warps: int
    stats: np.ndarray
    compiled: Any = None


LAUNCHES: list[Launch] = []
EDITS: list[Callable[[str, str], str]] = []  # of the name and the PTX of a kernel: how tests plant faults there
REVERSED: list[bool] = []  # not empty: warps and programs run in the opposite order
_CORE = build()
_programs: dict[str, Program] = {}


def execute(
    program: Program,
    arguments: list[Any],
    grid: tuple[int, ...],
    warps: int,
    shared: int,
    tensors: list[tuple[str, int, int, bool]],
    maps: list[tuple[int, ...]],
) -> Launch:
    """Runs a whole grid.

    Args:
        program: The kernel.
        arguments: In the order of its parameters: numbers, addresses, and the places of tensor maps in `maps`.
        grid: Programs along each axis.
        warps: Of each program.
        shared: Bytes of shared memory of each program.
        tensors: (name, first address, address past the end, whether the kernel may write it).
        maps: (address, columns, rows, bytes of a row, columns and rows of a box, bytes of an element, swizzle).
    """
    grid = (*grid, 1, 1)[:3]
    ops, operands = np.array(program.ops, np.int32), np.array(program.operands, np.int32)
    registers, special = program.template(arguments), np.array(program.spec, np.int32)
    stats = np.zeros((len(ops), len(STATS)), np.int64)
    writers = [np.zeros(high - low if writable else 0, np.uint32) for _, low, high, writable in tensors]
    ranges = np.array(
        [
            (low, high, x.ctypes.data if may else 0, may)
            for (_, low, high, may), x in zip(tensors, writers, strict=True)
        ],
        np.uint64,
    )
    boxes = np.array(maps, np.int64).reshape(-1, 8)
    message = ctypes.create_string_buffer(1 << 16)

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return array.ctypes.data_as(ctypes.c_void_p)

    faults = _CORE.ptx_run(
        pointer(ops), len(ops), pointer(operands), pointer(registers), program.size, pointer(special), warps,
        ctypes.c_uint(shared), *grid, pointer(ranges), len(tensors), pointer(boxes), pointer(stats), message,
        len(message), int(bool(REVERSED)),
    )  # fmt: skip
    if faults:
        lines = []
        for line in message.value.decode().splitlines():
            found = re.match(r"@(\d+) (.*)", line)
            assert found is not None
            at, said = int(found[1]), re.sub(r"tensor #(\d+)", lambda x: f"tensor {tensors[int(x[1])][0]}", found[2])
            lines.append(f"{program.name}: {said} | {program.sources[at][:110]} | {program.places[at]}")
        raise FaultError("\n".join([f"{faults} faults", *lines]))
    return Launch(program, program.name, grid, warps, stats)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address, and address past the end."""
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return tensor.data_ptr(), tensor.data_ptr() + (span + 1) * tensor.element_size()


def _map(descriptor: Any) -> tuple[int, ...]:
    base, size = descriptor.base, descriptor.base.element_size()
    rows, columns = descriptor.block_shape
    swizzle = next((i for i in (3, 2, 1) if columns * size >= 16 << i), 0)
    box = (min(columns, 128 // size), rows)
    return base.data_ptr(), *descriptor.shape[::-1], descriptor.strides[0] * size, *box, size, swizzle


@contextmanager
def installed() -> Iterator[None]:
    """Launches of Triton kernels on CPU tensors compile for sm_<TARGET> and run in the executor."""
    from triton.runtime import jit
    from triton.tools.tensor_descriptor import TensorDescriptor

    compile_only = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        names = self.signature.parameters
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names}).arguments
        written = set(re.findall(r"(\w+_ptr),  # out ", self.src))  # the convention of every kernel's signature
        text = kernel.asm["ptx"]
        for edit in EDITS:
            text = edit(self.__name__, text)
        if text not in _programs:
            _programs[text] = Program(text)
        program = _programs[text]
        arguments: list[Any] = []
        tensors, maps = [], []
        for name, kind in kernel.src.signature.items():
            value = bound[name]
            if kind == "constexpr":
                continue
            if isinstance(value, TensorDescriptor):
                tensors.append((name, *_extent(value.base), False))
                arguments += [len(maps), *value.shape, *value.strides]
                maps.append(_map(value))
            elif isinstance(value, Tensor):
                tensors.append((name, *_extent(value), name in written))
                arguments.append(value.data_ptr())
            else:
                arguments.append(value)
        arguments += [0] * (len(program.params) - len(arguments))  # scratch memory, which no kernel here asks for
        grid = grid(bound) if callable(grid) else grid
        memory = kernel.metadata.shared
        launch = execute(program, arguments, grid, kernel.metadata.num_warps, memory, tensors, maps)
        LAUNCHES.append(launch._replace(compiled=kernel))
        return kernel

    with in_place_of(f"sm_{TARGET}", run):
        yield
