"""densecl_ops.visualize: what is drawn, where and in which colour, against loops over cells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from densecl_ops import Correspondence, DenseCorrespondence

pytest.importorskip("matplotlib")

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from densecl_ops.visualize import RIGHT, UNKNOWN, WRONG, plot_correspondence

QUERY, KEY = (3, 4), (2, 5)  # grids
IMAGE_Q, IMAGE_K = torch.rand(3, 60, 90), torch.rand(3, 80, 50)


def matches(valid_share: float = 0.7) -> Correspondence:
    return Correspondence(torch.randint(0, 10, (2, 12)), torch.rand(2, 12), torch.rand(2, 12) < valid_share)


def segment(figure: Figure, match: Correspondence, sample: int, i: int) -> list[np.ndarray]:
    """Both ends of the line of query position i; the key image starts where the figure puts it."""
    left, _, _, top = figure.axes[0].images[1].get_extent()
    ends = []
    for position, grid, size, start in (
        (i, QUERY, (60, 90), (0, 0)),
        (int(match.index[sample, i]), KEY, (80, 50), (left, top)),
    ):
        row, column = divmod(position, grid[1])
        ends.append(np.array([(column + 0.5) * size[1] / grid[1], (row + 0.5) * size[0] / grid[0]]) + start)
    return ends


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("top_k", [1, 4, None])
def test_lines_join_the_centres_of_the_best_valid_matches(vertical: bool, sample: int, top_k: int | None) -> None:
    match = matches()
    figure = plot_correspondence(
        IMAGE_Q, IMAGE_K, match, top_k=top_k, sample=sample, query_grid=QUERY, key_grid=KEY, vertical=vertical
    )
    left, _, _, top = figure.axes[0].images[1].get_extent()
    assert (top > 60, left == 0) if vertical else (left > 90, top == 0)  # beyond the query image
    chosen = sorted((i for i in range(12) if match.valid[sample, i]), key=lambda i: float(match.score[sample, i]))
    chosen = chosen if top_k is None else chosen[-top_k:]  # the best one last, on top
    (lines,) = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    expected = [segment(figure, match, sample, i) for i in chosen]
    np.testing.assert_allclose(np.array(lines.get_segments()), expected, atol=1e-4)
    np.testing.assert_allclose(np.asarray(lines.get_array()), match.score[sample, chosen], atol=1e-7)
    valid = int(match.valid[sample].sum())
    assert figure.axes[0].get_title() == f"{len(chosen)} of {valid} valid matches, by score"


@pytest.mark.parametrize("top_k", [None, 3])
def test_truth_decides_colour_style_and_share(top_k: int | None) -> None:
    match = matches(0.8)
    truth = torch.where(torch.arange(12) % 2 == 0, match.index[0], (match.index[0] + 1) % 10)
    truth[[0, 5]] = -1
    figure = plot_correspondence(
        IMAGE_Q, IMAGE_K, match, top_k=top_k, truth=truth, query_grid=QUERY, key_grid=KEY, vertical=True
    )
    looks = {"right": (RIGHT, "-", "o"), "wrong": (WRONG, "--", "X"), "unknown": (UNKNOWN, ":", ".")}
    expected, kinds = {}, []
    for i in range(12):
        if match.valid[0, i]:
            kinds.append("unknown" if truth[i] < 0 else "right" if truth[i] == match.index[0, i] else "wrong")
            expected[tuple(np.concatenate(segment(figure, match, 0, i)).round(2).tolist())] = looks[kinds[-1]]
    seen = {
        tuple(line.get_xydata().ravel().round(2).tolist()): (
            line.get_color(),
            line.get_linestyle(),
            line.get_marker(),
        )
        for line in figure.axes[0].lines
    }
    assert seen.items() <= expected.items()
    assert len(seen) == (top_k or len(expected))
    right, known = (
        kinds.count("right"),
        len(kinds) - kinds.count("unknown"),
    )  # the share is of all, not only those drawn
    assert figure.axes[0].get_title() == f"{right / known:.1%} right ({right} of {known}), {len(seen)} drawn"
    if top_k is None:
        texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert texts == ["truth unknown", "right", "wrong"]


@pytest.mark.parametrize("truth", [None, torch.full((12,), -1)])
@pytest.mark.parametrize("score", [float("nan"), 0.5])
@pytest.mark.parametrize("share", [-1.0, 2.0])
def test_nothing_known_nothing_valid_and_scores_without_a_range(
    truth: torch.Tensor | None, score: float, share: float, defaults: None
) -> None:
    with torch.device("cpu"):
        match = matches(share)._replace(score=torch.full((2, 12), score))
    figure = plot_correspondence(np.ones((301, 301)), IMAGE_K, match, truth=truth, query_grid=QUERY, key_grid=KEY)
    count = 12 if share > 0 else 0
    said = f"{count} of {count} valid matches, by score" if truth is None else "no match with known truth, "
    assert figure.axes[0].get_title().startswith(said)
    figure.draw_without_rendering()


RGB = np.random.default_rng(0).random((8, 6, 3)).astype(np.float32)
BYTES = (RGB * 255).astype(np.uint8)
NORMALISED = (RGB - 0.45) / 0.22


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB[::-1], RGB[::-1]),
        (BYTES, BYTES / 255.0),
        (RGB[..., 0], RGB[..., :1]),
        (torch.tensor(RGB).permute(2, 0, 1).double().requires_grad_(), RGB),
        (torch.tensor(BYTES).permute(2, 0, 1), BYTES / 255.0),
        (torch.tensor(RGB[..., 0])[None], RGB[..., :1]),
        (torch.tensor(RGB[..., 0]) * 0.5, RGB[..., :1] * 0.5),  # dark, but in range: not stretched
        (NORMALISED, (NORMALISED - NORMALISED.min()) / (NORMALISED.max() - NORMALISED.min())),
        (np.full((4, 4), 7.0), np.zeros((4, 4, 1))),
    ],
)
def test_images(image: Any, expected: np.ndarray) -> None:
    match = Correspondence(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4), torch.ones(1, 4).bool())
    shown = np.asarray(plot_correspondence(image, IMAGE_K, match).axes[0].images[0].get_array())
    np.testing.assert_allclose((shown - 0.6) / 0.4, np.broadcast_to(expected, shown.shape), atol=2e-6)


@pytest.mark.parametrize("size", [(64, 64), (40, 200), (200, 40)])
@pytest.mark.parametrize("vertical", [False, True])
def test_everything_lies_inside_the_figure(size: tuple[int, int], vertical: bool) -> None:
    match = DenseCorrespondence()(torch.randn(1, 8, 7, 7), torch.randn(1, 8, 7, 7))
    image = torch.rand(3, *size)
    for truth in (None, torch.arange(49)):
        figure = plot_correspondence(image, image, match, truth=truth, vertical=vertical)
        figure.draw_without_rendering()
        box, inches = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0, inches[0] - box.x1, inches[1] - box.y1) > -0.01


def test_given_axes_notebooks_and_tensorboard(tmp_path: Path) -> None:
    match = DenseCorrespondence()(torch.randn(1, 8, 7, 7), torch.randn(1, 8, 7, 7))
    figure = Figure()
    assert plot_correspondence(IMAGE_Q, IMAGE_Q, match, figure.subfigures(1, 2)[1].add_subplot()) is figure
    figure = plot_correspondence(IMAGE_Q, IMAGE_Q, match)
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    summary = pytest.importorskip("torch.utils.tensorboard")
    with summary.SummaryWriter(str(tmp_path)) as writer:
        writer.add_figure("matches", figure, 3)


@pytest.mark.parametrize(
    ("first", "last", "printed"),
    [
        ("", "plot_correspondence(image, image, match); print('matplotlib.pyplot' in sys.modules)", "False"),
        (
            "sys.modules['matplotlib'] = None",
            "",
            'densecl_ops.visualize needs matplotlib: pip install "densecl-ops[plot]"',
        ),
    ],
)
def test_imports(first: str, last: str, printed: str) -> None:
    code = f"""import sys, torch, densecl_ops
{first}
try:
    from densecl_ops.visualize import plot_correspondence
