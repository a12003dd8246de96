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
from functools import partial
from itertools import repeat
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
    if threads == 1 or (len(parts) == 1 and usable(threads) > 1):
        for part in parts:
            work(part)
        return
    inference, left = torch.is_inference_mode_enabled(), deque(parts)
    errors: deque[BaseException] = deque(maxlen=1)

    def run() -> Iterator[None]:
        try:
            yield  # where a thread takes over
            with torch.inference_mode(inference), torch.no_grad():  # both are settings of a thread
                while not errors and (part := _next(left)) is not None:
                    work(part)
        except BaseException as error:  # one that leaves a callback is printed and lost
            errors.append(error)

    # A signal's handler may run at the first step of a function, before any `try` of it: 1 to 5 % of interrupts in the
    # first 0.3 ms of a call were lost. A generator's next step is inside.
    runs = [run() for _ in range(threads)]
    for waiting in runs:
        next(waiting)
    region = _region() if usable(threads) > 1 else None
    if region is not None:
        region(_BODY(partial(next, map(next, runs, repeat(None)))), None, threads, 0)
    else:
        for _ in _pool(threads, os.getpid()).map(next, runs, repeat(None)):
            pass
    for waiting in runs:  # OpenMP may start fewer threads
        next(waiting, None)
    if errors:
        raise errors.pop()  # kept, it would keep itself and the tensors of its frames until a garbage collection


def usable(threads: int) -> int:
    """How many threads an operator may take of so many: one in a fork, where operators on all never end."""
    return threads if os.getpid() == _IMPORTED_IN and has_full_teams(threads) else 1


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """torch's operators run on so many threads, of the calling thread alone: those of few numbers are best on one."""
    before, library = torch.get_num_threads(), _openmp()
    if threads == before or library is None:
        yield
        return
    try:
        library.omp_set_num_threads(threads)  # of this thread alone
        yield
    finally:
        library.omp_set_num_threads(before)


def _next(left: deque[slice]) -> slice | None:
    try:
        return left.popleft()
    except IndexError:
        return None


@functools.cache
def _region() -> Callable[..., None] | None:
    """GOMP_parallel(body, data, threads, flags) of the OpenMP that torch runs on, None where there is none.

    GNU's and LLVM's have it on Linux. Inside of a region torch's operators run on the thread that calls them, but not
    in a region of one thread. Threads of our own would share the cores with those of torch, which spin for some 6 ms
    after each operator: beside other operators they take 18.7 ms for a matching of 32 x 1,024 x 14 x 14, and these take
    12.8.
    """
    function = getattr(_openmp(), "GOMP_parallel", None)
    if function is None:
        return None
    function.restype, function.argtypes = None, [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    region: Callable[..., None] = function
    return region


@functools.cache
def has_full_teams(threads: int) -> bool:
    """Whether OpenMP starts as many threads as it is asked for; else oneDNN leaves out parts of a product."""
    library = _openmp()
    if threads == 1 or library is None:
        return True
    return bool(library.omp_get_thread_limit() >= threads and not library.omp_get_dynamic())


@functools.cache
def _openmp() -> Any:
    """The library that torch's calls of OpenMP reach, as far as it can be found."""
    names = (None, torch._C.__file__) if os.name == "posix" else ()  # None, what was preloaded, is an error on Windows
    return next((x for x in map(ctypes.CDLL, names) if hasattr(x, "GOMP_parallel")), None)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Without that OpenMP, and in a fork, which has no threads of its parent: so by process.

    Kept, since a new thread's first products cost MKL 3 ms of buffers.
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
