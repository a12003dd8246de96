"""Times other tiles for attend_kernel on this GPU, beside the row of the table that they would replace.

A run changes nothing: whoever finds a better row writes it into densecl_ops/info_nce/triton_plan.py, with the number,
and runs the tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.measure import Row, compare, relative_error
from benchmarks.records import OURS, Shape, Suite
from benchmarks.rivals import Inputs
from densecl_ops.info_nce import triton_plan
from densecl_ops.info_nce.triton_plan import Config

# What compiles for sm_90 without spills (bfloat16, D = 128) and can win: two or three programs a multiprocessor let the
# exponentials of one overlap the products of another. The most likely first.
CANDIDATES = (
    Config(64, 128, 4, 3, 2),
    Config(64, 128, 4, 3, 2, descriptor=True),
    Config(64, 64, 4, 3, 3),
)


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    for n, k, d in [(33, 100, 16)] if arguments.toy else [(12544, 65536, 128), (1568, 65536, 128)]:
        yield {"n": n, "k": k, "d": d, "dtype": "float32" if arguments.toy else "bfloat16", "mode": "train"}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    dtype = getattr(torch, shape["dtype"])
    inputs = [loss.make_inputs(shape["n"], shape["k"], shape["d"], dtype, arguments.device, seed) for seed in range(2)]

    def ours(config: Config | None, one: Inputs) -> tuple[Tensor, Tensor | None]:
        chosen = mock.patch.object(triton_plan, "choose", return_value=config) if config else nullcontext()
        with chosen:
            return loss.step(lambda x: loss.ours(x, "triton"), one)

    entries = {OURS: partial(ours, None)} | {str(tuple(config)): partial(ours, config) for config in CANDIDATES}
    rows = compare(entries, inputs, arguments.device, seconds=arguments.seconds)
    exact, _ = loss.exact(inputs[0])
    for name, row in rows.items():
        if "failed" not in row:
            row["error_loss"] = relative_error(entries[name](inputs[0])[0], exact)
    return rows


SUITE = Suite("tune", "N = {n:,}, K = {k:,}, D = {d}, {dtype}", shapes, measure)
