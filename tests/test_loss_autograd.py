"""The loss in autograd: derivatives twice, and what may happen between forward and backward."""

from __future__ import annotations

from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from helpers import GRADIENTS, assert_close, expected, make_case
from torch.utils.checkpoint import checkpoint

from densecl_ops import MomentumQueue


def test_oracle_agrees_with_finite_differences() -> None:
    """The judge judged: its analytic gradients against central differences of its own loss."""
    case = make_case(21, batch=2, channels=3, query_grid=(1, 2), key_grid=(1, 3), negatives=4, count=3)
    case.weight, case.valid = torch.rand(2, 2, dtype=torch.float64), torch.tensor([[True, True], [True, False]])
    case.exclude = torch.tensor([0, 2])
    truth = expected(case)
    for name in GRADIENTS:
        given = torch.as_tensor(getattr(case, name), dtype=torch.float64)
        direction = torch.randn_like(given)
        steps = (replace(case, **{name: given + step * direction}) for step in (1e-5, -1e-5))
        ahead, behind = (float(expected(step).loss) for step in steps)
        slope = np.vdot(getattr(truth, name), direction.numpy())
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-6), name


@pytest.mark.parametrize("kind", ["random", "empty", "tensor"])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("wanted", [("query",), ("query", "key")])
def test_negatives_may_change_before_backward(backend: str, kind: str, rank: bool, wanted: tuple[str, ...]) -> None:
    queue = MomentumQueue(12, 6, init="empty" if kind == "empty" else "random", dtype=torch.float64)
    (queue,) = helpers.to_device(backend, queue)
    queue.enqueue(torch.randn(7, 6, device=queue.rows.device))
    case = make_case(20, exclude=torch.tensor([1, 0, 5]))
    truth = expected(replace(case, negatives=queue.rows.clone(), count=int(queue.count)))
    leaves = {name: getattr(case, name).clone().requires_grad_(name in wanted) for name in ("query", "key")}
    negatives = queue.rows if kind == "tensor" else queue
    options = {"exclude": case.exclude, "return_rank": rank}
    result = helpers.info_nce(backend, *leaves.values(), negatives, case.index, **options)
    loss = result[0] if rank else result
    queue.enqueue(torch.randn(9, 6, device=queue.rows.device))
    loss.backward()
    assert_close(loss, truth.loss, 1e-12)
    for name in wanted:
        assert_close(leaves[name].grad, getattr(truth, name), 1e-9)


@pytest.mark.parametrize("wanted", ["query", "key", "negatives"])
def test_second_derivatives(backend: str, wanted: str) -> None:
    """A gradient penalty: the fused backends refuse, never drop it; the eager one is plain autograd and can."""
    case = make_case(23)
    leaves = {name: getattr(case, name).clone() for name in ("query", "key", "negatives")}
    leaf = leaves[wanted].requires_grad_()

    def penalised() -> None:
        loss = helpers.info_nce(backend, *leaves.values(), case.index)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert_close(grad, getattr(expected(case), wanted), 1e-9)
        (loss + grad.square().sum()).backward()

    if backend in helpers.FUSED:
        with pytest.raises(RuntimeError, match="differentia"):
            penalised()
    else:
        penalised()


def test_backward_is_linear_and_may_come_twice(backend: str) -> None:
    """With another scale, as a GradScaler's of 2^16."""
    case = make_case(24)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("query", "key", "negatives")}
    loss = helpers.info_nce(backend, *leaves.values(), case.index)
    loss.backward(retain_graph=True)
    (2.0**16 * loss).backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, (1 + 2.0**16) * getattr(expected(case), name), 1e-9)


def test_backward_without_a_gradient(backend: str) -> None:
    """What follows the loss may have none for it, as a reentrant checkpoint that leaves it unused."""
    case, scale = make_case(26), torch.ones((), requires_grad=True)
    query = case.query.clone().requires_grad_()
    loss = helpers.info_nce(backend, query, case.key, case.negatives, case.index)
    checkpoint(lambda unused, x: 2 * x, loss, scale, use_reentrant=True).backward()
    assert scale.grad == 2
    assert query.grad is None or not query.grad.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_modes(backend: str, mode: type) -> None:
    """Around the loss; or around all that has no gradient, whose tensors torch saves for no backward."""
    case = make_case(25)
    query, truth = case.query.clone().requires_grad_(), expected(case)
    with mode():
        loss, rank = helpers.info_nce(backend, query, case.key, case.negatives, case.index, return_rank=np.True_)
        made = {name: getattr(case, name).clone() for name in ("negatives", "index")}
        made |= {
            "weight": torch.rand(3, 6).double(),
            "valid": torch.rand(3, 6) < 0.7,
            "exclude": torch.tensor([1, 2, 3]),
        }
    assert not loss.requires_grad
    assert_close(loss, truth.loss, 1e-12)
    assert rank.tolist() == truth.rank.tolist()
    helpers.check(backend, replace(case, **made), wanted=("query", "key"))
