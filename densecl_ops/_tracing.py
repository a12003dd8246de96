"""How a call is run, which decides what it may do: look at values, call a backend directly, save for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


def inside_func() -> bool:
    """Whether torch.func runs the call. Its vmap hides who asks for a gradient: there every tensor may."""
    return not torch.compiler.is_compiling() and torch._C._functorch.get_interpreter_stack() is not None


def host_may_look(tensor: Tensor) -> bool:
    """Whether reading values waits for no device and, under torch.compile, breaks no graph."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def outside_inference(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors that autograd may save: one made under inference_mode is copied once that mode is left."""
    if torch.compiler.is_dynamo_compiling() or torch.is_inference_mode_enabled():
        return tensors
    return tuple([x.clone() if x is not None and x.is_inference() else x for x in tensors])
