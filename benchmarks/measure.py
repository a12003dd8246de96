"""Time, memory and error of callables, and what machine they were taken on."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import collect_env

import densecl_ops

Row = dict[str, Any]

HOPELESS = 20  # on two cores one rival takes 75 times our time, 23 s: its repetitions would cost more than all others'


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """After eight recompilations of a function dynamo runs it eagerly, without a word; with fullgraph it raises."""
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def compare(
    contestants: Mapping[str, Callable[[Any], Any]],
    inputs: Sequence[Any],
    device: torch.device,
    *,
    seconds: float,
    cold: bool = False,
    needs: Mapping[str, float] | None = None,
) -> dict[str, Row]:
    """Times all contestants in rounds, so that a slow spell of the machine hits all alike.

    Every contestant gets the same share of the time, so a fast one takes part in more rounds. The order of a round is
    drawn: each meets the caches, the memory and the spinning threads that the one before left.

    Args:
        contestants: Each takes one element of `inputs`.
        inputs: Rotated from round to round, so that no run finds its operands where the last one left them.
        device: Where the contestants run.
        seconds: Aimed at for all rounds together, of which there are 3 to 25. A contestant that takes longer than
            its share for one run, and HOPELESS times as long as the fastest, is timed once.
        cold: Whether a GPU's L2 cache is overwritten before every run.
        needs: Bytes that a contestant is known to take: on a CPU there is no error to catch where they are too many.

    Returns:
        Per contestant `milliseconds` (quartiles), `rounds` and `peak_extra_mib`, or `failed` with the reason.
    """
    available = 1024 * _kib("meminfo", "MemAvailable") if Path("/proc/meminfo").exists() else math.inf
    rows: dict[str, Row] = {}
    samples: dict[str, list[float]] = {}
    torch._dynamo.reset()  # so that every case is compiled for its own shapes
    keep_memory()
    for name, run in contestants.items():
        first, need = functools.partial(run, inputs[0]), (needs or {}).get(name, 0)
        try:
            if device.type == "cpu" and need > 0.7 * available:
                raise MemoryError(f"not run, needs about {need / 2**30:.0f} GiB")
            first()  # compiles, loads libraries
            rows[name] = {"peak_extra_mib": peak_extra_mib(first, device)}
            samples[name] = [_seconds(first, device, cold)]
        except Exception as error:  # a rival that cannot serve this dtype or width says so in many ways
            text = re.sub(r"(/[\w.+-]+){2,}", "(path)", str(error).strip().partition("\n")[0])
            rows[name] = {"failed": f"{type(error).__name__}: {text[:160]}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    share = seconds / max(1, len(samples))
    slow = max(share, HOPELESS * min((once for (once,) in samples.values()), default=0.0))
    rounds = {}
    for name, (once,) in samples.items():
        if once <= slow:
            rounds[name] = min(25, max(3, round(share / max(once, 1e-9))))
    draw = random.Random(0)
    for index in range(max(rounds.values(), default=0)):
        gc.collect()
        for name in draw.sample(list(rounds), len(rounds)):
            if index < rounds[name]:
                run = functools.partial(contestants[name], inputs[index % len(inputs)])
                samples[name].append(_seconds(run, device, cold))
    for name, taken in samples.items():
        counted = taken[1:] or taken
        rows[name] |= {"milliseconds": quartiles([1e3 * x for x in counted]), "rounds": len(counted)}
    return rows


def keep_memory() -> None:
    """Has malloc keep what is freed, as the allocators that torch's tuning guide recommends do.

    Else a call pays for giving back the memory of the form before it: after MoCo's lines, 13 ms of 24.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # of glibc
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**25)  # the most that it takes


def _seconds(run: Callable[[], Any], device: torch.device, cold: bool) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    if cold:  # more than any L2; random bytes, as zeros compress
        torch.empty(256 * 2**20, dtype=torch.uint8, device=device).random_()
    torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # about 1 ms: the launches queue up behind it, so their host time is not counted
    marks[0].record()
    run()
    marks[1].record()
    torch.cuda.synchronize()
    return float(marks[0].elapsed_time(marks[1])) / 1e3


def quartiles(samples: list[float]) -> list[float]:
    return [significant(x) for x in (statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3)]


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def peak_extra_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory held during `run` beyond what was held before; None where the system cannot tell.

    On a GPU the allocator's own count. On a CPU the growth of this process's peak resident memory, after the heap's
    free pages have been given back: whatever a run keeps for the next one is not counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # sets the peak back to the present size
    resident = _kib("self/status", "VmRSS")
    run()
    return round((_kib("self/status", "VmHWM") - resident) / 2**10, 1)


def _kib(file: str, field: str) -> int:
    return int(re.findall(rf"{field}:\s+(\d+)", Path("/proc", file).read_text())[0])


def relative_error(value: Tensor, exact: Tensor) -> float:
    return significant(float((value.double() - exact).norm() / exact.norm()), 3)


def environment() -> dict[str, Any]:
    """What a reader needs to place the numbers; no host name or path."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    cpu = models[0] if models else platform.processor()
    gpu = torch.cuda.is_available()
    versions = {package.name: package.version for package in distributions()}
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "device": f"{cpu}, {torch.get_num_threads()} threads",
        "instructions": [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)],
        "load": round(os.getloadavg()[0], 1),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": collect_env.get_nvidia_driver_version(collect_env.run) if gpu else None,  # type: ignore[no-untyped-call]
        "cuda": torch.version.cuda,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: versions.get(name) for name in ("triton", "torchvision")},
        "densecl_ops": densecl_ops.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """Of the tree that is measured, "-dirty" after it where files differ from it.

    The variable COMMIT names it on a machine that .git did not travel to.
    """
    describe = f"git -C '{Path(__file__).parent}' describe --always --dirty --exclude='*'"
    found: str | None = collect_env.run_and_read_all(collect_env.run, describe) or os.environ.get("COMMIT")  # type: ignore[no-untyped-call]
    if not found:
        raise SystemExit("a record names its commit, and there is no .git here: set COMMIT")
    return found
