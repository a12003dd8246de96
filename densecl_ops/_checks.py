"""Argument checks and normal forms shared by every operation.

Each check names the argument, what came and what was expected. Shapes, dtypes and devices are known to the
host; values are looked at only where the tensor already lives there, so that no check waits for a device.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from densecl_ops._numerics import accumulation_dtype

T = TypeVar("T")

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOWEST_TEMPERATURE = 1e-18  # 1/t^2, a factor of the gradient to t, leaves float32 below 5e-20, the logits below 1e-38


def once(check: Callable[..., T]) -> Callable[..., T]:
    """The check, made once for each kind of its tensors. It may look at everything but values.

    A training loop makes the same few calls again and again. The checks take 25 us.
    """
    passed: dict[Any, T] = {}

    def checked(*arguments: Any) -> T:
        kind = tuple(
            [
                (x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) and not x.is_nested else x
                for x in arguments
            ]
        )
        try:
            found = passed.get(kind)
        except TypeError:  # an argument has the wrong type and no hash: the check says which
            return check(*arguments)
        if found is None:
            if len(passed) >= 256:
                passed.clear()
            found = passed[kind] = check(*arguments)
        return found

    return checked


@functools.cache  # once per process
def warn_once(message: str, stacklevel: int) -> None:
    warnings.warn(message, stacklevel=stacklevel)


def shape_of(tensor: Tensor) -> str:
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


def require_dtype(dtypes: tuple[torch.dtype, ...], expected: str, name: str, value: object) -> Tensor:
    tensor = require_tensor(name, value)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {expected}")
    return tensor


require_float = functools.partial(require_dtype, FLOAT_DTYPES, "float16, bfloat16, float32 or float64")
require_real = functools.partial(require_dtype, FLOAT_DTYPES + INTEGER_DTYPES, "a float or integer dtype")
require_integer = functools.partial(require_dtype, INTEGER_DTYPES, "an integer dtype such as int64")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {shape_of(tensor)}, expected {shape}")


def require_same_device(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, expected {reference.device}, where {reference_name} is"
        )


def require_values(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: got a tensor on meta, expected a device that holds values")


def find_length(rows: Tensor) -> float | None:
    """The length of a row that is neither a unit row nor zero, or None; 1% is more than bfloat16 rounds away."""
    lengths = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=accumulation_dtype(rows))
    if len(lengths) and all(0.99 <= float(bound) <= 1.01 for bound in torch.aminmax(lengths)):  # the usual case
        return None
    other = lengths[((lengths - 1).abs() > 0.01) & (lengths != 0)]
    return float(other[0]) if len(other) else None


def _shown(value: object) -> str:
    """As an error shows a value: to print a tensor's would wait for its device."""
    return f"a tensor of shape {shape_of(value)}" if isinstance(value, Tensor) else repr(value)


def require_bool(name: str, value: object) -> bool:
    """A flag; "no", 0 and None are refused rather than taken for what Python makes of them."""
    if value is True or value is False:
        return value
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's, and that before numpy 2
        raise TypeError(f"{name}: got {_shown(value)}, expected a bool")
    return bool(value)


def require_positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):  # numpy's are, tensors not
        raise TypeError(f"{name}: got {_shown(value)}, expected an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return int(value)


def require_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {_shown(value)}, expected a number")
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
        warn_once(f"{name}: got one above 1, which hardly tells negatives apart; was 1 / t meant for t?", 4)
    return number


def require_cosine(name: str, value: object) -> float | None:
    if value is None:
        return None
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


def require_one_each(
    dtypes: tuple[torch.dtype, ...], expected: str, name: str, value: object, shape: tuple[int, ...], *reference: Any
) -> Tensor:
    """A tensor of such a dtype and the given shape, on the device of the reference, (its name, tensor)."""
    tensor = require_dtype(dtypes, expected, name, value)
    require_shape(name, tensor, shape)
    require_same_device(name, tensor, *reference)
    return tensor


require_index = functools.partial(require_one_each, INTEGER_DTYPES, "an integer dtype such as int64")
require_mask = functools.partial(require_one_each, (torch.bool,), "torch.bool")
require_weight = functools.partial(
    require_one_each, (*FLOAT_DTYPES, torch.bool), "float16, bfloat16, float32, float64 or bool"
)


def require_range(name: str, index: Tensor, size: int) -> None:
    """Values within [0, size), to be asked where looking waits for no device.

    Elsewhere torch's own gather traps, and the Triton kernels give the row NaN; an `exclude` out of range excludes
    nothing.
    """
    low, high = torch.aminmax(index)
    first, last = int(low), int(high)
    if first < 0 or last >= size:
        hint = ""
        if first == -1:
            hint = "; a position without a match is one that `valid` leaves out"
            hint = "; leave it out to exclude nothing" if name == "exclude" else hint
        raise ValueError(f"{name}: got values from {first} to {last}, expected them within 0 to {size - 1}{hint}")
