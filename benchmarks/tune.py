"""Times other tile shapes for attend_kernel on this GPU, beside the row of the table it would replace.

Nothing is changed by a run: whoever finds a better row writes it into densecl_ops/info_nce/triton_plan.py, with the
number, and runs the tests. Needs a GPU, or the interpreter (TRITON_INTERPRET=1) to see that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.measure import Row, compare, relative_error
from benchmarks.records import OURS, Shape, Suite, print_rows
from benchmarks.rivals import Inputs
from densecl_ops import _triton
from densecl_ops._types import BackendName
from densecl_ops.info_nce import triton_plan
from densecl_ops.info_nce.triton_plan import Config

# What compiles for sm_90 without spills (16 bits, D = 128) and can win: two or three programs per multiprocessor let
# the exponentials of one overlap the products of another. The most likely first. Ranks take registers of their own.
CANDIDATES = (
    Config(64, 128, 4, 3, 2),
    Config(64, 128, 4, 3, 2, descriptor=True),
    Config(64, 128, 4, 2, 2),
    Config(64, 64, 4, 3, 3),
    Config(128, 32, 8, 3, 2),
)
WITH_RANK = (Config(64, 128, 4, 3, 2), Config(128, 64, 8, 3))


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    sizes = [(33, 100, 16)] if arguments.toy else [(12544, 65536, arguments.d), (1568, 65536, arguments.d)]
    for n, k, d in sizes:
        yield {"n": n, "k": k, "d": d, "dtype": arguments.dtype, "mode": arguments.mode}


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    device: torch.device = arguments.device
    dtype = getattr(torch, shape["dtype"])
    inputs = [loss.make_inputs(shape["n"], shape["k"], shape["d"], dtype, device, seed) for seed in range(2)]
    architecture = _triton.describe(device).architecture
    present = triton_plan.choose(architecture, dtype, shape["d"])
    run = loss.step if shape["mode"] == "train" else loss.evaluate

    def entry(config: Config, form: Callable[[Inputs, BackendName], Tensor]) -> Callable[[Inputs], Any]:
        def timed(one: Inputs) -> Any:
            with mock.patch.object(triton_plan, "choose", return_value=config):
                return run(lambda x: form(x, "triton"), one)

        return timed

    entries = {OURS: entry(present, loss.ours)}
    for config in CANDIDATES:
        chunked = config._replace(chunk_d=present.chunk_d)
        if not config.descriptor or triton_plan.tile_by_descriptor(architecture, chunked, shape["d"]):
            entries[_name(config)] = entry(chunked, loss.ours)
    for config in (present, *WITH_RANK):
        entries[f"rank, {_name(config)}"] = entry(config._replace(chunk_d=present.chunk_d), loss.ours_with_rank)
    rows = compare(entries, inputs, device, cold=False, seconds=arguments.seconds)
    exact_loss, exact_gradient = loss.exact(inputs[0])
    for name, row in rows.items():
        if "failed" in row:
            continue
        value, gradient = entries[name](inputs[0])
        row["error_loss"] = relative_error(value, exact_loss)
        if gradient is not None:
            row["error_gradient"] = relative_error(gradient, exact_gradient)
    rows[OURS]["config"] = _name(present)
    return dict(sorted(rows.items(), key=lambda item: item[1].get("milliseconds", [0, float("inf")])[1]))


def _name(config: Config) -> str:
    chunk = f" chunk {config.chunk_d}" if config.chunk_d else ""
    form = " descriptor" if config.descriptor else ""
    tile = f"{config.block_n}x{config.block_k}"
    return f"{tile} w{config.num_warps} s{config.num_stages} p{config.programs}{chunk}{form}"


def show(shape: Shape, rows: dict[str, Row], rates: dict[str, float]) -> None:
    title = "N = {n:,}, K = {k:,}, D = {d}, {dtype}, {mode}".format(**shape)
    print_rows(
        f"{title}; {OURS} is the table's {rows[OURS].get('config')}",
        rows,
        {"error_loss": "err loss", "error_gradient": "err grad"},
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d", type=int, default=128, help="channels (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--mode", choices=("train", "forward"), default="train")


SUITE = Suite("tune", shapes, measure, show, add_options)