except ImportError as error:
    print(error)
features, image = torch.randn(1, 4, 7, 7), torch.rand(3, 9, 9)
match = densecl_ops.DenseCorrespondence()(features, features)
{last}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr


SQUARE = Correspondence(torch.zeros(2, 4, dtype=torch.int64), torch.rand(2, 4), torch.ones(2, 4).bool())
TRUTH = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("correspondence: got Tensor, expected a Correspondence", {"match": TRUTH}),
        (r"correspondence.index: got shape \(4,\), expected \(B, P\)", {"match": SQUARE._replace(index=TRUTH)}),
        ("correspondence.index: got dtype torch.float32", {"match": SQUARE._replace(index=SQUARE.score)}),
        (r"correspondence.score: got shape \(4,\), expected \(2, 4\)", {"match": SQUARE._replace(score=TRUTH)}),
        ("key_grid: got indices from 4 to 4, expected", {"match": SQUARE._replace(index=SQUARE.index + 4)}),
        ("query_grid: got None for 12 positions, no square; expected", {"match": matches()}),
        (r"query_grid: got \(1, 3\), expected a grid of 4 positions", {"query_grid": (1, 3)}),
        ("sample: got 2, expected 0 to 1", {"sample": 2}),
        ("sample: got True, expected an int", {"sample": True}),
        ("top_k: got 0, expected at least 1", {"top_k": 0}),
        ("vertical: got 1, expected a bool", {"vertical": 1}),
        (r"truth: got shape \(3,\), expected \(4,\)", {"truth": TRUTH[:3]}),
        ("truth: got dtype torch.float32", {"truth": TRUTH.float()}),
        ("truth: got indices from -2 to -2, expected them within -1 to 3", {"truth": TRUTH - 2}),
        ("image_q: got list, expected a torch.Tensor or a numpy array", {"image": [[0.0]]}),
        (r"image_q: got shape \(3, 8, 6\), expected \(H, W, 3\)", {"image": RGB.transpose(2, 0, 1)}),
        (r"image_q: got shape \(8, 6, 3\), expected \(3, H, W\)", {"image": torch.tensor(RGB)}),
        ("image_q: got dtype torch.int64, expected uint8 or a float dtype", {"image": IMAGE_Q.long()}),
    ],
)
def test_errors(message: str, options: dict[str, Any]) -> None:
    match, image = options.pop("match", SQUARE), options.pop("image", IMAGE_Q)
    with pytest.raises((TypeError, ValueError), match=message):
        plot_correspondence(image, IMAGE_K, match, **options)
