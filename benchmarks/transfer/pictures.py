"""Two pictures from the records: every run of every task, and one frame as each arm's features segment it."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from PIL import Image

from benchmarks.transfer.data import CLASSES, VOID, Frames
from benchmarks.transfer.page import by_seed, value
from benchmarks.transfer.pretraining import ARMS
from benchmarks.transfer.records import TASKS, Record
from benchmarks.transfer.tasks import STRIDE

SHORT = {
    **{"random": "random", "image": "image\nterm", "nearest": "nearest", "mutual": "mutual", "place": "place"},
    **{"inbatch": "in-batch", "inbatch_nearest": "in-batch,\nnearest"},
}
TITLES = {
    "random": "random weights",
    "image": "image term alone",
    "nearest": "image + dense, nearest",
    "mutual": "image + dense, mutual",
    "place": "image + dense, same place",
    "inbatch": "image term, in-batch negatives",
    "inbatch_nearest": "image + dense, in-batch",
}
# Okabe and Ito's colours and three neutrals; void is white.
COLOURS = (
    *("#56b4e9", "#999999", "#000000", "#444444", "#cc79a7", "#009e73"),
    *("#f0e442", "#c7a76c", "#0072b2", "#d55e00", "#e69f00", "#ffffff"),
)


def draw_runs(records: list[Record]) -> Figure:
    """A panel per task; runs of one seed are joined by a line, the bar is the mean."""
    arms = [arm for arm in ARMS if by_seed(records, arm)]
    seeds = sorted({record["setting"]["seed"] for record in records})
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", dpi=110)
    for axes, (task, (_, heading)) in zip(figure.subplots(1, len(TASKS)), TASKS.items(), strict=True):
        for seed, marker in zip(seeds, "osD^v<>", strict=False):
            runs = [by_seed(records, arm).get(seed) for arm in arms]
            points = [(i, value(run, task)) for i, run in enumerate(runs) if run is not None]
            axes.plot(*zip(*points, strict=True), marker=marker, color="#0072b2", lw=0.8, ms=4.5, alpha=0.75)
        for i, arm in enumerate(arms):
            mean = statistics.mean(value(run, task) for run in by_seed(records, arm).values())
            axes.hlines(mean, i - 0.32, i + 0.32, color="#d55e00", lw=2.4)
        if task == "propagation":
            axes.axhline(records[0]["test.unmoved"]["miou"], color="#666666", ls=":", lw=1)
            axes.set_xlabel("dotted: labels left\nwhere they were", fontsize=8)
        axes.set_xticks(range(len(arms)), [SHORT[arm] for arm in arms], fontsize=8, rotation=45)
        axes.set_xlim(-0.6, len(arms) - 0.4)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(heading, fontsize=9)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_segmentations(records: list[Record], test: Frames, frame: int) -> Figure:
    """A test frame, its truth, and k-NN retrieval with the features of each arm, all of the lowest seed."""
    seed = min(record["setting"]["seed"] for record in records)
    shown = {arm: by_seed(records, arm)[seed] for arm in ARMS if seed in by_seed(records, arm)}
    figure = Figure(figsize=(11, 4.7), layout=ConstrainedLayoutEngine(h_pad=0.08), dpi=100)
    panels = list(figure.subplots(2, 4).flat)  # frame, truth, at most five arms, legend
    for axes in panels:
        axes.set_axis_off()
    panels[0].imshow(test.images[frame].permute(1, 2, 0).numpy())
    panels[0].set_title("a test frame", fontsize=10)
    _labels(panels[1], test.truth[frame].numpy(), "truth")
    for axes, (arm, record) in zip(panels[2:], shown.items(), strict=False):
        labels = np.array([[int(label, 16) for label in line] for line in record["picture"]])
        _labels(axes, labels.repeat(STRIDE, 0).repeat(STRIDE, 1), TITLES[arm])
    names = [*CLASSES, "not annotated"]
    patches = [Patch(fc=colour, ec="#999999", label=name) for colour, name in zip(COLOURS, names, strict=True)]
    panels[-1].legend(handles=patches, loc="center", ncols=2, frameon=False, fontsize=9)
    return figure


def _labels(axes: Axes, labels: np.ndarray, title: str) -> None:
    axes.imshow(labels, cmap=ListedColormap(COLOURS), vmin=0, vmax=VOID, interpolation="nearest")
    axes.set_title(title, fontsize=10)


def save(figure: Figure, target: Path) -> None:
    """In 256 colours: a third of the bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Software": None})
    with Image.open(target) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(target, optimize=True)
