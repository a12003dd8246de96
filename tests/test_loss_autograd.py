"""The loss in autograd: each gradient, derivatives twice, and what may happen between forward and backward."""

from __future__ import annotations

from dataclasses import replace

import helpers
import oracle
import pytest
import torch
from helpers import assert_close, check, make_case
from torch import Tensor

from densecl_ops import DenseInfoNCELoss, MomentumQueue


@pytest.mark.parametrize("wanted", ["query", "key", "negatives", "temperature"])
@pytest.mark.parametrize("rank", [False, True])
def test_each_gradient_alone(backend: str, wanted: str, rank: bool) -> None:
    check(backend, make_case(1, negatives=1500), wanted=(wanted,), rank=rank)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", ["query", "key", "negatives", "temperature", "weight"])
def test_gradcheck(backend: str, wanted: str, reduction: str) -> None:
    case = make_case(2, batch=2, channels=3, query_grid=(1, 3), key_grid=(2, 2), negatives=5)
    inputs = {
        "query": case.query,
        "key": case.key,
        "negatives": case.negatives,
        "temperature": torch.tensor(0.3, dtype=torch.float64),
        "weight": torch.rand(2, 3, dtype=torch.float64) + 0.5,
    }

    def loss(x: torch.Tensor) -> torch.Tensor:
        given = inputs | {wanted: x}
        query, key, negatives = given.pop("query"), given.pop("key"), given.pop("negatives")
        exclude = torch.tensor([1, 4])
        return helpers.info_nce(
            backend, query, key, negatives, case.index, reduction=reduction, exclude=exclude, **given
        )

    assert torch.autograd.gradcheck(loss, inputs[wanted].clone().requires_grad_())


def test_learnable_temperature_gradient(backend: str) -> None:
    case = make_case(17, temperature=0.25)
    criterion = DenseInfoNCELoss(0.25, learnable_temperature=True, backend=backend).double()
    (criterion,) = helpers.to_device(backend, criterion)
    loss = criterion(*helpers.to_device(backend, case.query, case.key, case.negatives, case.index))
    loss.backward()
    truth = helpers.expected(case)
    assert_close(loss, truth.loss, 1e-7)  # log(1/t) was rounded to float32
    assert_close(criterion.logit_scale.grad, -0.25 * truth.temperature, 1e-6)  # t = exp(-logit_scale)


def test_gradient_of_a_later_scale(backend: str) -> None:
    """Backward is linear in the upstream gradient: a loss scale of 2^16 and a sum of two losses."""
    case = make_case(19)
    query = case.query.clone().requires_grad_()
    first = helpers.info_nce(backend, query, case.key, case.negatives, case.index)
    second = helpers.info_nce(backend, query, case.key, case.negatives[:5], case.index, temperature=1.0)
    (2.0**16 * (first - 0.5 * second)).backward()
    wish = helpers.expected(case).query
    wish = wish - 0.5 * helpers.expected(replace(case, negatives=case.negatives[:5], temperature=1.0)).query
    assert_close(query.grad, 2.0**16 * wish, 1e-10)


def test_rows_beyond_the_count_get_exactly_zero(backend: str) -> None:
    case = make_case(20, count=11)
    check(backend, case, wanted=("negatives",))
    assert (helpers.run(backend, case).negatives[11:] == 0).all()


def test_in_batch_negatives(backend: str) -> None:
    """SimCLR-style: the pooled keys of the batch are the negatives, one's own excluded, and all of it learns."""
    case = make_case(7, exclude=torch.arange(3))
    key = case.key.clone().requires_grad_()
    pooled = torch.nn.functional.normalize(key.mean((2, 3)), dim=1)
    helpers.info_nce(backend, case.query, key, pooled, case.index, exclude=case.exclude).backward()

    def loss(keys: Tensor) -> float:
        negatives = torch.nn.functional.normalize(keys.mean((2, 3)), dim=1)
        return float(helpers.expected(replace(case, key=keys, negatives=negatives)).loss)

    direction = torch.randn_like(key)
    slope = (loss(case.key + 1e-5 * direction) - loss(case.key - 1e-5 * direction)) / 2e-5
    assert float((key.grad * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_oracle_agrees_with_finite_differences() -> None:
    """The judge judged: its analytic gradients against central differences of its own loss."""
    case = make_case(21, batch=2, channels=3, query_grid=(1, 2), key_grid=(1, 3), negatives=4, count=3)
    case.weight = torch.rand(2, 2, dtype=torch.float64)
    case.valid = torch.tensor([[True, True], [True, False]])
    case.exclude = torch.tensor([0, 2])
    truth = helpers.expected(case)
    for name in ("query", "key", "negatives", "weight"):
        direction = torch.randn(getattr(case, name).shape, dtype=torch.float64)
        ahead, behind = (
            float(helpers.expected(replace(case, **{name: getattr(case, name) + step * direction})).loss)
            for step in (1e-5, -1e-5)
        )
        slope = (getattr(truth, name).ravel() * direction.numpy().ravel()).sum()
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)
    ahead, behind = (float(helpers.expected(replace(case, temperature=0.2 + step)).loss) for step in (1e-5, -1e-5))
    assert truth.temperature == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)
    assert isinstance(truth, oracle.LossResult)


