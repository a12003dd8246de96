"""Matching: for every query position the best key position of the same image, against the usual ways to write it.

`--maps` measures how exact they are on the maps of a trained network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, compare, compiled, significant
from benchmarks.records import OURS, Shape, Suite
from densecl_ops.functional import dense_correspondence

SHAPES = ((32, 2048, 7), (256, 2048, 7), (256, 2048, 14), (32, 1024, 14), (32, 512, 28), (16, 256, 56), (16, 256, 112))
Maps = tuple[Tensor, Tensor]


def ours(maps: Maps) -> Tensor:
    return dense_correspondence(*maps).index


def usual(maps: Maps) -> Tensor:
    """As DenseCL writes it: normalise, one batched product, the maximum."""
    query, key = (F.normalize(x.flatten(2), dim=1) for x in maps)
    return torch.bmm(query.transpose(1, 2), key).max(2).indices


def einsum(maps: Maps) -> Tensor:
    """Tokens first, as lightly writes it."""
    query, key = (F.normalize(x.flatten(2).transpose(1, 2), dim=2) for x in maps)
    return torch.einsum("bic,bjc->bij", query, key).argmax(2)


def scaled(maps: Maps) -> Tensor:
    """By hand: no normalised copy of a map; the scores are divided by the key's norm."""
    query, key = (x.flatten(2) for x in maps)
    return (torch.bmm(query.transpose(1, 2), key) * key.square().sum(1, keepdim=True).rsqrt()).argmax(2)


def contestants() -> dict[str, Callable[[Maps], Tensor]]:
    return {
        OURS: ours,
        "normalise, bmm, max": usual,
        "torch.compile of it": compiled(usual),
        "einsum, argmax": einsum,
        "bmm, scale, argmax": scaled,
    }


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    if arguments.maps:
        for path in sorted(arguments.maps.glob("*.pt")):
            _, b, c, grid, _ = torch.load(path).shape
            for dtype in ("float32", "bfloat16"):
                fixed = {"layout": "NCHW", "cache": "warm", "maps": path.stem}
                yield {"b": b, "c": c, "grid": grid, "dtype": dtype, **fixed}
        return
    gpu = arguments.device.type == "cuda"
    sizes = [(2, 16, 5)] if arguments.toy else [s for s in SHAPES if gpu or s[0] * s[1] * s[2] ** 4 <= 2**36]
    for b, c, grid in sizes:
        for dtype in ("float32", "bfloat16"):
            for layout in ("NCHW", "channels_last"):
                for cache in ("cold", "warm") if gpu else ("warm",):
                    yield {"b": b, "c": c, "grid": grid, "dtype": dtype, "layout": layout, "cache": cache}


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Maps:
    generator = torch.Generator(device).manual_seed(seed)
    layout = torch.channels_last if shape["layout"] == "channels_last" else torch.contiguous_format
    size = (shape["b"], shape["c"], shape["grid"], shape["grid"])

    def features() -> Tensor:  # not negative, as after a ReLU
        x = torch.randn(size, generator=generator, device=device).relu_()
        return x.to(getattr(torch, shape["dtype"])).to(memory_format=layout)

    return features(), features()


@torch.no_grad()
def gap(maps: Maps, index: Tensor) -> tuple[float, float, float]:
    """Shares of indices with a score below float64's best, and with the same as its index; the largest score lost."""
    below, tied, lost = 0, 0, 0.0
    for query, key, found in zip(*(x.flatten(2) for x in maps), index, strict=True):
        unit_q, unit_k = (F.normalize(x.double(), dim=0) for x in (query, key))
        for rows, chosen in zip(unit_q.t().split(1024), found.split(1024), strict=True):  # type: ignore[no-untyped-call]
            scores = rows @ unit_k
            best = scores.max(1)
            less = best.values - scores.gather(1, chosen[:, None])[:, 0]
            below += int((less > 1e-15).sum())  # what rounding in float64 can do
            tied += int(((less <= 1e-15) & (best.indices != chosen)).sum())
            lost = max(lost, float(less.max()))
    return below / index.numel(), tied / index.numel(), max(0.0, lost)


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Row]:
    device: torch.device = arguments.device
    if arguments.maps:
        saved = torch.load(arguments.maps / f"{shape['maps']}.pt", device)
        inputs = [tuple(saved.to(getattr(torch, shape["dtype"])))]
    else:
        inputs = [make_inputs(shape, device, seed) for seed in range(2)]
    b, c, positions, size = shape["b"], shape["c"], shape["grid"] ** 2, inputs[0][0].element_size()
    entries, cold = contestants(), shape["cache"] == "cold"
    needs = {name: 3 * b * positions**2 * size for name in entries if name != OURS}
    with torch.no_grad():
        rows = compare(entries, inputs, device, cold=cold, seconds=arguments.seconds, needs=needs)
        for name, row in rows.items():
            if "failed" not in row:
                row["tflops"] = significant(2e-9 * b * positions**2 * c / row["milliseconds"][1])
                row["gb_per_s"] = significant(2e-6 * b * c * positions * size / row["milliseconds"][1])
                errors = gap(inputs[0], entries[name](inputs[0]))
                for error, value in zip(("error_index", "error_tie", "error_score"), errors, strict=True):
                    row[error] = significant(value, 3)
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--maps", type=Path, metavar="FOLDER", help="of (2, B, C, S, S) tensors, of two views, as *.pt")


SUITE = Suite("matching", "{b} x {c} x {grid} x {grid}, {dtype}, {layout}", shapes, measure, add_options)
