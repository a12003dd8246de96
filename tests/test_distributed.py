"""Queues in a process group: every rank ends with what one process would have on the concatenated batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker as worker
import numpy as np
import oracle
import pytest
import torch
from helpers import numpy64

from densecl_ops import MomentumQueue

EPS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 and 4 gloo processes ended with."""
    world, directory = request.param, tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(rank), str(world), str(directory)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(Path(directory) / f"{rank}.pt") for rank in range(world)]


def one_process(name: str, world: int, dtype: torch.dtype, init: str) -> oracle.Queue:
    torch.manual_seed(7)
    start = MomentumQueue(worker.SIZE, worker.DIM, init=init, dtype=dtype)
    model = oracle.Queue(worker.SIZE, numpy64(start.rows[: int(start.count)]))
    for step in range(len(worker.ROUNDS[name])):
        model.enqueue(np.concatenate([worker.keys_of(name, step, rank).numpy() for rank in range(world)]))
    return model


def same(state: dict[str, torch.Tensor], model: oracle.Queue, eps: float) -> None:
    assert (int(state["position"]), int(state["count"])) == (model.position, model.count)
    np.testing.assert_allclose(numpy64(state["rows"][: model.count]), model.rows(), atol=eps)


@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("name", list(worker.ROUNDS))
def test_ranks_equal_one_process(ranks: list[dict[str, Any]], name: str, dtype: torch.dtype, init: str) -> None:
    states = [rank[name][str(dtype), init] for rank in ranks]
    for state in states:
        same(state, one_process(name, len(ranks), dtype, init), EPS[dtype])
        for key, value in states[0].items():
            assert torch.equal(state[key], value)


def test_without_gathering_each_rank_keeps_its_own(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        model = oracle.Queue(worker.SIZE, np.zeros((0, worker.DIM)))
        model.enqueue(worker.keys_of("uneven", 0, rank).numpy())
        same(results["local"], model, 1e-14)


def test_ranks_may_hold_keys_of_different_dtype(ranks: list[dict[str, Any]]) -> None:
    """Rows travel in the dtype of the queue."""
    for results in ranks:
        model = oracle.Queue(worker.SIZE, np.zeros((0, worker.DIM)))
        model.enqueue(np.concatenate([worker.keys_of("even", 0, rank).numpy() for rank in range(len(ranks))]))
        same(results["mixed keys"], model, 1e-6)


@pytest.mark.parametrize(("what", "seen"), [("dim", ("dim 4", "dim 5")), ("dtype", ("float32", "bfloat16"))])
def test_disagreement_raises_on_every_rank(ranks: list[dict[str, Any]], what: str, seen: tuple[str, ...]) -> None:
    for results in ranks:
        assert results[what].startswith("keys: got"), results[what]
        assert all(word in results[what] for word in (*seen, "rank 0", "rank 1", "expected"))


def test_a_caught_disagreement_spoils_nothing(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        same(results["after errors"], one_process("uneven", len(ranks), torch.float64, "empty"), 1e-14)


def test_group_of_one(tmp_path: Path) -> None:
    """A process group with a single rank changes nothing."""
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        same(
            worker.run_rounds("even", 0, torch.float64, "empty"), one_process("even", 1, torch.float64, "empty"), 1e-14
        )
    finally:
        torch.distributed.destroy_process_group()
