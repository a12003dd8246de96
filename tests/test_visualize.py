"""densecl_ops.visualize: what is drawn, where and in which colour, against loops over cells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused

from densecl_ops import Correspondence

pytest.importorskip("matplotlib")

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from densecl_ops.visualize import LOOKS, plot_correspondence

GRIDS: dict[str, Any] = {"query_grid": (3, 4), "key_grid": (2, 5)}
IMAGE_Q, IMAGE_K = torch.rand(3, 60, 90), torch.rand(3, 80, 50)


def matches(valid_share: float = 0.7) -> Correspondence:
    return Correspondence(torch.randint(0, 10, (2, 12)), torch.rand(2, 12), torch.rand(2, 12) < valid_share)


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, None])
@pytest.mark.parametrize("judged", [False, True])
def test_lines_join_the_centres_of_the_best_valid_matches(vertical: bool, top_k: int | None, judged: bool) -> None:
    match = matches()
    index, score, valid = (x[1].numpy() for x in match)
    truth = np.where(np.arange(12) % 2 == 0, index, (index + 1) % 10)
    truth[[0, 5]] = -1
    options = {"top_k": top_k, "truth": torch.tensor(truth) if judged else None, "vertical": vertical, **GRIDS}
    axes = plot_correspondence(IMAGE_Q, IMAGE_K, match, sample=1, **options).axes[0]
    left, _, _, top = axes.images[1].get_extent()
    assert (top > 60, left == 0) if vertical else (left > 90, top == 0)  # beyond the query image
    best = sorted((i for i in range(12) if valid[i]), key=lambda i: score[i])  # the last one lies on top
    drawn = best if top_k is None else best[-top_k:]
    ends = {}
    for i in drawn:
        (row, column), (key_row, key_column) = divmod(i, 4), divmod(int(index[i]), 5)
        query = (column + 0.5) * 90 / 4, (row + 0.5) * 60 / 3
        ends[i] = [query, ((key_column + 0.5) * 50 / 5 + left, (key_row + 0.5) * 80 / 2 + top)]
    if not judged:
        (lines,) = [c for c in axes.collections if isinstance(c, LineCollection)]
        np.testing.assert_allclose(np.array(lines.get_segments()), list(ends.values()), atol=1e-4)
        np.testing.assert_allclose(np.asarray(lines.get_array()), score[drawn], atol=1e-7)
        assert axes.get_title() == f"{len(drawn)} of {len(best)} valid matches, by score"
        return
    kinds = ["truth unknown" if truth[i] < 0 else "right" if truth[i] == index[i] else "wrong" for i in range(12)]
    seen = {
        tuple(x.get_xydata().ravel().round(2).tolist()): (x.get_color(), x.get_linestyle(), x.get_marker())
        for x in axes.lines
    }
    assert seen == {tuple(np.ravel(ends[i]).round(2).tolist()): tuple(LOOKS[kinds[i]].values()) for i in drawn}
    known, right = [i for i in best if truth[i] >= 0], [i for i in best if kinds[i] == "right"]
    share = f"{len(right) / len(known):.1%} right ({len(right)} of {len(known)})"  # of all, not only those drawn
    assert axes.get_title() == f"{share}, {len(drawn)} drawn"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {kinds[i] for i in drawn}


@pytest.mark.parametrize("truth", [None, torch.full((12,), -1)])
@pytest.mark.parametrize(("share", "score"), [(-1.0, 0.5), (2.0, 0.5), (2.0, float("nan"))])
def test_nothing_known_nothing_valid_and_scores_without_a_range(
    truth: torch.Tensor | None, share: float, score: float, defaults: None
) -> None:
    with torch.device("cpu"):
        match = matches(share)._replace(score=torch.full((2, 12), score))
    figure = plot_correspondence(np.ones((301, 301)), IMAGE_K, match, truth=truth, **GRIDS)
    count = 12 if share > 0 else 0
    said = f"{count} of {count} valid matches, by score" if truth is None else "no match with known truth, "
    assert figure.axes[0].get_title().startswith(said)
    figure.draw_without_rendering()


RGB = np.random.default_rng(0).random((8, 6, 3)).astype(np.float32)
BYTES = (RGB * 255).astype(np.uint8)
NORMALISED = (RGB - 0.6) / 0.5
SQUARE = Correspondence(torch.zeros(2, 4, dtype=torch.int64), torch.rand(2, 4), torch.ones(2, 4).bool())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB[::-1], RGB[::-1]),
        (BYTES, BYTES / 255.0),
        (RGB[..., 0], RGB[..., :1]),
        (torch.tensor(RGB).permute(2, 0, 1).double().requires_grad_(), RGB),
        (torch.tensor(BYTES).permute(2, 0, 1), BYTES / 255.0),
        (torch.tensor(RGB[..., 0])[None] * 0.5, RGB[..., :1] * 0.5),  # dark, but in range: not stretched
        (NORMALISED, (NORMALISED - NORMALISED.min()) / (NORMALISED.max() - NORMALISED.min())),
        (np.full((4, 4), 7.0), np.zeros((4, 4, 1))),
    ],
)
def test_images(image: Any, expected: np.ndarray) -> None:
    shown = np.asarray(plot_correspondence(image, IMAGE_K, SQUARE).axes[0].images[0].get_array())
    np.testing.assert_allclose((shown - 0.6) / 0.4, np.broadcast_to(expected, shown.shape), atol=2e-6)


def test_given_axes_notebooks_and_tensorboard(tmp_path: Path) -> None:
    figure = Figure()
    assert plot_correspondence(IMAGE_Q, IMAGE_Q, SQUARE, figure.subfigures(1, 2)[1].add_subplot()) is figure
    figure = plot_correspondence(IMAGE_Q, IMAGE_Q, SQUARE)
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    summary = pytest.importorskip("torch.utils.tensorboard")
    with summary.SummaryWriter(str(tmp_path)) as writer:
        writer.add_figure("matches", figure, 3)


@pytest.mark.parametrize(
    ("missing", "printed"),
    [("pyplot", "done"), ("", 'densecl_ops.visualize needs matplotlib: pip install "densecl-ops[plot]"')],
)
def test_needs_matplotlib_but_not_pyplot(missing: str, printed: str) -> None:
    code = f"""import sys, torch, densecl_ops
