"""Draws the loss suite's records: time against N and K, memory and share of the matrix rate against N."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Okabe and Ito's colours, told apart by colour-blind readers as well; ours is the black line, drawn last.
STYLES = {
    "materialise": ("materialised", "#d55e00", "o"),
    "torch.compile": ("torch.compile of it", "#e69f00", "s"),
    "chunked": ("in chunks, recomputed", "#cc79a7", "v"),
    "linear_cross_entropy": ("linear_cross_entropy", "#009e73", "^"),
    "linear_cross_entropy, chunks": ("linear_cross_entropy, chunks", "#56b4e9", "<"),
    "attention, flash": ("flash attention by hand", "#0072b2", "D"),
    "attention, cuDNN": ("cuDNN attention by hand", "#56b4e9", "P"),
    "densecl_ops": ("densecl_ops", "#000000", "*"),
}
Case = dict[str, Any]


def draw(record: dict[str, Any], dtype: str) -> Figure:
    """Four panels of training (forward + backward) at D = 128 in one dtype."""
    wanted = {"d": 128, "dtype": dtype, "mode": "train", "cache": "warm"}
    cases = [case for case in record["cases"] if wanted.items() <= case["shape"].items()]
    against_n = sorted((c for c in cases if c["shape"]["k"] == 65536), key=lambda c: int(c["shape"]["n"]))
    counts: dict[int, int] = {}
    for case in cases:
        counts[case["shape"]["n"]] = counts.get(case["shape"]["n"], 0) + 1
    n = max(counts, key=lambda n: counts[n])  # the N with most K
    against_k = sorted((c for c in cases if c["shape"]["n"] == n), key=lambda c: int(c["shape"]["k"]))

    figure = Figure(figsize=(9.6, 7.2), layout="constrained", dpi=110)
    (time_n, time_k), (memory, share) = figure.subplots(2, 2)
    _panel(time_n, against_n, "n", "milliseconds", "time against N, K = 65,536", "ms")
    _panel(time_k, against_k, "k", "milliseconds", f"time against K, N = {n:,}", "ms")
    _panel(memory, against_n, "n", "peak_extra_mib", "extra memory against N, K = 65,536", "MiB")
    _panel(share, against_n, "n", "share_of_matmul", "4 N K D operations, share of the measured matrix rate", "")
    share.set_yscale("linear")
    share.set_ylim(bottom=0)
    environment = record["runs"][-1]["environment"]
    device = environment["gpu"] or environment["device"]
    figure.suptitle(f"Loss forward + backward, {dtype}, D = 128; {device}, torch {environment['torch']}", fontsize=11)
    handles = {label: line for line, label in zip(*time_n.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _panel(axes: Axes, cases: list[Case], along: str, value: str, title: str, unit: str) -> None:
    for name, (label, colour, marker) in STYLES.items():
        points = []
        for case in cases:
            row = case["rows"].get(name, {"failed": ""})
            if "failed" not in row and value in row:
                number = row[value][1] if value == "milliseconds" else row[value]
                points.append((case["shape"][along], max(number, 0.1) if value == "peak_extra_mib" else number))
        if points:
            ours = name == "densecl_ops"
            size, width = (11, 2.2) if ours else (5, 1.3)
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, ms=size, lw=width)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({case["shape"][along] for case in cases})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(along.upper())
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def save(figure: Figure, source: Path, target: Path) -> None:
    """The digest of its source goes into the picture, so that a test can tell a stale one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Source": digest(source), "Software": None})
