"""How a backend is called: directly in eager mode, as one opaque node where torch traces or transforms the call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from densecl_ops._checks import is_tracing, is_wrapped

Body = TypeVar("Body", bound=Callable[..., Any])


def operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Body], Body]:
    """Registers the decorated function as the operator densecl_ops::`name`; the result is called as the function is.

    Compilers, fake tensors and torch.func see the operator: traced, the tile loops of a backend would unroll. Eager
    calls go to the function itself, since a registered operator costs them some 60 us of host time.

    Args:
        name: Of the operator.
        schema: Its signature in torch's language, `(Tensor x, float? y) -> Tensor`. Results alias no argument.
        fake: Takes the same arguments and returns empty tensors of the results' shapes, dtypes and devices.
    """

    def register(body: Body) -> Body:
        registered = torch.library.custom_op(f"densecl_ops::{name}", body, mutates_args=(), schema=schema)
        registered.register_fake(fake)
        registered.register_vmap(functools.partial(_one_by_one, registered))

        @functools.wraps(body)
        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or is_tracing():
                return registered(*arguments)
            wrapped = any(is_wrapped(x) for x in arguments if isinstance(x, Tensor))
            return registered(*arguments) if wrapped else body(*arguments)

        return call  # type: ignore[return-value]

    return register


def _one_by_one(registered: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """The operator for torch.vmap: a loop over the mapped dimension."""
    results = []
    for i in range(info.batch_size):
        chosen = (x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True))
        results.append(registered(*chosen))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
