"""The loss, forward and backward, against what a user could write instead. CPU for now.

Every contestant takes the same raw queries and keys, normalises them itself, and ends with the gradient of the mean
loss at the queries.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import environment, interleaved, peak_extra_bytes, quartiles, relative_error
from densecl_ops.functional import dense_info_nce

TEMPERATURE = 0.2


class Inputs(NamedTuple):
    query: Tensor  # (N, D) raw
    key: Tensor  # (N, D) raw
    queue: Tensor  # (K, D) unit rows


def materialise(inputs: Inputs) -> Tensor:
    """As MoCo and DenseCL write it, the clone of the queue included."""
    query, key = F.normalize(inputs.query, dim=1), F.normalize(inputs.key, dim=1)
    positive = torch.einsum("nc,nc->n", query, key).unsqueeze(1)
    negative = torch.einsum("nc,kc->nk", query, inputs.queue.clone())
    logits = torch.cat([positive, negative], dim=1)
    logits /= TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def chunked(inputs: Inputs, rows: int = 256) -> Tensor:
    """The same in pieces of the batch, each recomputed in backward."""
    parts = []
    for query, key in zip(inputs.query.split(rows), inputs.key.split(rows), strict=True):  # type: ignore[no-untyped-call]
        part = Inputs(query, key, inputs.queue)
        loss = torch.utils.checkpoint.checkpoint(materialise, part, use_reentrant=False)
        parts.append(loss * len(query))
    return torch.stack(parts).sum() / len(inputs.query)


class _QueueAttention(torch.autograd.Function):
    """Attention with K = V = queue gives log-sum-exp and gradient in one pass: the rival that knows the trick."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        heads = 2 if len(query) % 2 == 0 else 1
        split = query.view(1, heads, -1, query.shape[1])
        rows = queue.expand(1, heads, -1, -1)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mean, lse = attend(split, rows, rows, 0.0, False, scale=1 / TEMPERATURE)
        positive = (query * key).sum(1) / TEMPERATURE
        margin = lse.reshape(-1).float() - positive
        ctx.save_for_backward((mean.reshape(query.shape) - key) * (margin.sigmoid() / TEMPERATURE)[:, None])
        return F.softplus(margin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return row * grad[:, None], None, None


def attention(inputs: Inputs) -> Tensor:
    query, key = F.normalize(inputs.query, dim=1), F.normalize(inputs.key, dim=1)
    return _QueueAttention.apply(query, key, inputs.queue).mean()  # type: ignore[no-untyped-call, no-any-return]


def ours(inputs: Inputs, backend: str = "blockwise", return_rank: bool = False) -> Tensor:
    if return_rank:
        loss, _ = dense_info_nce(*inputs, temperature=TEMPERATURE, backend=backend, return_rank=True)
        return loss
    return dense_info_nce(*inputs, temperature=TEMPERATURE, backend=backend)


CONTESTANTS: dict[str, Callable[[Inputs], Tensor]] = {
    "materialise": materialise,
    "chunked": chunked,
    "attention": attention,
    "eager": lambda inputs: ours(inputs, "eager"),
    "blockwise": ours,
    "blockwise+rank": lambda inputs: ours(inputs, return_rank=True),
}


def make_inputs(n: int, k: int, d: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=generator)

    return Inputs(random(n).to(dtype), random(n).to(dtype), F.normalize(random(k), dim=1).to(dtype))


def step(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    query = inputs.query.detach().requires_grad_()
    value = loss(inputs._replace(query=query))
    value.backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    return value.detach(), query.grad


def floor(inputs: Inputs, tile: int = 512) -> dict[str, float]:
    """Seconds that the arithmetic alone takes: both products and one exp, tile by tile, everything in place."""
    queue = inputs.queue
    logits = torch.empty(len(inputs.query), tile, dtype=queue.dtype)
    mean = torch.zeros_like(inputs.query)
    seconds = dict.fromkeys(("scores", "exp", "mean"), 0.0)
    for start in range(0, len(queue) - tile + 1, tile):
        rows = queue[start : start + tile]
        marks = [time.perf_counter()]
        torch.mm(inputs.query, rows.t(), out=logits)
        marks.append(time.perf_counter())
        logits.exp_()
        marks.append(time.perf_counter())
        mean.addmm_(logits, rows)
        marks.append(time.perf_counter())
        for name, before, after in zip(seconds, marks, marks[1:], strict=False):
            seconds[name] += after - before
    return seconds


def errors(n: int, k: int, d: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Relative error of loss and gradient against float64 on the same (rounded) inputs."""
    inputs = make_inputs(n, k, d, dtype)
    exact_loss, exact_grad = step(chunked, Inputs(*(x.double() for x in inputs)))
    found = {}
    for name, loss in CONTESTANTS.items():
        value, grad = step(loss, inputs)
        found[name] = relative_error(value, exact_loss), relative_error(grad, exact_grad)
    return found


def peak_in_fresh_process(name: str, arguments: argparse.Namespace) -> int | None:
    command = [sys.executable, "-m", "benchmarks", "loss", "--peak-of", name]
    for option in ("n", "k", "d", "dtype"):
        command += [f"--{option}", str(getattr(arguments, option))]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None if answer == "None" else int(answer)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=1568, help="query rows (default: 32 images of 7x7)")
    parser.add_argument("--k", type=int, default=65536, help="negatives")
    parser.add_argument("--d", type=int, default=128, help="channels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the record to this file")
    parser.add_argument("--peak-of", choices=CONTESTANTS, help=argparse.SUPPRESS)


def main(arguments: argparse.Namespace) -> None:
    shape = (arguments.n, arguments.k, arguments.d, getattr(torch, arguments.dtype))
    inputs = make_inputs(*shape)
    if arguments.peak_of:
        step(CONTESTANTS[arguments.peak_of], make_inputs(64, 256, *shape[2:]))  # libraries load outside the count
        print(peak_extra_bytes(lambda: step(CONTESTANTS[arguments.peak_of], inputs)))
        return

    floors: list[dict[str, float]] = []
    contestants: dict[str, Callable[[], Any]] = {
        name: lambda loss=loss: step(loss, inputs)  # type: ignore[misc]
        for name, loss in CONTESTANTS.items()
    }
    seconds = interleaved({**contestants, "floor": lambda: floors.append(floor(inputs))}, arguments.rounds)
    base = quartiles(seconds["materialise"])[1]
    wrong = errors(*shape)
    rows = {}
    for name, samples in seconds.items():
        low, middle, high = quartiles(samples)
        rows[name] = {
            "milliseconds": [round(1e3 * x, 2) for x in (low, middle, high)],
            "ratio_to_materialise": round(middle / base, 4),
        }
        if name in CONTESTANTS:
            peak = peak_in_fresh_process(name, arguments)
            rows[name]["peak_extra_mib"] = None if peak is None else round(peak / 2**20, 1)
            rows[name]["error_loss"], rows[name]["error_gradient"] = wrong[name]
    rows["floor"]["parts_ms"] = {
        part: round(1e3 * quartiles([one[part] for one in floors])[1], 1) for part in floors[0]
    }
    shape_text = f"N = {arguments.n:,}, K = {arguments.k:,}, D = {arguments.d}, {arguments.dtype}"
    record = {
        "what": "loss, forward + backward",
        "shape": {"n": arguments.n, "k": arguments.k, "d": arguments.d, "dtype": arguments.dtype},
        "rounds": arguments.rounds,
        "environment": environment(),
        "rows": rows,
    }
    print_table(shape_text, record)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def print_table(shape: str, record: dict[str, Any]) -> None:
    print(f"Loss, forward + backward, {shape}; median of {record['rounds']} interleaved rounds [quartiles]")
    print(", ".join(f"{key} {value}" for key, value in record["environment"].items() if value))
    head = f"{'':16} {'ms':>9} {'[quartiles]':>20} {'ratio':>7} {'x floor':>8}"
    print(f"{head} {'peak MiB':>9} {'err loss':>9} {'err grad':>9}")
    floor_ms = record["rows"]["floor"]["milliseconds"][1]
    for name, row in record["rows"].items():
        low, middle, high = row["milliseconds"]
        peak, loss, grad = (row.get(key) for key in ("peak_extra_mib", "error_loss", "error_gradient"))
        line = f"{name:16} {middle:9.1f} {f'[{low:.1f}, {high:.1f}]':>20} {row['ratio_to_materialise']:7.3f}"
        line += f" {middle / floor_ms if floor_ms else math.nan:8.2f}"
        line += "" if loss is None else f" {'?' if peak is None else peak:>9} {loss:9.1e} {grad:9.1e}"
        print(line)
