"""Threads: nobody feels the other."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import torch
from helpers import BACKENDS, GRADIENTS, check, flat64, make_case, match


def test_threads() -> None:
    """All start at once and take twenty steps, each with sizes of its own."""
    backends = (*BACKENDS, "auto") * 4
    start = threading.Barrier(len(backends))
    sys.setswitchinterval(1e-6)  # at Python's default of 5 ms, threads hardly ever meet inside of a step

    def work(backend: str, seed: int) -> None:
        case = make_case(seed, batch=1 + seed % 3, negatives=17 + seed, dtype=torch.float32)
        found = oracle.match(flat64(case.query), flat64(case.key), mutual=True)
        start.wait(60)
        for _ in range(20):
            seen = match(backend, case.query, case.key, mutual=True)
            assert (seen.index.tolist(), seen.valid.tolist()) == (found.index.tolist(), found.valid.tolist())
            check(backend, case, 1e-5, GRADIENTS[:3])

    with ThreadPoolExecutor(len(backends)) as pool:
        list(pool.map(work, backends, range(len(backends))))
    sys.setswitchinterval(5e-3)


def test_first_calls_race() -> None:
    """In a new process."""
    tests = Path(__file__).parent
    program = f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]}; import test_concurrency as t"
    subprocess.run([sys.executable, "-c", f"{program}; t.test_threads()"], timeout=240, check=True)
