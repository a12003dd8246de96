"""The demo's picture: matches by random and by trained weights, and what happened in between."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # a file, never a window

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from stereo import CLOSE, Matches, Pair
from torch import Tensor

RIGHT, WRONG, GREY = "#0072B2", "#D55E00", "#666666"  # told apart by every kind of colour vision
GAP = 24  # pixels between the two images


def draw(pair: Pair, random: Matches, trained: Matches, history: Tensor, warmup: int, folder: Path) -> None:
    """Writes folder/matches.png."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 11.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1])
    draw_matches(figure.add_subplot(grid[0, 0]), pair, random, "random weights")
    draw_matches(figure.add_subplot(grid[0, 1]), pair, trained, "trained")
    draw_history(figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1]), history, warmup)
    figure.savefig(folder / "matches.png", dpi=100)
    plt.close(figure)
    with Image.open(folder / "matches.png") as picture:  # 256 colours: a third of the bytes
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(folder / "matches.png", optimize=True)


def draw_matches(axes: Axes, pair: Pair, matches: Matches, name: str) -> None:
    """The left image above the right one, and a line from every few cells of it to its match."""
    left, right = (image[0].permute(1, 2, 0).cpu().numpy() for image in (pair.left, pair.right))
    height, width = left.shape[:2]
    canvas = np.concatenate([left, np.ones((GAP, width, 3), np.float32), right])
    axes.imshow(0.45 * canvas + 0.55, interpolation="antialiased")  # pale, so that the lines stand out
    axes.set_axis_off()
    title = f"{name}: {matches.close:.1%} within {CLOSE} cells, median error {matches.median:.2f} cells"
    axes.set_title(title, fontsize=11)

    error, predicted = matches.error.cpu().numpy(), matches.predicted.cpu().numpy()
    centre = pair.stride / 2
    for row in range(3, error.shape[0], 8):
        for column in range(2 + row * 5 % 12, error.shape[1], 12):  # staggered, or lines would cover each other
            if np.isnan(error[row, column]):
                continue
            y, x = predicted[row, column] * pair.stride + centre
            ends_x, ends_y = [column * pair.stride + centre, x], [row * pair.stride + centre, y + height + GAP]
            if error[row, column] <= CLOSE:
                axes.plot(ends_x, ends_y, "-o", color=RIGHT, linewidth=0.9, markersize=3, zorder=2)
            else:
                axes.plot(ends_x, ends_y, "--X", color=WRONG, linewidth=0.9, markersize=4.5, zorder=3)
    axes.plot([], [], "-o", color=RIGHT, markersize=3, label=f"right (within {CLOSE} cells)")
    axes.plot([], [], "--X", color=WRONG, markersize=4.5, label="wrong")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)


def draw_history(losses: Axes, accuracy: Axes, history: Tensor, warmup: int) -> None:
    """Both terms on the left, the contrastive accuracy on the right; pale as measured, dark as a running mean."""
    image, dense, share = history.numpy().T
    for axes, values, colour, style, label in (
        (losses, image, RIGHT, "-", "image term"),
        (losses, dense, WRONG, "--", "dense term"),
        (accuracy, share, GREY, "-", "accuracy"),
    ):
        axes.plot(values, color=colour, alpha=0.2, linewidth=0.8)
        window = min(20, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window // 2, smooth, style, color=colour, label=label)
        axes.set_xlabel("step")
        if 0 < warmup < len(values):
            axes.axvline(warmup, color=GREY, linewidth=0.8, linestyle=":")
    losses.set_title("loss terms (dotted line: the dense term joins in)", fontsize=11)
    losses.legend(frameon=False)
    accuracy.set_title("contrastive accuracy: matches that beat every negative", fontsize=11)
    accuracy.set_ylim(0, 1.02)
