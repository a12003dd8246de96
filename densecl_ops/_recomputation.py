"""A loss that is computed again (activation checkpointing) must meet the negatives that it met the first time.

torch recomputes in two ways. The non-reentrant one keeps the autograd nodes of the first computation and hands them
what the second one saves: `guard` compares the two. The reentrant one computes first without gradients, and again
inside a backward pass: `note_call` and `note_run` compare what the queue was at both times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from densecl_ops._checks import is_plain

_MESSAGE = (
    "negatives: got a queue that was written after the loss and before the loss was computed again (activation "
    "checkpointing), which would give another gradient; call enqueue after backward(), or leave the loss out of the "
    "checkpoint"
)


def guard(loss: Tensor, negatives: Tensor) -> Tensor:
    """The loss, whose backward raises if it was recomputed after the negatives had been written in place."""
    if torch.compiler.is_compiling() or not loss.requires_grad or not _has_version(negatives):
        return loss
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:  # nobody recomputes what is saved
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
    """Versions of a tensor of negatives when losses read it outside of backward passes."""

    pending: int | None = None  # oldest read that may be the first half of a reentrant checkpoint
    last: int | None = None


_all_reads = WeakIdKeyDictionary()  # by storage: slices of a queue share its memory and its version


def note_call(negatives: Tensor) -> None:
    """To be called for every loss in eager mode.

    Raises:
        RuntimeError: This loss recomputes one of a reentrant checkpoint, and the negatives were written in between.
    """
    if not _has_version(negatives):
        return
    reads = _reads_of(negatives)
    if not in_backward():
        recomputed = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if recomputed and reads.pending is None:
            reads.pending = negatives._version
    elif torch._C._autograd._top_saved_tensors_default_hooks(True) is None:  # with hooks `guard` knows better
        pending, reads.pending = reads.pending, None
        if pending not in (None, negatives._version):
            raise RuntimeError(_MESSAGE)


def note_run(negatives: Tensor) -> None:
    """To be called where the loss is computed, also by compiled code, which knows neither gradients nor hooks.

    Raises:
        RuntimeError: In a backward pass, the negatives are not what the last loss before it read.
    """
    if not _has_version(negatives):
        return
    reads = _reads_of(negatives)
    if not in_backward():
        reads.last = negatives._version
    elif reads.last not in (None, negatives._version):
        raise RuntimeError(_MESSAGE)


def _reads_of(negatives: Tensor) -> _Reads:
    reads: _Reads = _all_reads.setdefault(negatives.untyped_storage(), _Reads())  # type: ignore[no-untyped-call]
    return reads


def in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _has_version(tensor: Tensor) -> bool:
    return is_plain(tensor) and not tensor.is_inference()
