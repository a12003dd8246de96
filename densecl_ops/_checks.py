"""Argument checks and normal forms shared by every operation.

Each check names the argument, what came and what was expected. Shapes, dtypes and devices are known to the
host; values are looked at only where the tensor already lives there, so that no check waits for a device.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from einops import einsum, reduce
from torch import Tensor

from densecl_ops._numerics import accumulation_dtype, no_autocast

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOWEST_TEMPERATURE = 1e-18  # 1/t^2, a factor of the gradient to t, leaves float32 below 5e-20, the logits below 1e-38


Fields = tuple[torch.Size, torch.dtype, torch.device]  # of a Look


class Look(NamedTuple):
    """What the host knows of a tensor without its values, for the checks of a whole call: one look at each tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def look(name: str, value: object) -> Fields:
    """The fields of a Look. A bare tuple: it is made for each tensor of each call, a Look for the first of a kind."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        require_tensor(name, value)  # says what it is
    return value.shape, value.dtype, value.device  # type: ignore[attr-defined]


def shape_of(tensor: Tensor | Look) -> str:
    return str(tuple(tensor.shape))


def require_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        hint = "; pick one of its tensors" if any(isinstance(item, Tensor) for item in items) else ""
        if hasattr(value, "last_hidden_state"):
            hint = "; of a transformers output take .last_hidden_state[:, 1:].transpose(1, 2)"
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor{hint}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: got a {kind} tensor, expected a dense one")
    return value


def require_float(name: str, value: object) -> Tensor:
    tensor = require_tensor(name, value)
    require_float_dtype(name, tensor)
    return tensor


def require_float_dtype(name: str, tensor: Tensor | Look) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64")


def require_real(name: str, value: object) -> Tensor:
    tensor = require_tensor(name, value)
    if tensor.dtype not in FLOAT_DTYPES + INTEGER_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected a float or integer dtype")
    return tensor


def require_integer(name: str, value: object) -> Tensor:
    tensor = require_tensor(name, value)
    require_integer_dtype(name, tensor)
    return tensor


def require_integer_dtype(name: str, tensor: Tensor | Look) -> None:
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected an integer dtype such as int64")


def require_shape(name: str, tensor: Tensor | Look, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {shape_of(tensor)}, expected {shape}")


def require_same_device(name: str, tensor: Tensor | Look, reference_name: str, reference: Tensor | Look) -> None:
    if tensor.device != reference.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, expected {reference.device}, where {reference_name} is"
        )


def require_map(name: str, x: Tensor | Look) -> tuple[int, int, int]:
    """(B, C, P) of a (B, C, H, W) map, a (B, C, P) sequence or a (B, C) vector."""
    require_float_dtype(name, x)
    if len(x.shape) not in (2, 3, 4):
        raise ValueError(f"{name}: got shape {shape_of(x)}, expected (B, C, H, W), (B, C, P) or (B, C)")
    images, channels, *grid = x.shape
    positions = math.prod(grid)
    if images * channels * positions == 0:
        raise ValueError(f"{name}: got an empty tensor of shape {shape_of(x)}, expected every size above 0")
    return images, channels, positions


def flatten(x: Tensor) -> Tensor:
    """The (B, C, P) form of what `require_map` takes.

    A view wherever the strides allow one: channels_last maps and transposed token sequences are not copied.
    """
    if x.ndim == 3:
        return x
    return x.unsqueeze(2) if x.ndim == 2 else x.flatten(2)


def flatten_map(name: str, value: object) -> Tensor:
    """Both of them."""
    tensor = require_tensor(name, value)
    require_map(name, tensor)
    return flatten(tensor)


def require_poolable(name: str, features: Tensor | Look) -> None:
    if len(features.shape) != 4:
        raise ValueError(
            f"{name}: got shape {shape_of(features)}, expected a (B, C, H, W) map, "
            "the only form that grid_size can pool"
        )


def pool_to_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of a (B, C, H, W) map; one that already has the grid passes unchanged.

    A mean over equal cells, or else two small matrix products. torch's own form has no deterministic backward on CUDA.
    """
    height, width = features.shape[2:]
    if (height, width) == grid:
        return features
    if height % grid[0] == 0 and width % grid[1] == 0:
        return reduce(features, "b c (h y) (w x) -> b c h w", "mean", h=grid[0], w=grid[1])
    with no_autocast(features):
        exact = features.to(accumulation_dtype(features))
        down, across = _pooling_matrix(grid[0], height, exact), _pooling_matrix(grid[1], width, exact)
        return einsum(down, exact, across, "h y, b c y x, w x -> b c h w").to(features.dtype)


def _pooling_matrix(cells: int, size: int, like: Tensor) -> Tensor:
    """(cells, size): cell i is the mean from floor(i size / cells) to ceil((i + 1) size / cells), as in torch."""
    cell = torch.arange(cells, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    inside = (position >= cell * size // cells) & (position < ((cell + 1) * size + cells - 1) // cells)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


def require_paired_maps(query_name: str, query: Tensor | Look, key_name: str, key: Tensor | Look) -> None:
    """Two maps of the same images: equal batch, equal channels, one device. Grids may differ."""
    if query.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{key_name}: got {key.shape[0]} images of {key.shape[1]} channels, "
            f"expected {query.shape[0]} of {query.shape[1]} as in {query_name}"
        )
    require_same_device(key_name, key, query_name, query)
    require_values(query_name, query)


def transposed(x: Tensor | Look, channels: int) -> str | None:
    """How to bring x, whose last dimension has so many channels, into the order of the contract; None if it has not."""
    if len(x.shape) not in (3, 4) or x.shape[-1] != channels or x.shape[1] == channels:
        return None
    if len(x.shape) == 3:
        return "(B, P, C) tokens: pass .transpose(1, 2)"
    return "a (B, H, W, C) map: pass .permute(0, 3, 1, 2)"


def require_values(name: str, tensor: Tensor | Look) -> None:
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: got a tensor on meta, expected a device that holds values")


def find_length(rows: Tensor) -> float | None:
    """The length of a row that is neither a unit row nor zero, or None; 1% is more than bfloat16 rounds away."""
    lengths = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=accumulation_dtype(rows))
    if len(lengths) and all(0.99 <= float(bound) <= 1.01 for bound in torch.aminmax(lengths)):  # the usual case
        return None
    other = lengths[((lengths - 1).abs() > 0.01) & (lengths != 0)]
    return float(other[0]) if len(other) else None


