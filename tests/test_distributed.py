"""Queues and in-batch negatives in a process group: every rank has what one process has on the concatenated batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_training as training
import distributed_worker as worker
import numpy as np
import oracle
import pytest
import torch
from helpers import EPS, numpy64, run_ranks

UNEVEN = list(range(len(worker.ROUNDS["uneven"])))
Results = list[dict[str, Any]]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of 2 and 4 gloo processes ended with."""
    return run_ranks(worker.__file__, request.param, tmp_path_factory.mktemp("ranks"))


def one_process(
    name: str, ranks: range, dtype: torch.dtype = torch.float64, init: str = "random", steps: int | None = None
) -> oracle.Queue:
    start = worker.new_queue(ranks[0], init, dtype)
    model = oracle.Queue(worker.SIZE, numpy64(start.rows[: int(start.count)]))
    for step in range(len(worker.ROUNDS[name]))[:steps]:
        model.enqueue(concatenated(name, step, ranks))
    return model


def concatenated(name: str, step: int, ranks: range) -> np.ndarray:
    return np.concatenate([worker.keys_of(name, step, rank).numpy() for rank in ranks])


def same(state: dict[str, torch.Tensor], model: oracle.Queue, eps: float) -> None:
    assert (int(state["position"]), int(state["count"])) == (model.position, model.count)
    np.testing.assert_allclose(numpy64(state["rows"][: model.count]), model.rows(), atol=eps)


def same_on_all(states: list[dict[str, torch.Tensor]], model: oracle.Queue, eps: float = 1e-14) -> None:
    for state in states:
        same(state, model, eps)
        for key, value in states[0].items():
            assert torch.equal(state[key], value)


# ---- the queue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("name", list(worker.ROUNDS))
def test_ranks_equal_one_process(ranks: Results, name: str, dtype: torch.dtype, init: str) -> None:
    """After every enqueue. Ranks are seeded differently: their random rows become those of rank 0."""
    for step in range(len(worker.ROUNDS[name])):
        states = [rank[name][str(dtype), init][step] for rank in ranks]
        same_on_all(states, one_process(name, range(len(ranks)), dtype, init, step + 1), EPS[dtype])


def test_without_gathering_each_rank_keeps_its_own(ranks: Results) -> None:
    for rank, results in enumerate(ranks):
        model = oracle.Queue(worker.SIZE, np.zeros((0, worker.DIM)))
        model.enqueue(worker.keys_of("uneven", 0, rank).numpy())
        same(results["local"], model, 1e-14)


def test_ranks_may_hold_keys_of_different_dtype(ranks: Results) -> None:
    """Rows travel in the dtype of the queue."""
    model = oracle.Queue(worker.SIZE, np.zeros((0, worker.DIM)))
    model.enqueue(concatenated("even", 0, range(len(ranks))))
    same_on_all([results["mixed keys"] for results in ranks], model, 1e-6)


@pytest.mark.parametrize("who", ["all", "rank 0"])
def test_resume(ranks: Results, who: str) -> None:
    """Whether every rank loads the checkpoint or the first alone."""
    same_on_all([results["resumed"][who] for results in ranks], one_process("uneven", range(len(ranks))))


def test_loading_on_rank_0_in_mid_run(ranks: Results) -> None:
    same_on_all([results["loaded"] for results in ranks], one_process("uneven", range(len(ranks))))


def test_default_device(ranks: Results) -> None:
    """torch.set_default_device moves nothing of what is said over the host."""
    same_on_all([results["default device"] for results in ranks], one_process("uneven", range(len(ranks))))


def test_rows_from_before_the_process_group(ranks: Results) -> None:
    """Before the first init_process_group, and between the first and a second: those of rank 0 stay."""
    model = oracle.Queue(worker.SIZE, worker.new_queue(0).rows.numpy().copy())
    model.enqueue(np.ones((2 + 1, worker.DIM)))
    for step in UNEVEN:
        model.enqueue(concatenated("uneven", step, range(len(ranks))))
    same_on_all([results["early"] for results in ranks], model)


def test_deep_copies_share_the_group(ranks: Results) -> None:
    same_on_all([results["copied"]["twin"] for results in ranks], one_process("uneven", range(len(ranks))))
    for results in ranks:
        assert results["copied"]["untouched"]
        assert results["copied"]["shared"]
        assert results["copied"]["default"]
        assert results["copied"]["pickled"].startswith("TypeError: process_group: got a process group, which cannot")


