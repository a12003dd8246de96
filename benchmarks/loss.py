"""The loss against everything a user could pick: forward + backward, and forward alone under no_grad.

Every contestant takes the same raw queries and keys, normalises them itself, and in training ends with the gradient of
the mean loss at the queries. Errors are against float64 on the same (rounded) inputs.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rivals
from benchmarks.measure import Row, compare, relative_error, significant
from benchmarks.records import OURS, Shape, Suite
from benchmarks.rivals import TEMPERATURE, Inputs, Loss
from densecl_ops._processor import matmul
from densecl_ops._types import BackendName
from densecl_ops.functional import dense_info_nce
from densecl_ops.info_nce import triton_plan
from densecl_ops.info_nce.triton_plan import Config

NS, KS, DS = (256, 1568, 12544, 50176), (4096, 65536, 1048576), (64, 128, 256)
PLAIN = f"{OURS}, negatives in a plain tensor"
HEADLINE = {"n": 12544, "k": 65536, "d": 128}
HEADLINE_CPU = {"n": 1568, "k": 65536, "d": 128}
# Other tiles for attend_kernel, timed beside the row of the table: what compiles for sm_90 without spills (bfloat16,
# D = 128) and can win. Two or three programs a multiprocessor let the exponentials of one overlap the products of
# another. Whoever finds a better row writes it into densecl_ops/info_nce/triton_plan.py, with the number.
CANDIDATES = (
    Config(64, 128, 4, 3, 2),
    Config(64, 128, 4, 3, 2, descriptor=True),
    Config(64, 64, 4, 3, 3),
)
# Forms that hold N x K logits: copies alive at once, in elements of the input's type (measured at N = 1,568).
COPIES = {"eager": 6, "materialise": 4, "materialise, autocast": 6, "torch.compile": 3, "linear_cross_entropy": 4}


def ours(inputs: Inputs, backend: BackendName = "auto", rank: bool = False) -> Tensor:
    """A queue's rows are known to be unit rows: on a GPU that saves the running maximum, which a plain tensor needs."""
    query, key, rows, filled = inputs
    negatives = rows if filled is None else SimpleNamespace(rows=rows, count=filled, unit_rows=True)
    out = dense_info_nce(query, key, negatives, temperature=TEMPERATURE, return_rank=rank, backend=backend)
    return out if isinstance(out, Tensor) else out[0]


def with_tile(config: Config, inputs: Inputs) -> Tensor:
    with mock.patch.object(triton_plan, "choose", return_value=config):
        return ours(inputs, "triton")


def contestants(device: torch.device, dtype: torch.dtype) -> dict[str, Loss]:
    own: dict[str, Loss] = {OURS: ours, f"{OURS}, with rank": lambda inputs: ours(inputs, rank=True)}
    if device.type == "cuda":
        own[PLAIN] = lambda inputs: ours(inputs._replace(filled=None))
        own["blockwise"] = lambda inputs: ours(inputs, "blockwise")
        if dtype == torch.bfloat16:
            own |= {f"{OURS}, {tuple(config)}": functools.partial(with_tile, config) for config in CANDIDATES}
    return own | {"eager": lambda inputs: ours(inputs, "eager")} | rivals.all_rivals(device, dtype)


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    """The headline first, in every dtype and mode; then the rest of the grid."""
    gpu = arguments.device.type == "cuda"
    if arguments.toy:
        grid = [{"n": 66, "k": 300, "d": 32}]
    elif arguments.size:
        grid = [dict(zip("nkd", arguments.size, strict=True))]
    else:
        first = HEADLINE if gpu else HEADLINE_CPU
        grid = [first] + [{"n": n, "k": k, "d": 128} for k in KS for n in NS if gpu or n * k <= 12544 * 65536]
        grid += [{"n": n, "k": k, "d": d} for d in DS for k in KS for n in NS if gpu or (n, k) == (1568, 65536)]
    unique = [shape for index, shape in enumerate(grid) if shape not in grid[:index]]
    for shape in unique:
        for dtype in arguments.dtypes:
            for mode in arguments.modes:
                for cache in ("warm", "cold") if gpu and shape in (HEADLINE, grid[0]) else ("warm",):
                    yield {**shape, "dtype": dtype, "mode": mode, "cache": cache}


def make_inputs(n: int, k: int, d: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=generator, device=device)

    query, key, queue = random(n).to(dtype), random(n).to(dtype), F.normalize(random(k), dim=1).to(dtype)
    return Inputs(query, key, queue, torch.tensor(k, device=device) if device.type == "cuda" else None)


def step(loss: Loss, inputs: Inputs, train: bool = True) -> tuple[Tensor, Tensor | None]:
    query = inputs.query.detach().requires_grad_(train)
    with torch.set_grad_enabled(train):
        value = loss(inputs._replace(query=query))
    if train:
        value.backward()  # type: ignore[no-untyped-call]
    return value.detach(), query.grad


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Mean loss and its gradient at the raw queries by the textbook formula in float64, some rows at a time."""
    queue, losses, grads = inputs.queue.double(), [], []
    for rows, keys in zip(inputs.query.split(128), inputs.key.split(128), strict=True):  # type: ignore[no-untyped-call]
        query = rows.double().requires_grad_()
        loss = ours(Inputs(query, keys.double(), queue), "eager") * len(rows) / len(inputs.query)
        losses.append(loss.detach())
        grads += torch.autograd.grad(loss, query)
    return torch.stack(losses).sum(), torch.cat(grads)


@torch.no_grad()
def arithmetic(inputs: Inputs, train: bool, tile: int = 512) -> None:
    """The floor on a CPU: both products (one without gradient) and one exponential, tile by tile."""
    mean = torch.zeros_like(inputs.query)
    for rows in inputs.queue[: len(inputs.queue) // tile * tile].split(tile):  # type: ignore[no-untyped-call]
        powers = matmul(inputs.query, rows.t()).exp2_()
        if train:
            mean += matmul(powers, rows)


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    device: torch.device = arguments.device
    n, k, d, dtype, train = shape["n"], shape["k"], shape["d"], getattr(torch, shape["dtype"]), shape["mode"] == "train"
    inputs = [make_inputs(n, k, d, dtype, device, seed) for seed in range(2)]
    entries: dict[str, Callable[[Inputs], Any]] = {
        name: functools.partial(step, loss, train=train) for name, loss in contestants(device, dtype).items()
    }
    if device.type == "cpu" and k >= 512:
        entries["arithmetic"] = lambda one: arithmetic(one, train)
    needs = {name: copies * n * k * dtype.itemsize for name, copies in COPIES.items()}
    cold = shape["cache"] == "cold"
    rows = compare(entries, inputs, device, cold=cold, seconds=arguments.seconds, needs=needs)
    exact_loss, exact_grad = exact(inputs[0])
    flop = (4 if train else 2) * n * k * d
    for name, row in rows.items():
        if "failed" in row:
            continue
        row["tflops"] = significant(1e-9 * flop / row["milliseconds"][1])
        if name != "arithmetic":
            value, grad = entries[name](inputs[0])
            row["error_loss"] = relative_error(value, exact_loss)
            if grad is not None:
                row["error_gradient"] = relative_error(grad, exact_grad)
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs=3, type=int, metavar=("N", "K", "D"), help="default: a grid")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    parser.add_argument("--modes", nargs="+", choices=("train", "forward"), default=["train", "forward"])


SUITE = Suite("loss", "N = {n:,}, K = {k:,}, D = {d}, {dtype}, {mode}, {cache}", shapes, measure, add_options)
