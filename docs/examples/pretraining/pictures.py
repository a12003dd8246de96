"""The demo's picture: how far the matches of random and of trained weights are off, and the training in between."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pretraining.stereo import CLOSE, Matches, Pair

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # told apart by every kind of colour vision
LIMITS = (0, 0.5, CLOSE, 5, 15, 100)  # cells; blue up to CLOSE, which counts as right, orange beyond
COLOURS = ListedColormap(["#08519c", "#6baed6", "#fdbe85", "#fd8d3c", "#a63603"])


def draw(pair: Pair, matches: dict[str, Matches], arm: str, history: Tensor, warmup: int, path: Path) -> None:
    """The left image as every kind of weights matches it, above the image itself and the curves of the training."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 6.9), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.25, 1])[:, 0]
        panels = upper.subplots(1, len(matches), squeeze=False).ravel()
        for axes, (name, result) in zip(panels, matches.items(), strict=True):
            draw_errors(axes, pair, result, name)
        scale = ScalarMappable(BoundaryNorm(LIMITS, COLOURS.N), COLOURS)
        bar = upper.colorbar(scale, ax=panels, orientation="horizontal", aspect=60, shrink=0.6, pad=0.03)
        bar.set_label(f"distance of a cell's match from the measured place, in cells (right: up to {CLOSE})")
        bar.set_ticks(LIMITS, labels=[*(f"{limit:g}" for limit in LIMITS[:-1]), "more"])
        photo, losses, accuracy = lower.subplots(1, 3)
        photo.imshow(pair.left[0].permute(1, 2, 0).cpu().numpy())
        photo.set_axis_off()
        photo.set_title("the left image,\nto be matched with the right one", fontsize=10)
        draw_history(losses, accuracy, arm, history, warmup)
        figure.savefig(path, format="png", dpi=100)
    with Image.open(path) as picture:  # 256 colours: a third of the bytes
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, "PNG", optimize=True)


def draw_errors(axes: Axes, pair: Pair, matches: Matches, name: str) -> None:
    """Every measured cell of the left image in the colour of its error; grey where nothing was measured."""
    grey = pair.left[0].mean(0).cpu().numpy()
    error = np.ma.masked_invalid(matches.error.cpu().numpy())
    axes.imshow(0.5 + 0.5 * grey, cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    norm = BoundaryNorm(LIMITS, COLOURS.N)
    axes.imshow(error, cmap=COLOURS, norm=norm, extent=extent, alpha=0.8, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{name}: {matches.close:.1%} right,\nmedian error {matches.median:.2f} cells", fontsize=11)


def draw_history(losses: Axes, accuracy: Axes, arm: str, history: Tensor, warmup: int) -> None:
    """Both terms on the left, the contrastive accuracy on the right; pale as measured, dark as a running mean."""
    image, dense, share = history.numpy().T
    for axes, values, colour, style, label in (
        (losses, image, BLUE, "-", "image term"),
        (losses, dense, ORANGE, "--", "dense term"),
        (accuracy, share, GREY, "-", None),
    ):
        steps, window = np.arange(1, len(values) + 1), min(20, len(values))
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[: len(smooth)] + window / 2, smooth, style, color=colour, label=label)
        axes.set_xlabel("step")
        if 0 < warmup < len(values):
            axes.axvline(warmup, color=GREY, linewidth=0.8, linestyle=":")
    losses.set_title(f"{arm}: loss\n(dotted: the dense term joins in)", fontsize=10)
    losses.set_ylabel("nats")
    losses.legend(frameon=False)
    accuracy.set_title(f"{arm}: positions\nwhose match beats every negative", fontsize=10)
    accuracy.set_ylabel("share")
    accuracy.set_ylim(0, 1.02)