sys.modules["{f"matplotlib.{missing}".rstrip(".")}"] = None
match = densecl_ops.DenseCorrespondence()(*torch.randn(2, 1, 4, 7, 7))
try:
    densecl_ops.visualize.plot_correspondence(*torch.rand(2, 3, 9, 9), match)
    print("done")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr


TRUTH = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("correspondence: got Tensor, expected a Correspondence", {"match": TRUTH}),
        ("correspondence.index: got shape (4,), expected (B, P)", {"match": SQUARE._replace(index=TRUTH)}),
        ("correspondence.index: got dtype torch.float32", {"match": SQUARE._replace(index=SQUARE.score)}),
        ("correspondence.score: got shape (4,), expected (2, 4)", {"match": SQUARE._replace(score=TRUTH.float())}),
        ("correspondence.valid: got dtype torch.float32", {"match": SQUARE._replace(valid=SQUARE.score)}),
        ("key_grid: got values from 4 to 4, expected", {"match": SQUARE._replace(index=SQUARE.index + 4)}),
        ("query_grid: got None, expected (height, width) of 12 positions", {"match": matches()}),
        ("query_grid: got (1, 3), expected (height, width) of 4 positions", {"query_grid": (1, 3)}),
        ("sample: got 2, expected an int from 0 to 1", {"sample": 2}),
        ("sample: got '0', expected an int from 0 to 1", {"sample": "0"}),
        ("top_k: got 0, expected at least 1", {"top_k": 0}),
        ("vertical: got 1, expected a bool", {"vertical": 1}),
        ("truth: got shape (3,), expected (4,)", {"truth": TRUTH[:3]}),
        ("truth: got dtype torch.float32", {"truth": TRUTH.float()}),
        ("truth: got values from 4 to 4, expected them within 0 to 3", {"truth": TRUTH + 4}),
        ("image_q: got list, expected a torch.Tensor or a numpy array", {"image": [[0.0]]}),
        ("image_q: got shape (3, 8, 6), expected (H, W, 3)", {"image": RGB.transpose(2, 0, 1)}),
        ("image_q: got shape (8, 6, 3), expected (3, H, W)", {"image": torch.tensor(RGB)}),
        ("image_q: got dtype torch.int64, expected uint8 or a float dtype", {"image": IMAGE_Q.long()}),
    ],
)
def test_errors(message: str, options: dict[str, Any]) -> None:
    match, image = options.pop("match", SQUARE), options.pop("image", IMAGE_Q)
    caught = refused(lambda: plot_correspondence(image, IMAGE_K, match, **options))
    assert str(caught.value).startswith(message)
