"""The state of DenseInfoNCELoss, and what it says of its arguments."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import FUSED, assert_close, check, expected, make_case, to_device
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from densecl_ops import Correspondence, DenseInfoNCELoss, MomentumQueue, _backends, _checks
from densecl_ops.functional import dense_info_nce


def test_temperature_can_be_set_where_it_is_constant() -> None:
    criterion, pair = DenseInfoNCELoss(), torch.randn(2, 3, 16)
    negatives = MomentumQueue(8, 16)
    assert torch.equal(criterion(*pair, negatives), dense_info_nce(*pair, negatives, temperature=0.2, reduction="mean"))
    criterion.temperature = 0.07
    assert torch.equal(criterion(*pair, negatives), dense_info_nce(*pair, negatives, temperature=0.07))
    assert repr(criterion) == "DenseInfoNCELoss(temperature=0.07, reduction='mean', backend='auto')"
    with pytest.raises(ValueError, match="temperature: got 0"):
        criterion.temperature = 0
    with pytest.raises(AttributeError, match=r"temperature: it is learned here.*set logit_scale"):
        DenseInfoNCELoss(learnable_temperature=True).temperature = 0.1


def test_a_learned_temperature(backend: str) -> None:
    """Of one element: neither FSDP shards a 0-d parameter. t = exp(-logit_scale)."""
    case = make_case(17, temperature=0.25)
    criterion = DenseInfoNCELoss(0.25, learnable_temperature=True, backend=backend).double()
    criterion, *args = to_device(backend, criterion, case.query, case.key, case.negatives, case.index)
    loss = criterion(*args)
    loss.backward()
    truth = expected(case)
    assert criterion.logit_scale.shape == (1,)
    assert_close(loss, truth.loss, 1e-7)  # log(1 / t) was rounded to float32
    assert_close(criterion.logit_scale.grad, -0.25 * truth.temperature, 1e-6)


@pytest.mark.parametrize("learnable", [False, True])
def test_copies_and_arguments(backend: str, learnable: bool) -> None:
    """Every argument reaches the function, and every copy gives the same."""
    case = make_case(14, temperature=0.13, reduction="sum", exclude=torch.tensor([1, 2, 3]))
    case.valid, case.weight = torch.rand(3, 6) < 0.7, torch.rand(3, 6)
    match = Correspondence(case.index, torch.zeros(3, 6), case.valid)
    criterion, other = (
        DenseInfoNCELoss(temperature, "sum", learnable, backend=backend)
        for temperature in (0.13, 0.5 if learnable else 0.13)
    )
    other.load_state_dict(criterion.state_dict())
    tensors = to_device(backend, case.query, case.key, case.negatives, match, case.weight, case.exclude)
    truth = expected(case)
    for twin in (criterion, other, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        *args, weight, exclude = (pickle.loads(pickle.dumps(x)) for x in tensors)
        loss, rank = to_device(backend, twin)[0](*args, weight=weight, exclude=exclude, return_rank=True)
        assert_close(loss, truth.loss, 1e-6 if learnable else 1e-12)
        assert rank.tolist() == truth.rank.tolist()
        assert len(list(twin.parameters())) == int(learnable)
        assert "0.13" in repr(twin)


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.parametrize("form", ["FSDP1", "FSDP2"])
def test_fsdp_takes_a_learned_temperature(form: str, one_process: Any) -> None:
    torch.manual_seed(0)
    pair, queue = torch.randn(2, 3, 16), MomentumQueue(8, 16, gather_distributed=False)
    plain = DenseInfoNCELoss(0.25, learnable_temperature=True)
    wrapped: Any = copy.deepcopy(plain)
    if form == "FSDP2":
        wrapped = fully_shard(wrapped, mesh=one_process)
    else:
        wrapped = FullyShardedDataParallel(wrapped, device_id=torch.device("cpu"), use_orig_params=True)
    if form == "FSDP2":
        assert "temperature=?" in str(wrapped)
        with pytest.raises(RuntimeError, match=r"logit_scale in shards.*logit_scale\.full_tensor\(\)"):
            _ = wrapped.temperature
    losses = [criterion(*pair, queue) for criterion in (plain, wrapped)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    (grad,) = (parameter.grad for parameter in wrapped.parameters())
    torch.testing.assert_close(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, plain.logit_scale.grad)


def test_a_temperature_that_was_not_initialised_says_so() -> None:
    criterion = DenseInfoNCELoss(learnable_temperature=True)
    assert criterion.logit_scale is not None
    criterion.logit_scale.data.fill_(200.0)
    with pytest.raises(ValueError, match=r"temperature: got 0.0, .*reset_parameters\(\)"):
        criterion(torch.randn(2, 4), torch.randn(2, 4), MomentumQueue(8, 4))


def test_deferred_initialisation() -> None:
    with torch.device("meta"):
        criterion = DenseInfoNCELoss(0.25, learnable_temperature=True)
    assert "temperature=?" in repr(criterion)
    criterion.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(criterion.temperature, torch.tensor(0.25))


def halved(queue: MomentumQueue) -> MomentumQueue:
    queue.rows.data.mul_(0.5)  # as ema-pytorch writes: .data leaves no version
    return queue


@pytest.mark.parametrize(
    ("negatives", "cause"),
    [
        (torch.randn(200, 16), r"normalise them \(torch\.nn\.functional\.normalize\(rows, dim=1\)\)"),
        (halved(MomentumQueue(200, 16)), "averaging of buffers spoils a queue.*ignore_startswith_names"),
    ],
)
def test_rows_of_other_lengths_are_told_once(negatives: Any, cause: str) -> None:
    _checks.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"negatives: got rows that are not of length 1.*{cause}") as seen:
        assert len([dense_info_nce(*torch.randn(2, 3, 16), negatives) for _ in range(3)]) == 3
    assert len(seen) == 1


def test_unit_rows_in_any_form_are_not_told() -> None:
    _checks.warn_once.cache_clear()
    pair, queue = torch.randn(2, 3, 16), MomentumQueue(200, 16)
    empty = MomentumQueue(200, 16, init="empty")
    empty.rows.fill_(5)  # rows past the count may hold anything
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for negatives in (queue, queue.rows.bfloat16(), queue.rows.half(), torch.zeros(4, 16), empty):
            dense_info_nce(*pair, negatives)


def test_tokens_are_told_how_to_pass() -> None:
    tokens = torch.randn(2, 9, 16)
    with pytest.raises(ValueError, match=r"negatives: .*query, \(2, 9, 16\), looks like .*\.transpose\(1, 2\)"):
        dense_info_nce(tokens, tokens, MomentumQueue(8, 16))
    with pytest.raises(ValueError, match=r"with K at least 1, 9 being the channels of query$"):
        dense_info_nce(tokens, tokens, MomentumQueue(8, 5))


@pytest.mark.parametrize("wanted", ["key", "negatives"])
@pytest.mark.parametrize("backend", FUSED)
def test_no_gradient_is_made_that_nobody_wants(backend: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = _backends._module("info_nce", backend), []

    def forward(problem: Any, want_grad: bool, want_rank: bool) -> Any:
        asked.append(want_grad)
        return real(problem, want_grad, want_rank)

    real = module.forward
    monkeypatch.setattr(module, "forward", forward)
    check(backend, make_case(), wanted=(wanted,))
    assert asked == [False]
