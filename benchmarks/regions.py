"""Parallel regions: how often one call waits for all threads, and its time. `python -m benchmarks.regions --busy 2`.

An exact count that needs no quiet machine: outermost GOMP_parallel calls, by a preloaded library (Linux, gcc).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import loss, rivals
from densecl_ops.functional import dense_correspondence

COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
extern int omp_in_parallel(void);
static long count;
long regions(void) { return count; }
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
  if (threads != 1 && !omp_in_parallel()) __sync_fetch_and_add(&count, 1);
  ((parallel *)dlsym(RTLD_NEXT, "GOMP_parallel"))(body, data, threads, flags);
}
"""
LOSSES: dict[str, rivals.Loss] = {
    "ours": loss.ours,
    "ours with rank": loss.ours_with_rank,
    "attention by hand": lambda inputs: rivals.attention(inputs, rivals.attend_cpu),
    "MoCo's lines": rivals.materialise,
}


def product_then_scale(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    query, key = query.flatten(2), key.flatten(2)
    scores: torch.Tensor = torch.bmm(query.transpose(1, 2), key) / torch.linalg.vector_norm(key, dim=1)[:, None]
    return scores.max(2).indices


def widened(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return product_then_scale(query.float(), key.float())


MATCHES: dict[str, Callable[..., Any]] = {
    "ours": dense_correspondence,
    "bmm, scale, max": product_then_scale,
    "to float32, then the same": widened,
}


def cases(dtypes: list[str], sizes: list[str]) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """Sizes are N,K of a loss with 128 channels, or B,C,S,S of two maps to match."""
    for size in sizes:
        for name in dtypes:
            dtype, numbers = getattr(torch, name), [int(x) for x in size.split(",")]
            if len(numbers) == 2:
                inputs = loss.make_inputs(numbers[0], numbers[1], 128, dtype, torch.device("cpu"))
                yield f"loss {size}, {name}", {k: partial(loss.step, form, inputs) for k, form in LOSSES.items()}
            else:
                maps = torch.randn(2, *numbers).to(dtype)
                yield f"matching {size}, {name}", {k: partial(form, *maps) for k, form in MATCHES.items()}


def count(call: Callable[[], Any], regions: Callable[[], int]) -> int:
    for _ in range(2):
        call()
    before = regions()
    call()
    return regions() - before


def measure(arguments: argparse.Namespace) -> None:
    regions = ctypes.CDLL(os.environ["LD_PRELOAD"]).regions
    for title, calls in cases(arguments.dtypes, arguments.sizes):
        row: dict[str, Any] = {name: {"regions": count(call, regions)} for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end:
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, taken in times.items():
            row[name] |= {"milliseconds": round(median(taken), 3), "runs": len(taken)} if taken else {}
        print(json.dumps({"case": title, "busy": arguments.busy, **row}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    sizes = ["256,4096", "1568,4096", "1568,65536", "32,2048,7,7", "32,1024,14,14"]
    parser.add_argument("--sizes", nargs="+", default=sizes)
    parser.add_argument("--seconds", type=float, default=10, help="for the times of a case, 0 for none")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy meanwhile")
    arguments = parser.parse_args()
    if "DENSECL_REGIONS" in os.environ:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as others:
        source, library = Path(folder) / "regions.c", Path(folder) / "regions.so"
        source.write_text(COUNTER)
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
        for _ in range(arguments.busy):
            other = others.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            others.callback(other.kill)
        environment = {"OMP_NUM_THREADS": "2", **os.environ, "LD_PRELOAD": str(library), "DENSECL_REGIONS": "1"}
        subprocess.run([sys.executable, "-m", "benchmarks.regions", *sys.argv[1:]], env=environment, check=True)


if __name__ == "__main__":
    main()