def test_groups_of_two(ranks: Results) -> None:
    """Ranks 0 and 1, and 2 and 3, with keys and random starts of their own."""
    for first in range(0, len(ranks), 2):
        pair = range(first, first + 2)
        name = list(worker.ROUNDS)[first // 2]
        same_on_all([ranks[rank]["pairs"]["state"] for rank in pair], one_process(name, pair))
        rows = oracle.unit(concatenated("uneven", 0, pair), 1)[0]
        for rank, own in zip(pair, ([0], [1, 2, 3]), strict=True):
            negatives, numbers = ranks[rank]["pairs"]["batch"]
            np.testing.assert_allclose(negatives.numpy(), rows, atol=1e-14)
            assert numbers.tolist() == own


def test_group_of_other_ranks(ranks: Results) -> None:
    for results in ranks if len(ranks) == 4 else ():
        for what in ("outside", "outside, batch"):
            assert results["pairs"][what].startswith("ValueError: process_group: got a group that this process is not")


def test_group_that_does_not_serve_the_device(ranks: Results) -> None:
    """Nor the host: its two ranks make a host group to tell each other, without the help of the others."""
    for results in ranks[:2]:
        assert results["pairs"]["device"].startswith("ValueError: keys: got a tensor on cpu, expected one on cuda")


def test_destroyed_group(ranks: Results) -> None:
    for results in ranks:
        for what in ("stale", "stale again"):
            assert results[what].startswith("ValueError: process_group: got a group that has been destroyed")


def test_group_of_one(tmp_path: Path) -> None:
    """A process group with a single rank changes nothing."""
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        same(
            worker.run_rounds("even", 0, torch.float64, "empty")[-1], one_process("even", range(1), init="empty"), 1e-14
        )
    finally:
        torch.distributed.destroy_process_group()


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        ("queue size", ("size 11 on rank 0", "size 14 on rank 1")),
        ("queue dim", ("dim 4 on rank 0", "dim 5 on rank 1")),
        ("queue dtype", ("float32 on rank 0", "bfloat16 on rank 1")),
        ("batch dim", ("dim 4 on rank 0", "dim 5 on rank 1")),
        ("batch dtype", ("float32 on rank 0", "bfloat16 on rank 1")),
        ("batch gradient", ("requires_grad 0 on rank 0", "requires_grad 1 on rank 1")),
    ],
)
def test_disagreement_raises_on_every_rank(ranks: Results, what: str, seen: tuple[str, ...]) -> None:
    for results in ranks:
        error = results["errors"][what]
        assert error.startswith("ValueError: keys: got"), error
        assert all(word in error for word in (*seen, "expected")), error


@pytest.mark.parametrize(
    ("what", "own"),
    [
        ("dim", "ValueError: keys: got shape (2, 5), expected (n, 4)"),
        ("shape", "ValueError: keys: got shape (2, 4, 1), expected (n, 4)"),
        ("integer", "TypeError: keys: got dtype torch.int64"),
        ("list", "TypeError: keys: got list, expected a torch.Tensor"),
        ("batch shape", "ValueError: keys: got shape (4,), expected (B, D)"),
    ],
)
def test_a_mistake_on_one_rank_raises_on_all(ranks: Results, what: str, own: str) -> None:
    for rank, results in enumerate(ranks):
        error = results["errors"][what]
        assert error.startswith(own if rank == 1 else "ValueError: keys: got an error on rank 1 of"), error


def test_a_caught_mistake_spoils_nothing(ranks: Results) -> None:
    model = one_process("uneven", range(len(ranks)), init="empty")
    same_on_all([results["after errors"] for results in ranks], model)
    same_on_all([results["queue after errors"] for results in ranks], one_process("uneven", range(len(ranks))))


@pytest.mark.parametrize("what", ["queue", "batch"])
def test_gathering_under_join_raises(ranks: Results, what: str) -> None:
    """A rank that has run out of batches would never answer."""
    for results in ranks:
        assert results["under join"][what].startswith("ValueError: keys: got a gather inside DistributedDataParallel.")


