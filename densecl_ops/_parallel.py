"""Work on a CPU shared out by blocks of rows: each thread takes whole blocks, and its operators run on it alone.

An operator that runs on all threads ends when the slowest does. With other work on the cores it waits for a time slice,
milliseconds each time, and a loop over tiles calls hundreds of operators.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

SERIAL = 2**15 - 1  # numbers that torch's operators leave to the calling thread


def for_blocks(work: Callable[[slice], None], size: int, most: int, least: int = 1) -> None:
    """Calls `work` with slices of even size that cover range(size), on as many threads as torch has.

    The slices depend on nothing but the arguments and that number. `work` writes into tensors made before, without
    gradients.

    Args:
        work: Takes a slice. An error of it is raised here.
        size: How many rows there are.
        most: Rows in a slice at most.
        least: Rows that are worth a thread; with fewer than twice as many the caller does the work, its operators on
            all threads.
    """
    threads = torch.get_num_threads()
    blocks = -(-size // most)
    blocks = max(1, min(-(-blocks // threads) * threads, size // least))
    step = max(1, -(-size // blocks))
    parts = [slice(start, min(size, start + step)) for start in range(0, size, step)]
    if threads == 1 or len(parts) == 1:
        for part in parts:
            work(part)
        return
    inference = torch.is_inference_mode_enabled()

    def run(part: slice) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are settings of a thread
            work(part)

    for _ in _pool(threads, os.getpid()).map(run, parts):
        pass


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept, since a new thread's first products cost MKL 3 ms of buffers; by process, since a fork has no threads."""
    pool = ThreadPoolExecutor(threads, "densecl_ops")
    started = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.get_num_threads()  # the first call of a thread takes over the process's number
        torch.set_num_threads(1)  # of this thread alone, and of those that will be started
        started.wait()

    for _ in pool.map(start, range(threads)):
        pass
    torch.set_num_threads(threads)
    return pool
