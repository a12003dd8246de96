"""What runs a call: values alone, or a compiler, torch.func, a mode. Operators, which those see as one opaque node."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_traced(tensor: Tensor) -> bool:
    """Whether more than values runs a call: a compiler, torch.func, torch.jit.trace, a mode, a fake tensor.

    One question for a whole call. torch tells compilers alone in public; of the others two stacks do.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.get_interpreter_stack() is not None
        or (type(tensor) is not Tensor and hasattr(tensor, "fake_mode"))
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes them; asked without importing torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def inside_func() -> bool:
    """Whether torch.func runs the call. Its vmap hides who asks for a gradient: there every tensor may."""
    return not torch.compiler.is_compiling() and bool(transforms())


def transforms() -> list[str]:
    """What torch.func has under way, outermost first: "Grad", "Jvp", "Vmap"."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]


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


def operator(
    name: str,
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    when_traced: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Registers a function as the operator densecl_ops::`name`; the result is called as the function is.

    Compilers, fake tensors, torch.func and dispatch modes see the operator: traced, the tile loops of a backend would
    unroll. Eager calls go to the function itself, since a registered operator costs them some 60 us of host time.

    All take the same arguments: `fake` returns empty tensors like the results, which alias no argument; `flops` counts
    the products' operations for FlopCounterMode; the registered operator alone calls `when_traced` first. Of several
    results some may be None, which the registered operator returns as (0,).
    """

    def tensors(function: Callable[..., Any], *arguments: Any) -> Any:
        found = function(*arguments)
        if isinstance(found, Tensor):
            return found
        return tuple(arguments[0].new_empty(0) if x is None else x for x in found)

    def traced(*arguments: Any) -> Any:
        if when_traced is not None:
            when_traced(*arguments)
        return tensors(body, *arguments)

    registered = torch.library.custom_op(f"densecl_ops::{name}", traced, mutates_args=(), schema=schema)
    registered.register_fake(functools.partial(tensors, fake))
    registered.register_vmap(functools.partial(_one_by_one, registered))
    packet = getattr(torch.ops.densecl_ops, name)

    def call(*arguments: Any) -> Any:
        if not is_traced(arguments[0]):
            return body(*arguments)
        if flops is not None and not torch.compiler.is_compiling():
            _tell_flop_counters(packet, flops)
        return registered(*arguments)

    return call


def _tell_flop_counters(packet: Any, flops: Callable[..., int]) -> None:
    """To those that count this call. torch's register_flop_formula would import triton with this package."""
    for i in range(torch._C._len_torch_dispatch_stack()):
        mode = torch._C._get_dispatch_stack_at(i)
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if registry is not None:
            registry.setdefault(packet, lambda *arguments, out_val: flops(*arguments))


@torch.no_grad()  # no operator has a gradient of its own, for which torch would ask under grad of vmap
def _one_by_one(registered: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """The operator for torch.vmap: a loop over the mapped dimension."""
    results = []
    for i in range(info.batch_size):
        chosen = (x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True))
        results.append(registered(*chosen))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
