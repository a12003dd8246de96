"""The demo's picture: matches by random and by trained weights, and what happened in between."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # a file, never a window

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from densecl_ops import Correspondence
from densecl_ops.visualize import plot_correspondence
from pretraining.stereo import CLOSE, Matches, Pair

RIGHT, WRONG, GREY = "#0072B2", "#D55E00", "#666666"  # told apart by every kind of colour vision


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
    height, width = matches.error.shape
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    error, predicted = matches.error.cpu(), matches.predicted.cpu().long()
    index = predicted[..., 0] * width + predicted[..., 1]
    first = 2 + row * 5 % 12  # staggered, or lines would cover each other; and only where the right answer is known
    drawn = (row % 8 == 3) & (column >= first) & ((column - first) % 12 == 0) & ~error.isnan()
    truth = torch.where(error <= CLOSE, index, (index + 1) % (height * width))  # close is right, by our measure
    chosen = Correspondence(index.view(1, -1), -error.view(1, -1), drawn.view(1, -1))
    left, right, truth, grid = pair.left[0], pair.right[0], truth.flatten(), (height, width)
    plot_correspondence(left, right, chosen, axes, top_k=None, truth=truth, query_grid=grid, vertical=True)
    title = f"{name}: {matches.close:.1%} within {CLOSE} cells, median error {matches.median:.2f} cells"
    axes.set_title(title, fontsize=11)


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
