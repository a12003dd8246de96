"""The front page's picture of the method, once for each colour scheme.

    python docs/figures/method.py    # writes docs/images/method-light.png and method-dark.png

The photograph is scikit-image's cat (CC0). The matches drawn are those of `location_correspondence`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import skimage
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from densecl_ops.functional import location_correspondence

IMAGES = Path(__file__).parent.parent / "images"
GRID = 5
BOX_Q, BOX_K = (49, 36, 299, 286), (148, 33, 408, 293)  # x0, y0, x1, y1 of the two crops
FRAMED, OTHERS = 7, (3, 14, 23)  # the query positions whose matches are drawn
SIDE, BOTTOM, LEFT_Q, LEFT_K = 3.6, 4.6, 0.5, 5.9  # of the two views, in a field of 10 x 9
CELL = SIDE / GRID


class Scheme(NamedTuple):
    ink: str
    soft: str
    positive: str
    paper: str
    negative: str = "#D55E00"  # this orange and both blues are told apart by every kind of colour vision


SCHEMES = {
    "light": Scheme(ink="black", soft="#444444", positive="#0072B2", paper="white"),
    "dark": Scheme(ink="white", soft="#c8c8c8", positive="#56B4E9", paper="#131416"),
}


def draw_views(ax: Axes, scheme: Scheme) -> None:
    photograph = skimage.data.chelsea()  # type: ignore[no-untyped-call]
    for (x0, y0, x1, y1), left, title in ((BOX_Q, LEFT_Q, "query view"), (BOX_K, LEFT_K, "key view")):
        extent = (left, left + SIDE, BOTTOM, BOTTOM + SIDE)
        ax.imshow(photograph[y0:y1, x0:x1], extent=extent, interpolation="bicubic")
        for step in np.linspace(0, SIDE, GRID + 1):
            ax.plot([left, left + SIDE], [BOTTOM + step] * 2, color="white", linewidth=0.8, alpha=0.8)
            ax.plot([left + step] * 2, [BOTTOM, BOTTOM + SIDE], color="white", linewidth=0.8, alpha=0.8)
        ax.text(left + SIDE / 2, BOTTOM + SIDE + 0.12, title, ha="center", color=scheme.ink)
    ax.text(5.0, BOTTOM + SIDE + 0.12, "matches", ha="center", color=scheme.soft)


def centre(left: float, position: int) -> tuple[float, float]:
    row, column = divmod(position, GRID)
    return left + (column + 0.5) * CELL, BOTTOM + SIDE - (row + 0.5) * CELL


def draw_matches(ax: Axes, scheme: Scheme) -> None:
    box_q, box_k = (torch.tensor([box], dtype=torch.float32) for box in (BOX_Q, BOX_K))
    index = location_correspondence(box_q, box_k, query_grid=GRID).index[0].tolist()
    for position in OTHERS:
        (x0, y0), (x1, y1) = centre(LEFT_Q, position), centre(LEFT_K, index[position])
        ax.plot([x0, x1], [y0, y1], color=scheme.soft, linewidth=1.2, zorder=3)  # seen between the views
        for x, y, edge in ((x0, y0, LEFT_Q + SIDE), (x1, y1, LEFT_K)):
            ax.plot([x, edge], [y, y0 + (y1 - y0) * (edge - x0) / (x1 - x0)], color="white", linewidth=1.2, zorder=4)
            ax.plot(x, y, color="white", marker="o", markersize=4, zorder=4)
    (x0, y0), (x1, y1) = centre(LEFT_Q, FRAMED), centre(LEFT_K, index[FRAMED])
    ax.plot([x0, x1], [y0, y1], color=scheme.positive, linewidth=2.4, marker="o", zorder=5)
    for x, y in ((x0, y0), (x1, y1)):
        frame = Rectangle((x - CELL / 2, y - CELL / 2), CELL, CELL, fill=False, edgecolor=scheme.positive)
        frame.set(linewidth=2.4, zorder=5)
        ax.add_patch(frame)


def draw_queue(ax: Axes, scheme: Scheme) -> None:
    left, right, bottom, height, rows = 1.4, 8.6, 0.95, 0.75, 12
    shades = np.random.default_rng(0).uniform(0.35, 0.85, rows)
    for x, shade in zip(np.linspace(left, right, rows, endpoint=False), shades, strict=True):
        ax.add_patch(Rectangle((x, bottom), 0.49, height, facecolor=scheme.negative, alpha=shade))
    ax.text(5.0, 0.4, "MomentumQueue: pooled keys of earlier images", ha="center", color=scheme.ink)
    arrow = {"arrowstyle": "-|>", "color": scheme.soft, "linewidth": 1.6}
    middle = bottom + height / 2
    for start, end, label in ((left - 0.95, left - 0.1, "new"), (right, right + 0.9, "oldest")):
        ax.annotate("", (end, middle), (start, middle), arrowprops=arrow)
        ax.text((start + end) / 2, middle + 0.16, label, ha="center", color=scheme.soft)


def draw(scheme: Scheme) -> Figure:
    figure = Figure(figsize=(7, 6.3), dpi=120)
    ax = figure.add_axes((0, 0, 1, 1))
    draw_views(ax, scheme)
    draw_matches(ax, scheme)
    for y, text, colour in (
        (3.6, "For every query position", scheme.ink),
        (3.05, "its match is the positive,", scheme.positive),
        (2.5, "every row of the queue is a negative.", scheme.negative),
    ):
        ax.text(5.0, y, text, ha="center", color=colour, fontweight="bold")
    draw_queue(ax, scheme)
    ax.set(xlim=(0, 10), ylim=(0, 9), aspect="equal")
    ax.set_axis_off()
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["font.size"] = 15
    for name, scheme in SCHEMES.items():
        draw(scheme).savefig(IMAGES / f"method-{name}.png", facecolor=scheme.paper, metadata={"Software": None})
