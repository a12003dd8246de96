"""Queues and in-batch negatives in a process group: every rank has what one process has on the concatenated batch."""

from __future__ import annotations

from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from helpers import torchrun

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module", params=[2, 4])
def passed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The cases that each of 2 and 4 gloo processes went through."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(worker.__file__, folder, processes=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", worker.CASES)
def test_ranks_equal_one_process(passed: list[list[str]], case: str) -> None:
    assert all(case in cases for cases in passed)


def test_group_of_one(tmp_path: Path) -> None:
    """A process group with a single rank changes nothing."""
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        worker.Both(range(1), "empty").feed(name="even")
    finally:
        torch.distributed.destroy_process_group()
