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


class Model:
    """A loss of one query beside a queue, and what a trainer may do with it, in and beside its step."""

    def __init__(self, wrap: Wrap = directly, backend: str = "auto") -> None:
        torch.manual_seed(0)
        self.query, self.key = torch.randn(2, 16).double().requires_grad_(), torch.randn(2, 16).double()
        self.queue, self.criterion = MomentumQueue(8, 16, dtype=torch.float64), DenseInfoNCELoss(backend=backend)
        self.wrap, self.losses = wrap, []

    def loss(self, query: Tensor | None = None) -> Tensor:
        return self.criterion(self.query if query is None else query, self.key, self.queue)

    def taken(self) -> list[Tensor]:
        losses, self.losses = self.losses, []
        return losses

    def do(self, acts: str) -> Tensor | None:
        meaning: dict[str, Callable[[], object]] = {
            "forward": lambda: self.losses.append(self.wrap(self.criterion, self.query, self.key, self.queue)),
            "backward": lambda: sum(self.taken()).backward(),
            "accumulate": lambda: [loss.backward() for loss in self.taken()],
            "log": torch.no_grad()(self.loss),
            "infer": torch.inference_mode()(self.loss),
            "loss": self.loss,
            "train": lambda: self.loss().backward(),
            "checkpoint": lambda: reentrant(self.loss, torch.randn(2, 16, requires_grad=True)),
            "enqueue": lambda: self.queue.enqueue(self.key),
        }
        for act in acts.split():
            meaning[act]()
        return self.query.grad


@pytest.mark.parametrize("how", WRAPS)
def test_enqueue_after_and_before_backward(backend: str, how: str) -> None:
    steps = "forward backward enqueue " * 3
    assert_close(Model(WRAPS[how], backend).do(steps), Model(backend="eager").do(steps), 1e-12)
    # Compiled as a whole, the checkpoint saves the queue itself, and torch's own check of it raises; in 2.8 ours does.
    by_torch = how == "compiled" and not torch.__version__.startswith("2.8.")
    words = "modified by an inplace operation" if by_torch else r"call enqueue after backward\(\), or leave"
    # The last of two losses has seen the queue as it is in backward(), the first has not.
    for step in ("forward enqueue backward", "forward enqueue forward backward", "forward enqueue forward accumulate"):
        with pytest.raises(RuntimeError, match=words):
            Model(WRAPS[how], backend).do(step)


@pytest.mark.parametrize(
    "part", [lambda rows: rows, lambda rows: rows[:4], lambda rows: rows.detach(), lambda rows: rows[1::2]]
)
@pytest.mark.parametrize("wrap", [non_reentrant, reentrant])
def test_rows_and_parts_of_a_queue_are_checked_too(backend: str, wrap: Wrap, part: Any) -> None:
    """Every call makes another tensor of them; memory and version are the queue's."""
    model = Model(backend=backend)
    # not an argument of the checkpoint, which would check it itself
    loss = wrap(lambda q: model.criterion(q, model.key, part(model.queue.rows)), model.query)
    model.do("enqueue")
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


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant", "compiled inside of reentrant"])
def test_backward_twice(how: str) -> None:
    """Not of compiled code itself, whose buffers a compiler may reuse in its first backward pass."""
    model = Model(WRAPS[how])
    model.do("forward")
    model.losses[0].backward(retain_graph=True)
    model.do("backward")


@pytest.mark.parametrize("before", ["", "log", "log enqueue", "infer enqueue"])
@pytest.mark.parametrize("between", ["", "log"])
@pytest.mark.parametrize("after", ["log enqueue", "train enqueue"])
@pytest.mark.parametrize("losses", ["forward", "forward forward"])
@pytest.mark.parametrize("wrap", [reentrant, non_reentrant])
def test_other_losses_are_no_first_halves(wrap: Wrap, losses: str, before: str, between: str, after: str) -> None:
    """Validation, logging and other training, before, within and after a step whose keys enter after backward()."""
    Model(wrap).do(f"{before} {losses} {between} accumulate {after} " * 3)


@pytest.mark.parametrize("before", ["log", "log enqueue"])
@pytest.mark.parametrize("between", ["", "log", "checkpoint"])
def test_a_fault_beside_other_losses_raises(before: str, between: str) -> None:
    with pytest.raises(RuntimeError, match="call enqueue after backward"):
        Model(reentrant).do(f"{before} forward enqueue {between} backward")


@pytest.mark.parametrize("act", ["log", "loss"])
@pytest.mark.parametrize("wrap", [directly, reentrant])
def test_a_backward_hook_may_log_a_loss(wrap: Wrap, act: str) -> None:
    """In MoCo's own order, where the queue is no more what a validation before saw."""
    model, logged = Model(), []
    model.query.register_hook(lambda _: logged.append(model.do(act)))
    model.do("log")
    for _ in range(2):
        loss = model.loss(wrap(torch.tanh, model.query))
        model.do("enqueue")
        loss.backward()
    assert len(logged) == 2


def test_a_caller_may_delete_its_ctx() -> None:
    def validate(ctx: Any) -> None:
        del ctx  # as a Function does that has no use for it
        Model().do("log")

    validate(None)
