"""Draws records: the loss suite's (time against N and K, memory and share of the matrix rate against N), and curves."""

from __future__ import annotations

import hashlib
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.curves import BROKEN, HEALTHY

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


def draw_loss(record: dict[str, Any], dtype: str) -> Figure:
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


CURVES = {
    "image_loss": "image term",
    "dense_loss": "dense term",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "match_score": "match score",
    "mutual_share": "mutual share",
}


def draw_curves(runs: dict[str, dict[str, Any]]) -> Figure:
    """Six panels of healthy runs, three of broken ones, the step on a log scale."""
    blue, orange = "#0072b2", "#d55e00"
    healthy = dict(zip(HEALTHY, ((blue, "-"), (blue, "--"), (orange, "-"), (orange, "--")), strict=True))
    broken = dict(zip(BROKEN, (("#009e73", "--"), ("#cc79a7", "-."), ("black", ":")), strict=True))
    figure = Figure(figsize=(11, 9.5), layout="constrained", dpi=90)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2, 1.05]).ravel()
    upper.suptitle("Healthy runs: 1,024 negatives are full after 32 steps, lambda warms up for 50", fontsize=12)
    lower.suptitle("Broken runs, 150 steps", fontsize=12)
    for axes, column in zip(upper.subplots(2, 3).ravel(), CURVES, strict=True):
        _curves(axes, column, {runs[name]["label"]: (runs[name], style) for name, style in healthy.items()})
    reference = {"healthy (random queue, warm-up)": (runs["random"], ("#666666", "-"))}
    for axes, column in zip(lower.subplots(1, 3).ravel(), CURVES, strict=False):
        _curves(axes, column, reference | {runs[name]["label"]: (runs[name], style) for name, style in broken.items()})
    for part in (upper, lower):
        part.legend(*part.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curves(axes: Axes, column: str, lines: Mapping[str, tuple[dict[str, Any], tuple[str, str]]]) -> None:
    for label, (run, (colour, style)) in lines.items():
        values = smooth(run["history"][column])
        axes.plot(range(1, len(values) + 1), values, style, color=colour, linewidth=1.4, label=label)
    axes.set_xscale("log")
    axes.set_xticks([1, 10, 32, 50, 150, 400], ["1", "10", "32", "50", "150", "400"])
    axes.minorticks_off()
    axes.set_title(CURVES[column], fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: list[float]) -> list[float]:
    """Step n as the mean over n/20 steps either side: nothing is lost at the start, where the axis is wide."""
    reach = [(i + 1) // 20 for i in range(len(values))]
    return [statistics.fmean(values[max(0, i - near) : i + near + 1]) for i, near in enumerate(reach)]


def digest(source: Path) -> str:
    """Of a result file, or of all in a folder."""
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def save(figure: Figure, source: Path, target: Path) -> None:
    """The digest of its source goes into the picture, so that a test can tell a stale one."""
    drawn, note = io.BytesIO(), PngInfo()
    figure.savefig(drawn)
    note.add_text("Source", digest(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    # 128 colours are enough for lines and a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True, pnginfo=note)
