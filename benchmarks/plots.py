"""Draws records: the curves of docs/training.md, the runs of docs/dense-tasks.md."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.records import RESULTS
from benchmarks.transfer.page import HEADINGS, by_arm, values
from benchmarks.transfer.suite import load


def _finish(axes: Axes, title: str, size: int, x: str = "", y: str = "") -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=size)
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
# Pale and wide below, dark and thin above: neither hides the other.
HEALTHY: dict[str, dict[str, Any]] = {
    "random": {"color": "#8fcdf0", "linewidth": 3.6},
    "random-no-warmup": {"color": "#f5c45e", "linewidth": 3.6},
    "empty": {"color": "#00467a", "linewidth": 1.2},
    "empty-no-warmup": {"color": "#a33c00", "linewidth": 1.2, "linestyle": "--"},
}
BROKEN: dict[str, dict[str, Any]] = {
    "random": {"color": "#c9c9c9", "linewidth": 3.6, "label": "healthy (random queue, warm-up)"},
    "enqueue-first": {"color": "#00795a", "linewidth": 1.2},
    "same-view": {"color": "#b0468a", "linewidth": 1.2, "linestyle": "-."},
    "high-lr": {"color": "#000000", "linewidth": 1.8, "linestyle": ":"},
}


def draw_curves(source: Path, styles: dict[str, dict[str, Any]]) -> Figure:
    """A panel for each column, the step on a log scale."""
    runs = {name: json.loads((source / f"{name}.json").read_text()) for name in styles}
    figure = Figure(figsize=(11, 6.4), layout="constrained", dpi=90)
    ticks = sorted({1, 10, 32, 50, *(len(run["history"]["top1"]) for run in runs.values())})
    # 32: the queue is full; 50: the warm-up ends
    for axes, (column, (title, unit)) in zip(figure.subplots(2, 3).ravel(), CURVES.items(), strict=True):
        for name, run in runs.items():
            # Step n as the mean over n/20 steps either side: nothing is lost at the start, where the axis is wide.
            every = run["history"][column]
            near = [every[max(0, i - (i + 1) // 20) : i + (i + 1) // 20 + 1] for i in range(len(every))]
            style = {"label": run["label"], **styles[name]}
            axes.plot(range(1, len(every) + 1), [statistics.fmean(part) for part in near], **style)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        axes.minorticks_off()
        _finish(axes, title, 11, "step (log scale)", unit)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_runs(source: Path) -> Figure:
    """A panel per dense task; runs of one seed are joined by a line, the bar is the mean."""
    records = load(source)
    arms = by_arm(records)
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", dpi=110)
    for place, (axes, heading) in enumerate(zip(figure.subplots(1, len(HEADINGS)), HEADINGS, strict=True)):
        every = [[values(run)[place] for run in runs.values()] for runs in arms.values()]
        for marker, line in zip("osD", zip(*every, strict=True), strict=True):
            axes.plot(line, marker=marker, color="#0072b2", lw=0.8, ms=4.5, alpha=0.75)
        for i, column in enumerate(every):
            axes.hlines(statistics.mean(column), i - 0.32, i + 0.32, color="#d55e00", lw=2.4)
        _finish(axes, heading, 9)
        if "propagation" in heading:
            axes.axhline(records[0]["test.unmoved"]["miou"], color="#666666", ls=":", lw=1)
            axes.set_xlabel("dotted: labels left\nwhere they were", fontsize=8)
        axes.set_xticks(range(len(arms)), [x.replace("image", "image\nterm") for x in arms], fontsize=8, rotation=45)
        axes.set_xlim(-0.6, len(arms) - 0.4)
        axes.tick_params(axis="y", labelsize=8)
    return figure


PLOTS: dict[str, tuple[str, Callable[[Path], Figure]]] = {  # name under docs/images: folder of results, picture
    "transfer-runs": ("transfer_cpu", draw_runs),
    "curves-healthy": ("curves_cpu", functools.partial(draw_curves, styles=HEALTHY)),
    "curves-broken": ("curves_cpu", functools.partial(draw_curves, styles=BROKEN)),
}


def digest(folder: str) -> str:
    files = sorted((RESULTS / folder).glob("*.json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def save_all(to: Path) -> None:
    """The digest of its source goes into a picture, so that a test can tell a stale one."""
    for name, (folder, draw) in PLOTS.items():
        drawn, note = io.BytesIO(), PngInfo()
        draw(RESULTS / folder).savefig(drawn)
        note.add_text("Source", digest(folder))
        # 128 colours are enough for lines and a third of the bytes.
        picture = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        picture.save(to / f"{name}.png", optimize=True, pnginfo=note)
