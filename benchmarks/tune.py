"""Times other tile shapes for attend_kernel on this GPU, beside the row of the table it would replace.

Nothing is changed by a run: whoever finds a better row writes it into densecl_ops/info_nce/triton_configs.py, with the
number, and runs the tests. Needs a GPU, or the interpreter (TRITON_INTERPRET=1) to see that it runs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks import loss
from benchmarks.measure import Row, compare, relative_error
from benchmarks.records import OURS, Shape, print_rows, run_suite
from benchmarks.records import add_arguments as add_shared
from benchmarks.rivals import Inputs
from densecl_ops import _devices
from densecl_ops.info_nce import triton_configs
from densecl_ops.info_nce.triton_configs import Config


def candidates(present: Config, d: int, dtype: torch.dtype) -> Iterator[Config]:
    """Tiles around the present row; those that spill or do not fit fail and say so, or lose."""
    chunks = {present.chunk_d, None if d <= 128 and dtype.itemsize == 2 else min(64, d)}
    sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (1, 2), sorted(chunks, key=str))
    for block_n, block_k, warps, stages, programs, chunk in sizes:
        config = Config(block_n, block_k, warps, stages, programs, chunk)
        if config != present and not (programs == 2 and block_n * block_k > 64 * 64):
            yield config


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    sizes = [(33, 100, 16)] if arguments.toy else [(12544, 65536, arguments.d), (1568, 65536, arguments.d)]
    for n, k, d in sizes:
        yield {"n": n, "k": k, "d": d, "dtype": arguments.dtype, "mode": arguments.mode}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    device, dtype = arguments.device, getattr(torch, shape["dtype"])
    inputs = [loss.make_inputs(shape["n"], shape["k"], shape["d"], dtype, device, seed) for seed in range(2)]
    present = triton_configs.choose(_devices.describe(inputs[0].query.device).architecture, dtype, shape["d"])
    run = loss.step if shape["mode"] == "train" else loss.evaluate

    def entry(config: Config) -> Any:
        def timed(one: Inputs) -> Any:
            with mock.patch.object(triton_configs, "choose", return_value=config):
                return run(lambda x: loss.ours(x, "triton"), one)

        return timed

    others = list(candidates(present, shape["d"], dtype))[: 2 if arguments.toy else None]
    entries = {OURS: entry(present)} | {_name(config): entry(config) for config in others}
    rows = compare(entries, inputs, device, cold=False, seconds=arguments.seconds)
    exact, _ = loss.exact(inputs[0])
    for name, row in rows.items():
        if "failed" not in row:
            row["error_loss"] = relative_error(entries[name](inputs[0])[0], exact)
    rows[OURS]["config"] = _name(present)
    return dict(sorted(rows.items(), key=lambda item: item[1].get("milliseconds", [0, float("inf")])[1]))


def _name(config: Config) -> str:
    chunk = f" chunk {config.chunk_d}" if config.chunk_d else ""
    return f"{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages} p{config.programs}{chunk}"


def show(shape: Shape, rows: dict[str, Row], rates: dict[str, float]) -> None:
    title = "N = {n:,}, K = {k:,}, D = {d}, {dtype}, {mode}".format(**shape)
    print_rows(f"{title}; {OURS} is the table's {rows[OURS].get('config')}", rows, {"error_loss": "err loss"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    add_shared(parser)
    parser.add_argument("--d", type=int, default=128, help="channels (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--mode", choices=("train", "forward"), default="train")


def main(arguments: argparse.Namespace) -> None:
    run_suite(
        f"tune-{arguments.dtype}-{arguments.d}-{arguments.mode}",
        shapes(arguments),
        lambda shape: measure(shape, arguments),
        show,
        arguments,
    )
