"""Draws records: the loss suite's (time against N and K, memory and rate against N), curves, and the dense tasks'."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.records import RESULTS
from benchmarks.transfer.page import HEADINGS, by_arm, values
from benchmarks.transfer.suite import load

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


def draw_loss(source: Path, dtype: str) -> Figure:
    """Four panels of training (forward + backward) at D = 128 in one dtype."""
    record = json.loads(source.read_text())
    wanted = {"d": 128, "dtype": dtype, "mode": "train", "cache": "warm"}
    cases = [case for case in record["cases"] if wanted.items() <= case["shape"].items()]
    n = statistics.mode(case["shape"]["n"] for case in cases)  # the N with most K
    panels = (
        ("n", "milliseconds", "time against N, K = 65,536", "ms"),
        ("k", "milliseconds", f"time against K, N = {n:,}", "ms"),
        ("n", "peak_extra_mib", "extra memory against N, K = 65,536", "MiB"),
        ("n", "tflops", "4 N K D operations; dashed: large matrix products", "TFLOP/s"),
    )
    figure = Figure(figsize=(9.6, 7.2), layout="constrained", dpi=110)
    for axes, (along, value, title, unit) in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
        fixed = {"n": ("k", 65536), "k": ("n", n)}[along]
        shown = sorted((c for c in cases if fixed in c["shape"].items()), key=lambda c: int(c["shape"][along]))
        for place, (name, (label, colour, marker)) in enumerate(STYLES.items()):
            rows = [(case["shape"][along], case["rows"].get(name, {})) for case in shown]
            points = [(x, row[value][1] if value == "milliseconds" else row[value]) for x, row in rows if value in row]
            size, width, order = (13, 5, 1) if name == "densecl_ops" else (8 - 0.6 * place, 3 - 0.3 * place, 2)
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": size, "lw": width, "zorder": order}
            lowest = 0.1 if value == "peak_extra_mib" else 0  # the scale is a logarithm's
            if points:
                axes.plot([x for x, _ in points], [max(y, lowest) for _, y in points], label=label, **style)
        axes.set(xscale="log", yscale="log")
        ticks = sorted({case["shape"][along] for case in shown})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        _finish(axes, title, 10, along.upper(), unit)
    best = max(run["rates"][f"matmul_{dtype}_tflops"] for run in record["runs"])  # a busy moment can only lower it
    axes.axhline(best, color="0.4", linestyle="--", linewidth=1)
    axes.set_yscale("linear")
    axes.set_ylim(bottom=0)
    environment = record["runs"][-1]["environment"]
    device = environment["gpu"] or environment["device"]
    figure.suptitle(f"Loss forward + backward, {dtype}, D = 128; {device}, torch {environment['torch']}", fontsize=11)
    _legend(figure, fontsize=9)
    return figure


def _finish(axes: Axes, title: str, size: int, x: str = "", y: str = "") -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=size)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, **options: Any) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, **options)


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
    _legend(figure)
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
        labels = [arm.replace("image", "image\nterm") for arm in arms]
        axes.set_xticks(range(len(arms)), labels, fontsize=8, rotation=45)
        axes.set_xlim(-0.6, len(arms) - 0.4)
        axes.tick_params(axis="y", labelsize=8)
    return figure


def plots() -> Iterator[tuple[str, Path, Callable[[Path], Figure]]]:
    """Name under docs/images, results, and how they are drawn, of every plot there should be."""
    yield "transfer-runs", RESULTS / "transfer_cpu", draw_runs
    yield "curves-healthy", RESULTS / "curves_cpu", functools.partial(draw_curves, styles=HEALTHY)
    yield "curves-broken", RESULTS / "curves_cpu", functools.partial(draw_curves, styles=BROKEN)
    for source in sorted(RESULTS.glob("*/loss.json")):
        shapes = [case["shape"] for case in json.loads(source.read_text())["cases"]]
        if len({shape["n"] for shape in shapes if shape["k"] == 65536}) > 1:  # else nothing to draw against N
            for dtype in sorted({shape["dtype"] for shape in shapes}):
                yield f"loss-{source.parent.name}-{dtype}", source, functools.partial(draw_loss, dtype=dtype)


def digest(source: Path) -> str:
    """Of a result file, or of all in a folder."""
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def save_all(folder: Path) -> None:
    """The digest of its source goes into a picture, so that a test can tell a stale one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source, draw in plots():
        drawn, note = io.BytesIO(), PngInfo()
        draw(source).savefig(drawn)
        note.add_text("Source", digest(source))
        # 128 colours are enough for lines and a third of the bytes.
        picture = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        picture.save(folder / f"{name}.png", optimize=True, pnginfo=note)
