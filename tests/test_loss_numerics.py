"""Inputs chosen to break the loss: extremes, NaN, low precision, changes between forward and backward, memory."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import LAYOUTS, assert_close, check, error, lay_out, make_case
from torch import Tensor
from torch.autograd.profiler import profile

from densecl_ops import Correspondence, DenseInfoNCELoss, MomentumQueue

LOW = (torch.float16, torch.bfloat16)

# ---- extremes of size and scale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("rank", [False, True])
def test_temperatures(backend: str, temperature: float, rank: bool) -> None:
    case = make_case(0, negatives=1500, temperature=temperature)
    check(backend, case, rank=rank)
    check(backend, case.to(torch.float32), 1e-4 if temperature < 0.01 else 2e-5, helpers.GRADIENTS[:3], rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("wanted", [("query",), ("query", "key", "negatives")])
def test_negatives_that_overflow_exp(backend: str, dtype: torch.dtype, rank: bool, wanted: tuple[str, ...]) -> None:
    """Norms from 0.01 to 1e3 at t = 0.1: logits up to 1e4, the largest in the last tile or in the first."""
    for order in (1, -1):
        case = make_case(1, channels=16, negatives=2500, temperature=0.1)
        case.negatives *= torch.logspace(-2, 3, 2500, dtype=torch.float64)[:, None]
        if order < 0:
            case.negatives = case.negatives.flip(0)
        check(backend, case.to(dtype), 1e-9 if dtype == torch.float64 else 1e-5, wanted, rank)


def test_all_logits_below_underflow(backend: str) -> None:
    """Every negative at s = -1e3, the positive too: exp() of each is 0, their ratio is not."""
    query = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    negatives = torch.tensor([[-100.0, 0.0], [-101.0, 0.5], [-100.0, 1.0]], dtype=torch.float64)
    check(backend, helpers.Case(query, -query, negatives, temperature=0.1))
    check(backend, helpers.Case(query, -query, negatives, temperature=0.1), rank=False)
    seen = helpers.run(backend, helpers.Case(query.float(), -query.float(), negatives.float(), temperature=0.1))
    assert torch.isfinite(seen.loss)
    assert torch.isfinite(seen.query).all()


@pytest.mark.parametrize("rank", [False, True])
def test_tiny_loss_keeps_its_relative_precision(fused: str, rank: bool) -> None:
    """Positive at s+ = 1/t, negatives orthogonal or opposed: losses down to 1e-35, where log(1 + x) - 0 gives 0."""
    query = torch.eye(4)[:3]
    negatives = torch.tensor([[0.0, 0, 0, 1], [0, 0, -1, 0], [0, 0.5, 0, 0]])
    for temperature in (0.2, 0.05, 0.0125):
        case = helpers.Case(query, query, negatives, temperature=temperature, reduction="none")
        truth, seen = helpers.expected(case), helpers.run(fused, case, ("query",), rank)
        assert truth.loss.max() < 0.2
        np.testing.assert_allclose(seen.loss.cpu().numpy(), truth.loss, rtol=2e-5)
        assert_close(seen.query, truth.query, 2e-5)


def test_one_of_everything(backend: str) -> None:
    """One image, one position, one negative, one channel; then all odd primes."""
    for channels in (1, 2):
        check(backend, make_case(2, 1, channels, (1, 1), (1, 1), 1))
    check(backend, make_case(2, 5, 7, (1, 11), (13, 1), 1277))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str) -> None:
    case = make_case(3, negatives=40)
    negatives = case.negatives
    layouts = {
        "transposed": negatives.t().contiguous().t(),
        "columns": torch.cat([negatives, negatives], 1)[:, 6:],
        "rows": negatives.repeat_interleave(2, 0)[::2],
        "expanded": negatives[:1].expand(40, -1),
        "strided": negatives.repeat_interleave(2, 1)[:, ::2],
    }
    for rows in layouts.values():
        strided = replace(case, query=lay_out(case.query, layout), key=lay_out(case.key, layout), negatives=rows)
        check(backend, strided)
        check(backend, strided, wanted=("query",), rank=False)
    check(backend, replace(case, index=case.index.t().contiguous().t(), upstream=None))


def test_expanded_maps(backend: str) -> None:
    case = make_case(4)
    check(
        backend, replace(case, query=case.query[:1].expand(3, -1, -1, -1), key=case.key[:, :, :1].expand(-1, -1, 3, -1))
    )


def test_expanded_weights_and_indices(backend: str) -> None:
    case = make_case(5, weight=torch.rand(3, 1, dtype=torch.float64).expand(3, 6))
    case.index, case.exclude = case.index[:1].expand(3, 6), torch.tensor([2]).expand(3)
    check(backend, case, wanted=helpers.GRADIENTS[:4])


def test_exclude_with_one_image(backend: str) -> None:
    case = make_case(6, batch=1, negatives=1, exclude=torch.tensor([0]))
    check(backend, case)
    assert helpers.run(backend, case).loss == 0


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


@pytest.mark.parametrize("count", [0, 1, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_partly_filled_queue(backend: str, count: int, dtype: torch.dtype) -> None:
    """Rows beyond the count may hold anything, here logits of 1e3 and more."""
    case = make_case(8, count=count)
    case.negatives[count:] *= 1e3
    for rank in (False, True):
        check(backend, case.to(dtype), 1e-9 if dtype == torch.float64 else 1e-5, ("query", "key"), rank)
    if count == 0:
        seen = helpers.run(backend, case)
        assert seen.loss == 0
        assert (seen.query == 0).all()
        assert (seen.key == 0).all()
        assert (seen.rank == 0).all()


# ---- zero, NaN, infinity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("rank", [False, True])
def test_zero_vectors(backend: str, dtype: torch.dtype, rank: bool) -> None:
    case = make_case(9).to(dtype)
    case.query[0, :, 0, 0] = 0
    case.key[1] = 0
    case.negatives[3] = 0
    seen, truth = helpers.run(backend, case, rank=rank), helpers.expected(case)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for name in ("loss", "query", "key", "negatives"):
        assert torch.isfinite(getattr(seen, name)).all()
        assert_close(getattr(seen, name), getattr(truth, name), tolerance, name)
    assert (seen.query[0, :, 0, 0] == 0).all()
    assert (seen.key[1] == 0).all()


def test_everything_zero(backend: str) -> None:
    case = make_case(10)
    case.query.zero_(), case.key.zero_(), case.negatives.zero_()
    seen = helpers.run(backend, case)
    assert float(seen.loss) == pytest.approx(np.log(18), rel=1e-12)
    assert (seen.query == 0).all()
    assert (seen.rank == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("rank", [False, True])
def test_nan_and_inf_reach_exactly_their_rows(backend: str, bad: float, where: str, rank: bool) -> None:
    case = replace(make_case(11, key_grid=(2, 3), reduction="none"), index=None)
    getattr(case, where)[1, 2, 0, 1] = bad
    for wanted in ((), ("query", "key", "negatives")):
        loss = helpers.run(backend, case, wanted, rank).loss
        clean = torch.ones(3, 6, dtype=torch.bool)
        clean[1, 1] = False
        assert loss[1, 1].isnan()
        assert torch.isfinite(loss[clean]).all()
    assert helpers.run(backend, replace(case, reduction="mean"), rank=rank).loss.isnan()


@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("size", [17, 1500])
def test_nan_negative_gives_nan(backend: str, rank: bool, size: int) -> None:
    for wanted in ((), ("query",), ("query", "negatives")):
        for row in (0, size - 1):
            case = make_case(12, negatives=size)
            case.negatives[row, 0] = float("nan")
            assert helpers.run(backend, case, wanted, rank).loss.isnan()
            assert helpers.run(backend, case.to(torch.float32), wanted, rank).loss.isnan()


@pytest.mark.parametrize("how", ["weight", "valid"])
@pytest.mark.parametrize("wanted", [("query",), ("query", "key"), ("query", "negatives"), ("temperature",)])
def test_nan_in_a_left_out_row(backend: str, how: str, wanted: tuple[str, ...]) -> None:
    """Loss and gradients are those of the rows that count; the eager backend promises that of the loss alone."""
    case = make_case(13)
    used = torch.ones(3, 6)
    used[0, 2] = used[2, 5] = 0
    case = replace(case, weight=used) if how == "weight" else replace(case, valid=used > 0)
    truth = helpers.expected(case)
    case.query = case.query.clone()
    case.query[0, :, 0, 2] = float("nan")
    case.query[2, 3, 1, 2] = float("inf")
    seen = helpers.run(backend, case, wanted)
    assert_close(seen.loss, truth.loss, 1e-10, "loss")
    for name in wanted if backend in helpers.FUSED else ():
        assert_close(getattr(seen, name), getattr(truth, name), 1e-9, name)


def test_nan_key_that_no_row_uses(backend: str) -> None:
    case = make_case(14)
    case.index = case.index.clamp(min=1)
    truth = helpers.expected(case)
    case.key = case.key.clone()
    case.key[:, :, 0, 0] = float("nan")
    seen = helpers.run(backend, case, ("query", "negatives"))
    assert_close(seen.loss, truth.loss, 1e-10)
    assert_close(seen.query, truth.query, 1e-9)


# ---- low precision and autocast -------------------------------------------------------------------------------------


def row_errors(backend: str, case: helpers.Case, autocast: torch.dtype | None = None) -> dict[str, float]:
    """Relative error norms, of whole vectors and tensors, against the oracle on the same rounded inputs."""
    device = helpers.DEVICES.get(backend, "cpu")
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        seen = helpers.run(backend, case, ("query", "key", "negatives"))
    assert seen.loss.dtype == torch.float32
    truth = helpers.expected(case)
    for name in ("query", "key", "negatives"):
        assert getattr(seen, name).dtype == getattr(case, name).dtype
    return {name: error(getattr(seen, name), getattr(truth, name)) for name in ("loss", "query", "key", "negatives")}


def assert_no_worse_than_eager(fused: str, case: helpers.Case, autocast: torch.dtype | None = None) -> None:
    eager, ours = row_errors("eager", case, autocast), row_errors(fused, case, autocast)
    for name, off in ours.items():
        assert off <= 2 * eager[name] + 1e-5, (name, off, eager[name])
        assert off < 0.1


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("negatives", [100, 2500])
def test_low_precision(fused: str, dtype: torch.dtype, temperature: float, negatives: int) -> None:
    for seed in range(3):
        case = make_case(seed, channels=64, negatives=negatives, temperature=temperature, reduction="none")
        assert_no_worse_than_eager(fused, case.to(dtype))


@pytest.mark.parametrize("query", [torch.float32, *LOW])
@pytest.mark.parametrize("key", [torch.float32, *LOW])
@pytest.mark.parametrize("negatives", [torch.float32, *LOW])
def test_mixtures(fused: str, query: torch.dtype, key: torch.dtype, negatives: torch.dtype) -> None:
    """Products run in the wider dtype of query and negatives: float32 unless both have the same narrow one."""
    case = make_case(15, channels=64, negatives=300, reduction="none")
    mixed = replace(case, query=case.query.to(query), key=case.key.to(key), negatives=case.negatives.to(negatives))
    assert_no_worse_than_eager(fused, mixed)
    if torch.promote_types(query, negatives) == torch.float32:
        assert row_errors(fused, mixed)["loss"] < 1e-6


@pytest.mark.parametrize("wide", ["query", "key", "negatives"])
@pytest.mark.parametrize("narrow", [torch.float32, *LOW])
def test_any_float64_makes_the_loss_float64(backend: str, wide: str, narrow: torch.dtype) -> None:
    case = make_case(16).to(narrow)
    case = replace(case, **{wide: getattr(case, wide).double()})
    seen = helpers.run(backend, case, ("query", "key", "negatives"))
    truth = helpers.expected(case)
    assert seen.loss.dtype == torch.float64
    assert_close(seen.loss, truth.loss, 1e-12)
    assert_close(getattr(seen, wide), getattr(truth, wide), 1e-9)


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("negatives", [100, 2500])
def test_autocast(fused: str, autocast: torch.dtype, dtype: torch.dtype, negatives: int) -> None:
    case = make_case(17, channels=64, negatives=negatives, reduction="none").to(dtype)
    assert_no_worse_than_eager(fused, case, autocast)


@pytest.mark.parametrize("autocast", LOW)
def test_autocast_rounds_only_the_products_with_negatives(backend: str, autocast: torch.dtype) -> None:
    """With no negative the loss is 0; with tiny ones only the positive, which stays float32, decides it."""
    case = make_case(18, channels=64, negatives=3, temperature=1.0, reduction="none").to(torch.float32)
    case.negatives *= 1e-4
    device = helpers.DEVICES.get(backend, "cpu")
    with torch.autocast(device, autocast):
        loss = helpers.run(backend, case).loss
        assert helpers.run(backend, case.to(torch.float64)).loss.dtype == torch.float64
        exact = helpers.run(backend, case.to(torch.float64)).loss
    assert_close(loss, helpers.expected(case).loss, 1e-6)
    assert_close(exact, helpers.expected(case.to(torch.float64)).loss, 1e-12)


def test_autocast_does_round_the_products(backend: str) -> None:
    """bfloat16 products are what autocast is asked for: the loss is off by their rounding, no more and no less."""
    case = make_case(29, channels=64, negatives=300, reduction="none").to(torch.float32)
    with torch.autocast(helpers.DEVICES.get(backend, "cpu"), torch.bfloat16):
        off = error(helpers.run(backend, case).loss, helpers.expected(case).loss)
    assert 1e-5 < off < 1e-2
    assert error(helpers.run(backend, case).loss, helpers.expected(case).loss) < 1e-6


def test_backward_under_autocast(backend: str) -> None:
    """backward() inside the autocast region gives what it gives outside."""
    case = make_case(19).to(torch.float32)
    grads = []
    for inside in (True, False):
        leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.negatives)]
        with torch.autocast(helpers.DEVICES.get(backend, "cpu"), torch.bfloat16):
            loss = helpers.info_nce(backend, *leaves, case.index)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-6 if backend in helpers.FUSED else 1e-2)


# ---- between forward and backward -----------------------------------------------------------------------------------


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


def test_loss_without_rank_is_one_tensor(backend: str) -> None:
    case = make_case(26)
    assert isinstance(helpers.info_nce(backend, case.query, case.key, case.negatives, case.index), Tensor)


# ---- module state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnable", [False, True])
def test_module_copies(learnable: bool) -> None:
    case = make_case(27, temperature=0.13).to(torch.float32)
    args = (case.query, case.key, case.negatives, case.index)
    criterion = DenseInfoNCELoss(0.13, "none", learnable)
    other = DenseInfoNCELoss(0.5 if learnable else 0.13, "none", learnable)
    other.load_state_dict(criterion.state_dict())
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), other, criterion.to(torch.float32)):
        assert torch.equal(twin(*args), criterion(*args))
        assert len(list(twin.parameters())) == int(learnable)
    assert_close(criterion(*args), helpers.expected(replace(case, reduction="none")).loss, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "0.13" in repr(criterion)


def test_correspondence_survives_pickle() -> None:
    match = Correspondence(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(match, pickle.loads(pickle.dumps(match)), strict=True))


# ---- memory ---------------------------------------------------------------------------------------------------------

MIB = 2**20


def peak_of(function: Callable[[], object]) -> float:
    """Most bytes that torch held at once beyond those it held before, in MiB."""
    with profile(profile_memory=True) as record:
        function()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return held.max() / MIB


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 12),
        ({"rank": True, "key": True, "exclude": True}, 24),
        ({"negatives": True}, 24 + 32),  # and their gradient
        ({"rank": True, "autocast": True}, 32),
    ],
    ids=["plain", "rank-key-exclude", "negatives", "autocast"],
)
def test_memory_of_the_published_setting(fused: str, options: dict[str, bool], limit: float) -> None:
    """N = 1,568 against K = 65,536: one float32 logit matrix would be 392 MiB. Inputs of 1.5 MiB included."""
    if fused in helpers.DEVICES:
        pytest.skip("measured on a CPU")
    rows = torch.nn.functional.normalize(torch.randn(65536, 128), dim=1).requires_grad_(options.get("negatives", False))

    def step() -> None:
        query = torch.randn(32, 128, 7, 7, requires_grad=True)
        key = torch.randn(32, 128, 7, 7, requires_grad=options.get("key", False))
        exclude = torch.zeros(32, dtype=torch.int64) if "exclude" in options else None
        rank = options.get("rank", False)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
            result = helpers.info_nce(fused, query, key, rows, exclude=exclude, return_rank=rank)
        (result[0] if rank else result).backward()

    assert peak_of(lambda: torch.ones(256, 1024) + torch.ones(256, 1024)) == pytest.approx(3, abs=0.1)
    assert peak_of(step) < limit


def test_memory_does_not_grow_with_a_bfloat16_queue() -> None:
    """A float32 copy of these 2^18 rows would be 64 MiB; ranks and norms go through it in tiles."""
    rows = torch.nn.functional.normalize(torch.randn(2**18, 64), dim=1).bfloat16()

    def step() -> None:
        query, key = (torch.randn(2, 64, 4, 4, dtype=torch.bfloat16, requires_grad=wanted) for wanted in (True, False))
        helpers.info_nce("blockwise", query, key, rows, return_rank=True)[0].backward()

    assert peak_of(step) < 8


def test_nothing_of_size_n_by_k_is_saved(fused: str) -> None:
    """What waits for backward() is N x D, however many negatives there are."""
    case, saved = make_case(28, negatives=5000).to(torch.float32), []
    query = case.query.clone().requires_grad_()
    negatives = SimpleNamespace(rows=case.negatives, count=torch.tensor(5000))
    if fused in helpers.DEVICES:
        negatives = SimpleNamespace(rows=case.negatives.cuda(), count=torch.tensor(5000, device="cuda"))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        helpers.info_nce(fused, query, case.key, negatives, case.index)
    assert max(saved) < 5000