def require_bool(name: str, value: object) -> bool:
    """A flag; "no", 0 and None are refused rather than taken for what Python makes of them."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):  # its name before numpy 2
        return bool(value)
    raise TypeError(f"{name}: got {value!r}, expected a bool")


def require_positive_int(name: str, value: object) -> int:
    try:
        if isinstance(value, (bool, Tensor)):  # which index() takes, a tensor by waiting for its device
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # numpy's integers too
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an int") from None
    if number < 1:
        raise ValueError(f"{name}: got {number}, expected at least 1")
    return number


def require_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond 1.8e308
        raise ValueError(f"{name}: got a number too large for a float, expected a finite number") from None
    if not -math.inf < number < math.inf:  # a comparison, which torch.compile can trace where math.isfinite breaks it
        raise ValueError(f"{name}: got {number}, expected a finite number")
    return number


def require_temperature(name: str, value: object) -> float:
    if type(value) is float and LOWEST_TEMPERATURE <= value <= 1:  # the usual case
        return value
    number = require_number(name, value)
    if number <= 0:
        raise ValueError(f"{name}: got {number}, expected a number above 0")
    if number < LOWEST_TEMPERATURE:
        raise ValueError(f"{name}: got {number}, expected at least {LOWEST_TEMPERATURE}")
    if number > 1 and not torch.compiler.is_compiling():
        _warn_of_high(name)
    return number


@functools.cache  # once per process
def _warn_of_high(name: str) -> None:
    warnings.warn(f"{name}: got one above 1, which hardly tells negatives apart; was 1 / t meant for t?", stacklevel=4)


def require_cosine(name: str, value: object) -> float:
    number = require_number(name, value)
    if not -1.0 <= number <= 1.0:
        raise ValueError(f"{name}: got {number}, expected a cosine similarity within -1 to 1")
    return number


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def require_grid_size(name: str, value: object) -> tuple[int, int] | None:
    """None, S (for S x S) or (H, W), a sequence of any kind: a configuration's list is none of Python's."""
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != 2:
            raise ValueError(f"{name}: got {value!r}, expected an int or a pair (height, width)")
        return require_positive_int(name, value[0]), require_positive_int(name, value[1])
    side = require_positive_int(name, value)
    return side, side


def is_traced(tensor: Tensor) -> bool:
    """Whether a call on this tensor is run by something else than its values alone: a compiler, torch.func, a dispatch
    mode (fake tensors, make_fx, FlopCounterMode), or the tensor itself, a fake one.

    One question for a whole call. torch tells compilers alone in public: until it has a word for the others, the
    lengths of two stacks do.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.get_interpreter_stack() is not None
        or (type(tensor) is not Tensor and hasattr(tensor, "fake_mode"))
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes them; asked without importing torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def wants_grad(tensor: Tensor) -> bool:
    """Whether to compute its gradient. Inside torch.func, whose vmap hides who asks for one, always."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return torch._C._functorch.get_interpreter_stack() is not None


def host_may_look(tensor: Tensor) -> bool:
    """Whether reading values waits for no device and, under torch.compile, breaks no graph."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def outside_inference(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors that autograd may save: one made under inference_mode is copied once that mode is left."""
    if torch.compiler.is_dynamo_compiling() or torch.is_inference_mode_enabled():
        return tensors
    for tensor in tensors:
        if tensor is not None and tensor.is_inference():
            return tuple(x.clone() if x is not None and x.is_inference() else x for x in tensors)
    return tensors


def require_index(
    name: str, index: Tensor | Look, shape: tuple[int, ...], reference_name: str, reference: Tensor | Look
) -> None:
    """An integer tensor of the given shape on the device of the reference."""
    require_integer_dtype(name, index)
    require_shape(name, index, shape)
    require_same_device(name, index, reference_name, reference)


def require_range(name: str, index: Tensor, size: int) -> None:
    """Values within [0, size), to be asked where looking waits for no device.

    Elsewhere torch's own gather traps, and the Triton kernels give the row NaN; an `exclude` out of range excludes
    nothing.
    """
    low, high = torch.aminmax(index)
    first, last = int(low), int(high)
    if first < 0 or last >= size:
        hint = "; a position without a match is one that `valid` leaves out" if first == -1 else ""
        raise ValueError(f"{name}: got values from {first} to {last}, expected them within 0 to {size - 1}{hint}")


def require_mask(
    name: str, value: object, shape: tuple[int, ...], reference_name: str, reference: Tensor | Look
) -> Tensor:
    """A bool tensor of the given shape on the device of the reference."""
    mask = require_tensor(name, value)
    require_mask_like(name, mask, shape, reference_name, reference)
    return mask


def require_mask_like(
    name: str, mask: Tensor | Look, shape: tuple[int, ...], reference_name: str, reference: Tensor | Look
) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected torch.bool")
    require_shape(name, mask, shape)
    require_same_device(name, mask, reference_name, reference)
