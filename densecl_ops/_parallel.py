"""Work on a CPU shared out by blocks of rows: each thread takes whole blocks, and its operators run on it alone.

An operator that runs on all threads ends when the slowest does. With other work on the cores it waits for a time slice,
milliseconds each time, and a loop over tiles calls hundreds of operators.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

SERIAL = 2**15 - 1  # numbers that torch's operators leave to the calling thread

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_IMPORTED_IN = os.getpid()


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
    inference, left = torch.is_inference_mode_enabled(), deque(parts)
    errors: list[BaseException] = []

    def run(_: object) -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():  # both are settings of a thread
                while not errors and (part := _next(left)) is not None:
                    work(part)
        except BaseException as error:  # one that leaves a callback is printed and lost
            errors.append(error)

    region = _openmp()
    if region is not None and os.getpid() == _IMPORTED_IN:
        region(_BODY(run), None, threads, 0)
    else:
        for _ in _pool(threads, os.getpid()).map(run, range(threads)):
            pass
    if errors:
        raise errors[0]


@contextmanager
def serial() -> Iterator[None]:
    """torch's operators run on the calling thread alone, as those of few numbers should: they wait for no other one."""
    threads, set_threads = torch.get_num_threads(), _library_function("omp_set_num_threads")
    if threads == 1 or set_threads is None:
        yield
        return
    set_threads(1)  # of this thread alone
    try:
        yield
    finally:
        set_threads(threads)


def _next(left: deque[slice]) -> slice | None:
    try:
        return left.popleft()
    except IndexError:
        return None


@functools.cache
def _openmp() -> Any:
    """GOMP_parallel(body, data, threads, flags) of the OpenMP that torch runs on, None where it has no such function.

    GNU's and LLVM's have it on Linux. Inside of a region torch's operators run on the thread that calls them. Threads
    of our own would share the cores with those of torch, which spin for some 6 ms after each operator: beside other
    operators they take 18.7 ms for a matching of 32 x 1,024 x 14 x 14, and these take 12.8.
    """
    region = _library_function("GOMP_parallel")
    if region is not None:
        region.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return region


@functools.cache
def _library_function(name: str) -> Any:
    for library in (None, torch._C.__file__):  # as the linker searches: what was preloaded, then what torch loads
        function = getattr(ctypes.CDLL(library), name, None)
        if function is not None:
            function.restype = None
            return function
    return None


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Without that OpenMP, and in a fork, which has none of its threads.

    Kept, since a new thread's first products cost MKL 3 ms of buffers; by process, since a fork has no threads.
    """
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
