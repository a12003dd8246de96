"""Threads and worker processes: nobody feels the other."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from helpers import BACKENDS, assert_close, expected, flat64, make_case, match, run

from densecl_ops import Correspondence
from densecl_ops.functional import location_correspondence

TESTS = Path(__file__).parent


def race(*backends: str) -> None:
    """A thread for each, all starting at once, fifty steps of its own sizes, against the oracle."""
    start = threading.Barrier(len(backends))
    sys.setswitchinterval(1e-6)  # at Python's default of 5 ms, threads hardly ever meet inside of a step

    def work(backend: str, seed: int) -> None:
        case = make_case(seed, batch=1 + seed % 3, negatives=17 + seed, dtype=torch.float32)
        match_truth = oracle.match(flat64(case.query), flat64(case.key), mutual=True)
        case = replace(case, index=torch.tensor(match_truth.index), valid=torch.tensor(match_truth.valid))
        truth = expected(case)
        start.wait(60)
        steps = [(match(backend, case.query, case.key, mutual=True), run(backend, case)) for _ in range(50)]
        for found, seen in steps:
            assert torch.equal(found.index, case.index)
            assert torch.equal(found.valid, case.valid)
            for name in ("loss", "query", "key", "negatives"):
                assert_close(getattr(seen, name), getattr(truth, name), 1e-5, name)

    with ThreadPoolExecutor(len(backends)) as pool:
        list(pool.map(work, backends, range(len(backends))))
    sys.setswitchinterval(5e-3)


def test_threads() -> None:
    race(*(*BACKENDS, "auto") * 4)


def test_first_calls_race() -> None:
    """In a new process."""
    backends = [*BACKENDS, "auto"] * 4
    done = subprocess.run(
        [sys.executable, "-c", f"from test_concurrency import race; race(*{backends})"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_matching_by_place_in_data_loader_workers(context: str) -> None:
    """The Correspondence comes back from the worker as it would have been made here."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [2, 1, 9, 9]])
    samples = [boxes + torch.tensor([x, 0, x, 0]) for x in range(5)]
    rule = functools.partial(location_correspondence, key_boxes=boxes, query_grid=3)
    loader = torch.utils.data.DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=rule,
        num_workers=1,
        multiprocessing_context=context,
    )
    for seen, sample in zip(loader, samples, strict=True):
        assert isinstance(seen, Correspondence)
        assert all(map(torch.equal, seen, rule(sample)))
