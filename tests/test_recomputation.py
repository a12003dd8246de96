"""Activation checkpointing computes the loss again: with the same negatives, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from densecl_ops import DenseInfoNCELoss, MomentumQueue

Wrap = Callable[..., Tensor]
non_reentrant, reentrant = (partial(checkpoint, use_reentrant=reentrant) for reentrant in (False, True))
compiling = partial(torch.compile, backend="aot_eager")
WRAPS: dict[str, Wrap] = {
    "non-reentrant": non_reentrant,
    "reentrant": reentrant,
    "compiled": lambda f, *args: compiling(lambda *x: non_reentrant(f, *x))(*args),
    "compiled inside": lambda f, *args: non_reentrant(compiling(f), *args),
    "compiled inside of reentrant": lambda f, *args: reentrant(compiling(f), *args),
}


def directly(f: Any, *args: Any) -> Tensor:
    return f(*args)


def gradient(backend: str, wrap: Wrap, enqueue: str, losses: int = 1, steps: int = 3) -> Tensor:
    """The query's gradient in the last step; `enqueue` "before" or "after" backward()."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 16, 3, 3).double()
    query.requires_grad_()
    queue, criterion = MomentumQueue(32, 16, dtype=torch.float64), DenseInfoNCELoss(backend=backend)
    for _ in range(steps):
        query.grad = None
        total = torch.zeros((), dtype=torch.float64)
        for i in range(losses):
            total = total + wrap(criterion, query * (i + 1.0) + key, key, queue)
            if enqueue == "before" and i < max(1, losses - 1):  # the last of several losses is followed by none
                queue.enqueue(key.mean((2, 3)) * (i + 1.0))
        total.backward()
        if enqueue == "after":
            queue.enqueue(key.mean((2, 3)))
    return query.grad


@pytest.mark.parametrize("how", WRAPS)
def test_enqueue_after_and_before_backward(backend: str, how: str) -> None:
    assert_close(gradient(backend, WRAPS[how], "after"), gradient("eager", directly, "after"), 1e-12)
    # Compiled as a whole, the checkpoint saves the queue itself, and torch's own check of it raises.
    words = "modified by an inplace operation" if how == "compiled" else r"call enqueue after backward\(\), or leave"
    with pytest.raises(RuntimeError, match=words):
        gradient(backend, WRAPS[how], "before")
    # The last loss has seen the queue as it is in backward(), the first has not.
    with pytest.raises(RuntimeError, match=words):
        gradient(backend, WRAPS[how], "before", losses=2, steps=1)


def test_without_a_checkpoint_the_queue_may_change_before_backward(backend: str) -> None:
    assert_close(gradient(backend, directly, "before"), gradient(backend, directly, "after"), 1e-12)


@pytest.mark.parametrize(
    "part", [lambda rows: rows, lambda rows: rows[:4], lambda rows: rows.detach(), lambda rows: rows[1::2]]
)
@pytest.mark.parametrize("wrap", [non_reentrant, reentrant])
def test_rows_and_parts_of_a_queue_are_checked_too(backend: str, wrap: Wrap, part: Any) -> None:
    """Every call makes another tensor of them; memory and version are the queue's."""
    query, key, queue = torch.randn(2, 16, requires_grad=True), torch.randn(2, 16), MomentumQueue(8, 16)
    # not an argument of the checkpoint, which would check it itself
    loss = wrap(lambda q: DenseInfoNCELoss(backend=backend)(q, key, part(queue.rows)), query)
    queue.enqueue(key)
    with pytest.raises(RuntimeError, match="call enqueue after backward"):
        loss.backward()


@pytest.mark.parametrize("wrap", [non_reentrant, reentrant])
def test_keys_never_enter_twice(wrap: Wrap) -> None:
    """A checkpoint around a forward() that enqueues would run it again inside backward()."""
    queue, query = MomentumQueue(8, 16), torch.randn(2, 16, requires_grad=True)

    def forward(q: Tensor) -> Tensor:
        queue.enqueue(q.detach())
        return q.square().sum()

    loss = wrap(forward, query)
    with pytest.raises(RuntimeError, match="enqueue outside of the checkpoint"):
        loss.backward()
    assert int(queue.position) == 2


class Model:
    """A loss of one query beside a queue, and what a trainer may do with it beside its step."""

    def __init__(self) -> None:
        self.query, self.key = torch.randn(2, 16, requires_grad=True), torch.randn(2, 16)
        self.queue = MomentumQueue(8, 16)

    def loss(self, query: Tensor | None = None) -> Tensor:
        return DenseInfoNCELoss()(self.query if query is None else query, self.key, self.queue)

    def log(self) -> None:
        with torch.no_grad():
            self.loss()

    def infer(self) -> None:
        with torch.inference_mode():
            self.loss()

    def train(self) -> None:
        self.loss().backward()

    def checkpoint(self) -> None:
        reentrant(self.loss, torch.randn(2, 16, requires_grad=True))

    def enqueue(self) -> None:
        self.queue.enqueue(self.key)

    def do(self, acts: str) -> None:
        for act in acts.split():
            getattr(self, act)()


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant", "compiled inside of reentrant"])
def test_backward_twice(how: str) -> None:
    """Not of compiled code itself, whose buffers a compiler may reuse in its first backward pass."""
    model = Model()
    loss = WRAPS[how](DenseInfoNCELoss(), model.query, model.key, model.queue)
    for retain in (True, False):
        loss.backward(retain_graph=retain)


@pytest.mark.parametrize("before", ["", "log", "log enqueue", "infer enqueue"])
@pytest.mark.parametrize("between", ["", "log"])
@pytest.mark.parametrize("after", ["log enqueue", "train enqueue"])
@pytest.mark.parametrize("losses", [1, 2])
@pytest.mark.parametrize("wrap", [reentrant, non_reentrant])
def test_other_losses_are_no_first_halves(wrap: Wrap, losses: int, before: str, between: str, after: str) -> None:
    """Validation, logging and other training, before, within and after a step whose keys enter after backward()."""
    model = Model()
    for _ in range(3):
        model.do(before)
        totals = [wrap(model.loss, model.query) for _ in range(losses)]
        model.do(between)
        for total in totals:  # gradient accumulation: each has a backward pass of its own
            total.backward()
        model.do(after)


@pytest.mark.parametrize("before", ["log", "log enqueue"])
@pytest.mark.parametrize("between", ["", "log", "checkpoint"])
def test_a_fault_beside_other_losses_raises(before: str, between: str) -> None:
    model = Model()
    model.do(before)
    total = reentrant(model.loss, model.query)
    model.do(f"enqueue {between}")
    with pytest.raises(RuntimeError, match="call enqueue after backward"):
        total.backward()


@pytest.mark.parametrize("act", ["log", "loss"])
@pytest.mark.parametrize("wrap", [directly, reentrant])
def test_a_backward_hook_may_log_a_loss(wrap: Wrap, act: str) -> None:
    """In MoCo's own order, where the queue is no more what a validation before saw."""
    model, logged = Model(), []
    model.query.register_hook(lambda _: logged.append(model.do(act)))
    model.log()
    for _ in range(2):
        loss = model.loss(wrap(torch.tanh, model.query))
        model.enqueue()
        loss.backward()
    assert len(logged) == 2


def test_a_caller_may_delete_its_ctx() -> None:
    def validate(ctx: Any) -> None:
        del ctx  # as a Function does that has no use for it
        Model().log()

    validate(None)