# ---- between forward and backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("key_gradient", [False, True])
def test_enqueue_before_backward(backend: str, init: str, rank: bool, key_gradient: bool) -> None:
    queue = MomentumQueue(size=12, dim=6, init=init, dtype=torch.float64)
    (queue,) = helpers.to_device(backend, queue)
    queue.enqueue(torch.randn(7, 6, dtype=torch.float64, device=queue.rows.device))
    case = make_case(20, exclude=torch.tensor([1, 0, 5]))
    truth = helpers.expected(replace(case, negatives=queue.rows.clone(), count=int(queue.count)))
    query, key = case.query.clone().requires_grad_(), case.key.clone().requires_grad_(key_gradient)
    result = helpers.info_nce(backend, query, key, queue, case.index, exclude=case.exclude, return_rank=rank)
    loss = result[0] if rank else result
    before = loss.detach().clone()
    queue.enqueue(torch.randn(9, 6, dtype=torch.float64, device=queue.rows.device))
    loss.backward()
    assert loss == before
    assert_close(loss, truth.loss, 1e-12)
    assert_close(query.grad, truth.query, 1e-9)
    if key_gradient:
        assert_close(key.grad, truth.key, 1e-9)


def test_frozen_tensor_may_change_before_backward(backend: str) -> None:
    case = make_case(21)
    query, negatives = case.query.clone().requires_grad_(), case.negatives.clone()
    (negatives,) = helpers.to_device(backend, negatives)
    loss = helpers.info_nce(backend, query, case.key, negatives, case.index)
    negatives.fill_(float("nan"))
    loss.backward()
    assert_close(query.grad, helpers.expected(case).query, 1e-9)


def test_inputs_are_left_alone(backend: str) -> None:
    case = make_case(22, weight=torch.rand(3, 6), exclude=torch.tensor([1, 2, 3]))
    names = ("query", "key", "negatives", "index", "weight", "exclude")
    before = {name: getattr(case, name).clone() for name in names}
    helpers.run(backend, case)
    helpers.run(backend, case, ("query",), rank=False)
    for name in names:
        assert torch.equal(before[name], getattr(case, name)), name


@pytest.mark.parametrize("wanted", ["query", "key", "negatives"])
def test_second_derivatives(backend: str, wanted: str) -> None:
    """A gradient penalty: the fused backends refuse, never drop it; the eager one is plain autograd and can."""
    case = make_case(23)
    leaves = {name: getattr(case, name).clone() for name in ("query", "key", "negatives")}
    leaf = leaves[wanted].requires_grad_()

    def penalised() -> None:
        loss = helpers.info_nce(backend, *leaves.values(), case.index)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert_close(grad, getattr(helpers.expected(case), wanted), 1e-9)
        (loss + grad.square().sum()).backward()

    if backend in helpers.FUSED:
        with pytest.raises(RuntimeError, match="differentia"):
            penalised()
    else:
        penalised()


def test_backward_twice_with_retain_graph(backend: str) -> None:
    case = make_case(24)
    leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.negatives)]
    loss = helpers.info_nce(backend, *leaves, case.index)
    loss.backward(retain_graph=True)
    loss.backward()
    truth = helpers.expected(case)
    for leaf, wish in zip(leaves, (truth.query, truth.key, truth.negatives), strict=True):
        assert_close(leaf.grad, 2 * wish, 1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_modes(backend: str, mode: type) -> None:
    case = make_case(25)
    query = case.query.clone().requires_grad_()
    with mode():
        loss, rank = helpers.info_nce(backend, query, case.key, case.negatives, case.index, return_rank=True)
    assert not loss.requires_grad
    assert_close(loss, helpers.expected(case).loss, 1e-12)
    assert rank.tolist() == helpers.expected(case).rank.tolist()


def test_inference_mode_keys(fused: str) -> None:
    """inference_mode instead of no_grad around the key encoder: torch saves no such tensor, and none has to be."""
    case = make_case(29)
    with torch.inference_mode():
        key = case.key * 1
    query = case.query.clone().requires_grad_()
    helpers.info_nce(fused, query, key, case.negatives, case.index).backward()
    assert_close(query.grad, helpers.expected(case).query, 1e-9)