def test_join_that_throws_may_gather(ranks: Results) -> None:
    """torch raises on all ranks before the first enqueue that one of them would miss."""
    steps = len(UNEVEN) - 1
    batches = [[worker.keys_of("uneven", step + rank % 2, rank) for rank in range(len(ranks))] for step in range(steps)]
    model = oracle.Queue(worker.SIZE, np.zeros((0, worker.DIM)))
    for keys in batches:
        model.enqueue(torch.cat(keys).numpy())
    same_on_all([results["under join"]["gathered"] for results in ranks], model)
    for results in ranks:
        assert "exhausted" in results["under join"]["throws"]


def test_join_without_gathering(ranks: Results) -> None:
    """Each rank keeps the keys of its own batches, of which the ranks have unequal numbers."""
    for rank, results in enumerate(ranks):
        model = oracle.Queue(worker.SIZE, np.zeros((0, worker.DIM)))
        for step in UNEVEN[rank % 2 :]:
            model.enqueue(worker.keys_of("uneven", step, rank).numpy())
        same(results["under join"]["local"], model, 1e-14)


# ---- whole steps ---------------------------------------------------------------------------------------------------


def same_training(seen: list[dict[str, Any]], name: str, eps: float = 1e-12) -> None:
    """The loss over the ranks, gradients of every step on every rank, and all state at the end."""
    expected = training.one_process(name, len(seen))
    losses = torch.stack([results["losses"] for results in seen]).mean(0)
    torch.testing.assert_close(losses, expected["losses"], rtol=0, atol=eps)
    for results in seen:
        for step, grads in enumerate(expected["grads"]):
            for key, value in grads.items():
                torch.testing.assert_close(results["grads"][step][key], value, rtol=0, atol=eps, msg=f"{step} {key}")
        for key, value in expected["state"].items():
            torch.testing.assert_close(results["state"][key], value, rtol=0, atol=eps, msg=key)
        for key, model in expected["queues"].items():
            prefix = f"{key}_queue."
            same({part: results["state"][prefix + part] for part in ("rows", "position", "count")}, model, eps)


@pytest.mark.parametrize("name", list(training.RUNS))
def test_training_equals_one_process(ranks: Results, name: str) -> None:
    """DistributedDataParallel with its defaults, buffer broadcast included."""
    same_training([results[name] for results in ranks], name)


@pytest.mark.parametrize("wrap", ["compiled", "compiled inside", "compiled SimCLR", "sharded"])
def test_wrapped_training_equals_one_process(ranks: Results, wrap: str) -> None:
    """torch.compile around and inside DistributedDataParallel, FSDP2; two ranks."""
    if len(ranks) == 2:
        name = "SimCLR" if "SimCLR" in wrap else "momentum"
        same_training([results["wrapped"][wrap] for results in ranks], name)


def test_compiler_does_not_trace_collectives(ranks: Results) -> None:
    """It would warn of what it cannot trace."""
    for results in ranks if len(ranks) == 2 else ():
        assert results["compiler warnings"] == []


def test_in_batch_gradient(ranks: Results) -> None:
    """What all ranks ask of this rank's rows, through the norm; and what this rank asks of anything else alone."""
    sizes = [len(worker.keys_of("uneven", 0, rank)) for rank in range(len(ranks))]
    asked = [worker.weight_of(rank, sum(sizes)).numpy() for rank in range(len(ranks))]
    for rank, results in enumerate(ranks):
        np.testing.assert_array_equal(results["gradient"]["other"].numpy(), 2 * asked[rank])
        rows, inverse = oracle.unit(worker.keys_of("uneven", 0, rank).numpy(), 1)
        total = np.split(sum(asked), np.cumsum(sizes))[rank]
        expected = (total - (total * rows).sum(1, keepdims=True) * rows) * inverse
        np.testing.assert_allclose(results["gradient"]["keys"].numpy(), expected, atol=1e-14)


def test_in_batch_without_gathering(ranks: Results) -> None:
    for rank, results in enumerate(ranks):
        negatives, own = results["local batch"]
        keys = worker.keys_of("uneven", 0, rank)
        np.testing.assert_allclose(negatives.numpy(), oracle.unit(keys.numpy(), 1)[0], atol=1e-14)
        assert own.tolist() == list(range(len(keys)))
