"""densecl_ops.visualize: what is drawn, where and in which colour, against loops over cells."""

import importlib
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
def test_lines_join_the_centres_of_the_best_valid_matches(vertical: bool, top_k: int | None) -> None:
    """By score; or, with the truth, by whether they are right."""
    match = matches()
    index, score, valid = (x[1].numpy() for x in match)
    truth = np.where(np.arange(12) % 2 == 0, index, (index + 1) % 10)
    truth[[0, 5]] = -1
    options: dict[str, Any] = {"sample": 1, "top_k": top_k, "vertical": vertical, **GRIDS}
    axes = plot_correspondence(IMAGE_Q, IMAGE_K, match, **options).axes[0]
    left, _, _, top = axes.images[1].get_extent()
    assert (top > 60 and left == 0) if vertical else (left > 90 and top == 0)  # beyond the query image
    best = sorted(np.flatnonzero(valid), key=lambda i: score[i])  # the last one lies on top
    drawn = best if top_k is None else best[-top_k:]
    cells = np.array([(i % 4, i // 4, index[i] % 5, index[i] // 5) for i in drawn])
    ends = ((cells + 0.5) * [90 / 4, 60 / 3, 50 / 5, 80 / 2] + [0, 0, left, top]).reshape(-1, 2, 2)
    (lines,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    np.testing.assert_allclose(np.array(lines.get_segments()), ends, atol=1e-4)
    np.testing.assert_allclose(np.asarray(lines.get_array()), score[drawn], atol=1e-7)
    assert axes.get_title() == f"{len(drawn)} of {len(best)} valid matches, by score"

    axes = plot_correspondence(IMAGE_Q, IMAGE_K, match, truth=torch.tensor(truth), **options).axes[0]
    kinds = np.where(truth < 0, "truth unknown", np.where(truth == index, "right", "wrong"))
    seen = {(*x.get_xydata().ravel().round(2), x.get_color(), x.get_linestyle(), x.get_marker()) for x in axes.lines}
    assert seen == {(*x.ravel().round(2), *LOOKS[kind].values()) for x, kind in zip(ends, kinds[drawn], strict=True)}
    right, known = int((kinds[best] == "right").sum()), int((truth[best] >= 0).sum())  # of all, not only those drawn
    assert axes.get_title() == f"{right / known:.1%} right ({right} of {known}), {len(drawn)} drawn"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(kinds[drawn])


@pytest.mark.parametrize("truth", [None, torch.full((12,), -1)])
@pytest.mark.parametrize(("count", "score"), [(0, 0.5), (12, 0.5), (12, float("nan"))])
def test_nothing_known_nothing_valid_nothing_ranked(truth: Any, count: int, score: float, defaults: None) -> None:
    with torch.device("cpu"):
        match = matches(count / 6 - 0.5)._replace(score=torch.full((2, 12), score))
    figure = plot_correspondence(np.ones((301, 301)), IMAGE_K, match, truth=truth, **GRIDS)
    said = f"{count} of {count} valid matches, by score" if truth is None else "no match with known truth, "
    assert figure.axes[0].get_title().startswith(said)
    figure.draw_without_rendering()


RGB = np.random.default_rng(0).random((8, 6, 3)).astype(np.float32)
BYTES = (RGB * 255).astype(np.uint8)
NORMALISED = (RGB - 0.6) / 0.5
INDEX = torch.zeros(2, 4, dtype=torch.int64)
SQUARE = Correspondence(INDEX, torch.rand(2, 4), torch.ones(2, 4).bool())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB[::-1], RGB[::-1]),
        (BYTES, BYTES / 255.0),
        (RGB[..., 0], RGB[..., :1]),
        (torch.tensor(RGB).permute(2, 0, 1).double().requires_grad_(), RGB),
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


def test_needs_matplotlib_but_not_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_correspondence(IMAGE_Q, IMAGE_Q, SQUARE).draw_without_rendering()
    monkeypatch.delitem(sys.modules, "densecl_ops.visualize")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "densecl-ops\[plot\]"'):
        importlib.import_module("densecl_ops.visualize")


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("correspondence: got Tensor, expected a Correspondence", {"correspondence": INDEX}),
        ("correspondence.score: got shape (4,), expected (B, P)", {"score": SQUARE.score[0]}),
        ("correspondence.index: got shape (4,), expected (2, 4)", {"index": INDEX[0]}),
        ("key_grid: got values from 4 to 4, expected", {"index": INDEX + 4}),
        ("query_grid: got None, expected (height, width) of 12 positions", {"correspondence": matches()}),
        ("sample: got 2, expected an int from 0 to 1", {"sample": 2}),
        ("top_k: got 0, expected at least 1", {"top_k": 0}),
        ("vertical: got 1, expected a bool", {"vertical": 1}),
        ("truth: got shape (3,), expected (4,)", {"truth": INDEX[0, :3]}),
        ("truth: got values from 4 to 4, expected them within 0 to 3", {"truth": INDEX[0] + 4}),
        ("image_q: got list, expected a torch.Tensor or a numpy array", {"image_q": [[0.0]]}),
        ("image_q: got shape (3, 8, 6), expected (H, W, 3)", {"image_q": RGB.transpose(2, 0, 1)}),
        ("image_q: got shape (8, 6, 3), expected (3, H, W)", {"image_q": torch.tensor(RGB)}),
        ("image_q: got a tensor on meta, expected a device that", {"image_q": IMAGE_Q.to("meta")}),
        ("correspondence: got a tensor on meta", {name: x.to("meta") for name, x in SQUARE._asdict().items()}),
        ("image_q: got dtype torch.int64, expected uint8 or a float dtype", {"image_q": IMAGE_Q.long()}),
    ],
)
def test_errors(message: str, options: dict[str, Any]) -> None:
    fields = {name: options.pop(name) for name in SQUARE._fields if name in options}
    call = {"image_q": IMAGE_Q, "image_k": IMAGE_K, "correspondence": SQUARE._replace(**fields)} | options
    refused(lambda: plot_correspondence(**call), message)
