"""Parallel regions: how often one call waits for all threads, and its time. `--busy 2` keeps both cores busy meanwhile.

An exact count that needs no quiet machine: outermost GOMP_parallel calls, by a preloaded library (Linux, gcc).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import loss, rivals
from benchmarks.measure import Row, compare
from benchmarks.records import OURS, Shape, Suite
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
    OURS: loss.ours,
    f"{OURS}, with rank": partial(loss.ours, rank=True),
    "attention by hand": lambda inputs: rivals.attention(inputs, rivals.attend_cpu),
    "MoCo's lines": rivals.materialise,
}


def product_then_scale(maps: torch.Tensor) -> torch.Tensor:
    query, key = maps.flatten(3)
    scores: torch.Tensor = torch.bmm(query.transpose(1, 2), key) / torch.linalg.vector_norm(key, dim=1)[:, None]
    return scores.max(2).indices


MATCHES: dict[str, Callable[[torch.Tensor], Any]] = {
    OURS: lambda maps: dense_correspondence(*maps),
    "bmm, scale, max": product_then_scale,
    "to float32, then the same": lambda maps: product_then_scale(maps.float()),
}


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    for size in ["66,300"] if arguments.toy else arguments.sizes:
        for dtype in arguments.dtypes:
            yield {"size": size, "dtype": dtype}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    (batch, *rest), dtype = map(int, shape["size"].split(",")), getattr(torch, shape["dtype"])
    inputs: Any
    entries: Mapping[str, Callable[[Any], Any]]
    if len(rest) == 1:
        inputs = loss.make_inputs(batch, rest[0], 128, dtype, arguments.device)
        entries = {name: partial(loss.step, form) for name, form in LOSSES.items()}
    else:
        inputs = torch.randn(2, batch, *rest).to(dtype)
        entries = MATCHES
    found = compare(entries, [inputs], arguments.device, seconds=arguments.seconds)
    regions = ctypes.CDLL(None).regions
    for name, row in found.items():
        before = regions()
        entries[name](inputs)
        row["regions"] = regions() - before
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = ["256,4096", "1568,4096", "12544,4096", "1568,65536", "32,2048,7,7", "32,1024,14,14"]
    parser.add_argument("--sizes", nargs="+", default=sizes, help="N,K of a loss, or B,C,S,S of two maps to match")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])


SUITE = Suite("regions", "{size}, {dtype}", shapes, measure, add_options)
add_arguments = SUITE.add_arguments


def main(arguments: argparse.Namespace) -> None:
    """Runs the same command once more, in a process with the counter."""
    if hasattr(ctypes.CDLL(None), "regions"):
        SUITE.main(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "regions.c"), Path(folder, "regions.so")
        source.write_text(COUNTER)
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
        environment = {"OMP_NUM_THREADS": "2", **os.environ, "LD_PRELOAD": str(library)}
        subprocess.run([sys.executable, *sys.orig_argv[1:]], env=environment, check=True)
