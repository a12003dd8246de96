"""A loss that is computed again (activation checkpointing) must meet the negatives that it met the first time.

torch recomputes in two ways. The non-reentrant one keeps the autograd nodes of the first computation and hands them
what the second one saves: `guard` compares the two. The reentrant one computes first under no_grad, and again inside a
backward pass: `note` counts the first computations that met the negatives as they are now, which a backward pass may
each repeat once. Whatever else was computed before, as in validation, does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    "negatives: got a queue that was written after the loss and before the loss was computed again (activation "
    "checkpointing), which would give another gradient; call enqueue after backward(), or leave the loss out of the "
    "checkpoint"
)


def guard(loss: Tensor, negatives: Tensor) -> Tensor:
    """The loss, whose backward raises if it was recomputed after the negatives had been written in place."""
    if not loss.requires_grad or not _is_saved_by_hooks() or negatives.is_inference():
        return loss
    guarded: Tensor = _Guard.apply(loss, negatives._version)  # type: ignore[no-untyped-call]
    return guarded


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, version: int) -> Tensor:
        ctx.version = version  # stays that of the first computation; the saved tensor becomes that of the last
        ctx.save_for_backward(torch.tensor(version, device="cpu"))
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (version,) = ctx.saved_tensors
        if int(version) != ctx.version:
            raise RuntimeError(_MESSAGE)
        return grad, None


class _Reads:
    """Of one version of the negatives: first computations, and those that the backward pass under way has repeated."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.firsts = self.repeats = 0
        self.backward_pass = -1


def note(negatives: Tensor) -> None:
    """To be called for every loss in eager mode.

    Raises:
        RuntimeError: This loss recomputes one of a reentrant checkpoint, and the negatives were written in between.
    """
    recomputes = torch.is_grad_enabled()  # as a reentrant checkpoint does; a hook that logs a loss does not
    if recomputes != in_backward() or negatives.is_inference() or torch.is_inference_mode_enabled():
        return
    if not recomputes or not _is_saved_by_hooks():  # with hooks `guard` knows better
        _compare(negatives, recomputes)


def note_compiled(negatives: Tensor) -> None:
    """To be called where compiled code computes the loss: there neither gradients nor hooks are known.

    Raises:
        RuntimeError: As `note` does.
    """
    if not negatives.is_inference():
        _compare(negatives, in_backward())


def _compare(negatives: Tensor, recomputes: bool) -> None:
    # Kept on the storage, which slices of a queue share as they share its version, and which torch keeps with its
    # attributes for as long as the memory is used.
    known = negatives.untyped_storage().__dict__
    reads: _Reads | None = known.get("_densecl_ops_reads")
    if not recomputes:
        if reads is None or reads.version != negatives._version:
            reads = known["_densecl_ops_reads"] = _Reads(negatives._version)
        reads.firsts += 1
    elif reads is not None:
        backward_pass = torch._C._current_graph_task_id()
        if reads.backward_pass != backward_pass:
            reads.backward_pass, reads.repeats = backward_pass, 0
        reads.repeats += 1
        if reads.version != negatives._version or reads.repeats > reads.firsts:
            raise RuntimeError(_MESSAGE)


def in_backward() -> bool:
    """Whether a backward pass calls. It has a number; torch has no public question for it."""
    return bool(torch._C._current_graph_task_id() != -1)


def _is_saved_by_hooks() -> bool:
    """Whether torch.autograd.graph.saved_tensors_hooks are on, as in a checkpoint; torch tells in private only."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
