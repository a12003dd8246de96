"""The state of DenseInfoNCELoss, and what it says of its arguments."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any
from unittest import mock

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


@pytest.mark.parametrize("learnable", [False, True])
def test_copies_and_arguments(backend: str, learnable: bool) -> None:
    """Every argument reaches the function, and every copy gives the same. Neither FSDP shards a 0-d logit_scale."""
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
        assert_close(loss, truth.loss, 1e-6 if learnable else 1e-12)  # log(1 / t) was rounded to float32
        assert rank.tolist() == truth.rank.tolist()
        assert [parameter.shape for parameter in twin.parameters()] == [(1,)] * learnable
        if learnable:
            (grad,) = torch.autograd.grad(loss, twin.logit_scale)
            assert_close(grad, -0.13 * truth.temperature, 1e-6)
        assert "0.13" in repr(twin)


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_fsdp_takes_a_learned_temperature(tmp_path: Any) -> None:
    torch.manual_seed(0)
    pair, queue = torch.randn(2, 3, 16), MomentumQueue(8, 16, gather_distributed=False)
    plain, first, second = (DenseInfoNCELoss(0.25, learnable_temperature=True) for _ in range(3))
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharded: Any = fully_shard(second, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        wrapped = FullyShardedDataParallel(first, device_id=torch.device("cpu"), use_orig_params=True)
        assert "temperature=?" in str(sharded)
        with pytest.raises(RuntimeError, match=r"logit_scale in shards.*logit_scale\.full_tensor\(\)"):
            _ = sharded.temperature
        results = []
        for criterion in (plain, wrapped, sharded):
            loss = criterion(*pair, queue)
            loss.backward()
            (grad,) = (parameter.grad for parameter in criterion.parameters())
            results.append((loss, grad.full_tensor() if criterion is sharded else grad))
        torch.testing.assert_close(results[1:], results[:1] * 2)
    finally:
        dist.destroy_process_group()


def test_deferred_initialisation() -> None:
    with torch.device("meta"):
        criterion = DenseInfoNCELoss(0.25, learnable_temperature=True)
    assert "temperature=?" in repr(criterion)
    criterion.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(criterion.temperature, torch.tensor(0.25))


def test_unit_rows_in_any_form_are_not_told() -> None:
    _checks.warn_once.cache_clear()
    pair, queue = torch.randn(2, 3, 16), MomentumQueue(200, 16)
    empty = MomentumQueue(200, 16, init="empty")
    empty.rows.fill_(5)  # rows past the count may hold anything
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for negatives in (queue, queue.rows.bfloat16(), queue.rows.half(), torch.zeros(4, 16), empty):
            dense_info_nce(*pair, negatives)


@pytest.mark.parametrize("wanted", ["key", "negatives"])
@pytest.mark.parametrize("backend", FUSED)
def test_no_gradient_is_made_that_nobody_wants(backend: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _backends._module("info_nce", backend)
    forward = mock.Mock(wraps=module.forward)
    monkeypatch.setattr(module, "forward", forward)
    check(backend, make_case(), wanted=(wanted,))
    assert [call.args[1:] for call in forward.call_args_list] == [(False, True)]
