"""A loss that is computed again (activation checkpointing) must meet the negatives that it met the first time.

torch recomputes in two ways. The non-reentrant one keeps the autograd nodes of the first computation and hands them
what the second one saves: a node of ours keeps the version of the negatives and saves it, and `compare` sees whether
they differ. The reentrant one is an autograd.Function, which computes first in its forward(), under no_grad, and again
in its backward(): `note` leaves the version of the negatives with the ctx of such a Function.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_MESSAGE = (
    "negatives: got a queue that was written after the loss and before the loss was computed again (activation "
    "checkpointing), which would give another gradient; call enqueue after backward(), or leave the loss out of the "
    "checkpoint"
)


def version_of(negatives: Tensor) -> Tensor | None:
    """For a node of autograd, which keeps it as it is and saves it as tensors are saved; None where it has none."""
    return None if negatives.is_inference() else torch.full((), negatives._version, dtype=torch.int64, device="cpu")


def compare(kept: Tensor | None, saved: Tensor | None) -> None:
    """In the node's backward(): raises if the negatives were written between the first and the last computation."""
    if kept is not None and saved is not None and int(kept) != int(saved):
        raise RuntimeError(_MESSAGE)


class Guard(torch.autograd.Function):
    """Passes on a loss that has no node of ours: loss, version -> loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, version: Tensor | None) -> Tensor:
        ctx.version = version
        ctx.save_for_backward(version)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        compare(ctx.version, *ctx.saved_tensors)
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def note(negatives: Tensor) -> None:
    """For every loss in eager mode: raises if it recomputes one of a reentrant checkpoint beside other negatives."""
    first = torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1  # as in_backward() asks
    if first or torch.is_inference_mode_enabled() or negatives.is_inference():
        return
    memory = negatives.untyped_storage().data_ptr()  # slices of a queue share it, as they share its version
    frame = inspect.currentframe()
    while frame is not None:  # torch does not tell inside of which Function it is; 60 frames take 3 us
        code = frame.f_code
        of_function = code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",)
        if of_function and isinstance(ctx := frame.f_locals.get("ctx"), FunctionCtx):
            versions = ctx.__dict__.setdefault("_densecl_ops_versions", {})
            first = versions.setdefault(memory, negatives._version)
            if first != negatives._version and code.co_name == "backward":
                raise RuntimeError(_MESSAGE)
        frame = frame.f_back


def note_compiled(negatives: Tensor) -> None:
    """The same where compiled code computes the loss: there neither gradients nor hooks are known.

    It counts the first computations that met the negatives as they are now, and the repeats. A backward pass may repeat
    each once. Where one that met the negatives before was never repeated, it may be what is repeated now: then all
    passes together may repeat each once.
    """
    if negatives.is_inference():
        return
    # Kept on the storage, which torch keeps with its attributes for as long as the memory is used.
    known = negatives.untyped_storage().__dict__
    reads = known.get("_densecl_ops_reads")
    if not in_backward():
        if reads is None or reads.version != negatives._version:
            missed = reads is not None and reads.repeats < reads.firsts
            reads = SimpleNamespace(version=negatives._version, missed=missed, firsts=0, repeats=0, passed=0, task=-1)
            known["_densecl_ops_reads"] = reads
        reads.firsts += 1
    elif reads is not None:
        task = torch._C._current_graph_task_id()
        if reads.task != task and not reads.missed:
            reads.task, reads.passed = task, reads.repeats
        reads.repeats += 1
        if reads.version != negatives._version or reads.repeats - reads.passed > reads.firsts:
            raise RuntimeError(_MESSAGE)


def in_backward() -> bool:
    """Whether a backward pass calls. It has a number; torch has no public question for it."""
    return bool(torch._C._current_graph_task_id() != -1)
