"""Draws records: the loss suite's (time against N and K, memory and rate against N), curves, and the dense tasks'."""

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

from benchmarks.transfer.page import by_seed, value
from benchmarks.transfer.pretraining import ARMS
from benchmarks.transfer.records import TASKS, Record

# Okabe and Ito's colours, told apart by colour-blind readers as well. Lines get thinner from the first to the last, so
# that none hides another; ours is the wide black one below all.
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
    n = statistics.mode(case["shape"]["n"] for case in cases)  # the N with most K
    against_k = sorted((c for c in cases if c["shape"]["n"] == n), key=lambda c: int(c["shape"]["k"]))

    figure = Figure(figsize=(9.6, 7.2), layout="constrained", dpi=110)
    (time_n, time_k), (memory, rate) = figure.subplots(2, 2)
    _panel(time_n, against_n, "n", "milliseconds", "time against N, K = 65,536", "ms")
    _panel(time_k, against_k, "k", "milliseconds", f"time against K, N = {n:,}", "ms")
    _panel(memory, against_n, "n", "peak_extra_mib", "extra memory against N, K = 65,536", "MiB")
    _panel(rate, against_n, "n", "tflops", "4 N K D operations; dashed: large matrix products", "TFLOP/s")
    best = max(run["rates"][f"matmul_{dtype}_tflops"] for run in record["runs"])  # a busy moment can only lower it
    rate.axhline(best, color="0.4", linestyle="--", linewidth=1)
    rate.set_yscale("linear")
    rate.set_ylim(bottom=0)
    environment = record["runs"][-1]["environment"]
    device = environment["gpu"] or environment["device"]
    figure.suptitle(f"Loss forward + backward, {dtype}, D = 128; {device}, torch {environment['torch']}", fontsize=11)
    handles = {label: line for line, label in zip(*time_n.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _panel(axes: Axes, cases: list[Case], along: str, value: str, title: str, unit: str) -> None:
    for place, (name, (label, colour, marker)) in enumerate(STYLES.items()):
        points = []
        for case in cases:
            row = case["rows"].get(name, {"failed": ""})
            if "failed" not in row and value in row:
                number = row[value][1] if value == "milliseconds" else row[value]
                points.append((case["shape"][along], max(number, 0.1) if value == "peak_extra_mib" else number))
        if points:
            size, width, order = (8 - 0.6 * place, 3 - 0.3 * place, 2)
            if name == "densecl_ops":
                size, width, order = (13, 5, 1)
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": size, "lw": width, "zorder": order}
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({case["shape"][along] for case in cases})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(along.upper())
    axes.set_ylabel(unit)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


CURVES = {  # column: (title, unit)
    "image_loss": ("image term", "loss in nats"),
    "dense_loss": ("dense term", "loss in nats"),
    "top1": ("top-1 accuracy", "share of positions"),
    "top5": ("top-5 accuracy", "share of positions"),
    "match_score": ("match score", "mean cosine"),
    "mutual_share": ("mutual share", "share of positions"),
}
Style = dict[str, Any]
WIDE, THIN = {"linewidth": 3.6}, {"linewidth": 1.2}  # pale and wide below, dark and thin above: neither hides the other


def draw_healthy(runs: dict[str, dict[str, Any]]) -> Figure:
    """Both starts of the queue, with and without warm-up of lambda."""
    styles = {
        "random": {"color": "#8fcdf0"} | WIDE,
        "random-no-warmup": {"color": "#f5c45e"} | WIDE,
        "empty": {"color": "#00467a"} | THIN,
        "empty-no-warmup": {"color": "#a33c00", "linestyle": "--"} | THIN,
    }
    return _draw_curves({runs[name]["label"]: (runs[name], style) for name, style in styles.items()})


def draw_broken(runs: dict[str, dict[str, Any]]) -> Figure:
    """Every broken run as far as it went, above a healthy one."""
    styles = {
        "enqueue-first": {"color": "#00795a"} | THIN,
        "same-view": {"color": "#b0468a", "linestyle": "-."} | THIN,
        "high-lr": {"color": "#000000", "linestyle": ":"} | THIN | {"linewidth": 1.8},
    }
    healthy = {"healthy (random queue, warm-up)": (runs["random"], {"color": "#c9c9c9"} | WIDE)}
    return _draw_curves(healthy | {runs[name]["label"]: (runs[name], style) for name, style in styles.items()})


def _draw_curves(lines: Mapping[str, tuple[dict[str, Any], Style]]) -> Figure:
    """A panel for each column, the step on a log scale."""
    figure = Figure(figsize=(11, 6.4), layout="constrained", dpi=90)
    lengths = {len(run["history"]["top1"]) for run, _ in lines.values()}
    ticks = sorted({1, 10, 32, 50, *lengths})  # 32: the queue is full; 50: the warm-up ends
    for axes, (column, (title, unit)) in zip(figure.subplots(2, 3).ravel(), CURVES.items(), strict=True):
        for label, (run, style) in lines.items():
            values = smooth(run["history"][column])
            axes.plot(range(1, len(values) + 1), values, label=label, **style)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step (log scale)")
        axes.set_ylabel(unit)
        _plain(axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def smooth(values: list[float]) -> list[float]:
    """Step n as the mean over n/20 steps either side: nothing is lost at the start, where the axis is wide."""
    reach = [(i + 1) // 20 for i in range(len(values))]
    return [statistics.fmean(values[max(0, i - near) : i + near + 1]) for i, near in enumerate(reach)]


def draw_runs(records: list[Record]) -> Figure:
    """A panel per dense task; runs of one seed are joined by a line, the bar is the mean."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", dpi=110)
    for axes, (task, (_, heading)) in zip(figure.subplots(1, len(TASKS)), TASKS.items(), strict=True):
        every = [[value(run, task) for _, run in sorted(by_seed(records, arm).items())] for arm in ARMS]
        for marker, line in zip("osD", zip(*every, strict=True), strict=True):
            axes.plot(line, marker=marker, color="#0072b2", lw=0.8, ms=4.5, alpha=0.75)
        for i, values in enumerate(every):
            axes.hlines(statistics.mean(values), i - 0.32, i + 0.32, color="#d55e00", lw=2.4)
        if task == "propagation":
            axes.axhline(records[0]["test.unmoved"]["miou"], color="#666666", ls=":", lw=1)
            axes.set_xlabel("dotted: labels left\nwhere they were", fontsize=8)
        axes.set_xticks(
            range(len(ARMS)), [arm.replace("image", "image\nterm") for arm in ARMS], fontsize=8, rotation=45
        )
        axes.set_xlim(-0.6, len(ARMS) - 0.4)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(heading, fontsize=9)
        _plain(axes)
    return figure


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
