"""Blocks of rows on threads of our own: regions, settings of threads, forks, errors, repeats."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import pytest
import torch
from helpers import make_case

from densecl_ops import _parallel
from densecl_ops._parallel import for_blocks, limited
from densecl_ops._processor import matmul


@pytest.fixture(autouse=True, params=["OpenMP", "pool"])
def two_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Threads of OpenMP, and the pool that serves where it is missing."""
    if request.param == "pool":
        monkeypatch.setattr(_parallel, "_region", lambda: None)
    elif _parallel._openmp() is None:
        pytest.skip("no GOMP_parallel")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs libgomp and gcc")
@pytest.mark.parametrize("two_threads", ["OpenMP"], indirect=True)
def test_parallel_regions(tmp_path: Path) -> None:
    """At the end of each, a call waits for its slowest thread."""
    sizes = "1568,4096", "100,4096", "256,4096", "300,66000", "4,2048,7,7", "3,1024,14,14"
    command = [sys.executable, "-m", "benchmarks", "regions", "--seconds", "0", "--device", "cpu", "--sizes", *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([*command, "--out", tmp_path], env=environment, check=True)
    cases = [case["rows"] for case in json.loads((tmp_path / "regions.json").read_text())["cases"]]
    for rows, most in zip(cases, [1, 1, 2, 2, 1, 1, 1, 1, 4, 4, 4, 4], strict=True):
        assert rows["densecl_ops"]["regions"] <= most, rows
        assert rows.get("densecl_ops, with rank", {}).get("regions", 0) <= most, rows
    assert cases[0]["MoCo's lines"]["regions"] > 16  # so something is counted


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("size", "most", "least"), [(0, 5, 1), (1, 5, 1), (10, 5, 1), (11, 5, 1), (31, 64, 16), (7, 1, 1)]
)
def test_blocks_cover_all_rows(threads: int, size: int, most: int, least: int) -> None:
    seen = torch.zeros(size)
    torch.set_num_threads(threads)
    for_blocks(lambda part: seen[part].add_(1), size, most, least)
    assert (seen == 1).all()


def test_settings_of_threads() -> None:
    """One thread for the operators of a block; the caller, later threads and modes are as they were."""
    numbers: list[int] = []
    modes, alone = [], []

    def look(part: slice) -> None:
        alone.append(torch.get_num_threads() == 1 or _parallel._openmp().omp_in_parallel() == 1)
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    for_blocks(look, 8, 2)
    with torch.inference_mode():
        for_blocks(look, 8, 2)
    assert alone == [True] * 8
    assert modes == [(False, False)] * 4 + [(True, False)] * 4
    later = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (numbers[-1], torch.get_num_threads()) == (2, 2)


def test_limited() -> None:
    """Of the calling thread alone, and no longer than asked for."""
    with ThreadPoolExecutor(1) as other, limited(1):
        assert (torch.get_num_threads(), other.submit(torch.get_num_threads).result()) == (1, 2)
    assert torch.get_num_threads() == 2


def test_errors_of_a_block() -> None:
    """They reach the caller, and what the blocks held is free once they are handled."""
    kept = []

    def fail(part: slice) -> None:
        held = torch.zeros(1)
        kept.append(weakref.ref(held))
        if part.start:
            raise ValueError("here")

    gc.disable()
    for _ in range(2):
        with pytest.raises(ValueError, match="here"):
            for_blocks(fail, 8, 2)
    assert not any(held() is not None for held in kept)
    gc.enable()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1")
@pytest.mark.parametrize("two_threads", ["OpenMP"], indirect=True)
def test_errors_of_signals() -> None:
    """What a handler raises while the caller waits to start its blocks, as Ctrl-C may."""
    caller, rounds, armed, caught = threading.get_ident(), 20, False, 0

    def handle(*_: object) -> None:
        raise InterruptedError

    def interrupt() -> None:
        nonlocal armed
        for _ in range(rounds):
            while not armed:  # takes the interpreter's lock when the caller leaves it to start the region
                pass
            armed = False
            signal.pthread_kill(caller, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    other = threading.Thread(target=interrupt)
    other.start()
    for _ in range(rounds):
        try:
            armed = True
            for_blocks(lambda part: None, 2, 1)
            time.sleep(5)  # the signal ends it
        except InterruptedError:
            caught += 1
    other.join()
    signal.signal(signal.SIGUSR1, before)
    assert caught == rounds


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork() -> None:
    """A child has no threads of its parent: it starts its own."""
    case = make_case(0, batch=16, channels=64, query_grid=(2, 2), negatives=4096, dtype=torch.float32)
    for_blocks(lambda part: None, 8, 2)
    helpers.run("blockwise", case, (), rank=False)
    child = os.fork()
    if child == 0:
        for size in (8, 1):  # for all threads and for one
            for_blocks(lambda part: torch.zeros(100_000).exp_(), size, 2)
        helpers.run("blockwise", case, (), rank=False)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}])
@pytest.mark.parametrize("two_threads", ["OpenMP"], indirect=True)
def test_fewer_threads_than_asked_for(limit: dict[str, str]) -> None:
    """oneDNN leaves out parts of a product then, on all threads and in a region of one."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_loss_on_threads and OpenMP"]
    subprocess.run(command, env={**os.environ, **limit}, check=True)


@pytest.mark.parametrize("images", [2, 10, 32], ids=["one tile", "few rows", "many rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_on_threads(two_threads: str, dtype: torch.dtype, images: int) -> None:
    """Repeats agree bit by bit; in inference mode and beside other threads of the user, too."""
    for batch in (2, 3):  # an even number of rows for two threads, and an odd one
        odd = make_case(4, batch=batch, query_grid=(1, 3), negatives=300)
        helpers.check("blockwise", odd, wanted=("query",), rank=False)
        helpers.check("blockwise", odd)
    case = make_case(3, batch=images, query_grid=(7, 7), key_grid=(7, 7), negatives=3000, reduction="none").to(dtype)
    first = helpers.run("blockwise", case)
    with torch.inference_mode():
        loss = helpers.info_nce("blockwise", case.query, case.key, case.negatives, case.index, reduction="none")
    with ThreadPoolExecutor(3) as users:
        results = list(users.map(lambda _: helpers.run("blockwise", case), range(3)))
    helpers.assert_close(loss, first.loss, 1e-6 if dtype == torch.float32 else 1e-2)
    for again in results:
        helpers.assert_same(vars(again), vars(first))
    if two_threads == "pool":
        assert len(_parallel._pool(2, os.getpid())._threads) == 2


def test_products_of_strided_rows() -> None:
    """As fast as others but for a copy: tiles of a (D, K) queue's .T, and columns of a wider matrix."""
    queries, wide = torch.randn(64, 128), torch.randn(128, 8192)
    for rows in (wide.t()[:4096], wide.view(8192, 128).repeat(1, 2)[:4096, :128]):
        seconds = []
        for other in (rows, rows.contiguous()):
            matmul(queries, other.t())
            start = time.perf_counter()
            product = matmul(queries, other.t())
            seconds.append(time.perf_counter() - start)
            helpers.assert_close(product, queries @ rows.t(), 1e-5)
        assert seconds[0] < 0.1 + seconds[1], seconds
