"""densecl_ops.visualize: what is drawn, where and in which colour, against loops over cells; and pixels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from densecl_ops import Correspondence, DenseCorrespondence

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from densecl_ops.visualize import RIGHT, WRONG, plot_correspondence

QUERY, KEY = (3, 4), (2, 5)  # grids
IMAGE_Q, IMAGE_K = torch.rand(3, 60, 90), torch.rand(3, 80, 50)


def matches(valid_share: float = 0.7) -> Correspondence:
    index = torch.randint(0, 10, (2, 12))
    return Correspondence(index, torch.rand(2, 12), torch.rand(2, 12) < valid_share)


def centre(position: int, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    row, column = divmod(position, grid[1])
    return np.array([(column + 0.5) * size[1] / grid[1], (row + 0.5) * size[0] / grid[0]])


def shift_of(figure: Figure) -> np.ndarray:
    """Where the drawn key image starts: x and y."""
    left, _, _, top = figure.axes[0].images[1].get_extent()
    return np.array([left, top])


def segments(figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    (lines,) = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    return np.array(lines.get_segments()), np.asarray(lines.get_array())


def rendered(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("top_k", [1, 4, 100, None])
def test_lines_join_the_centres_of_the_best_valid_matches(vertical: bool, sample: int, top_k: int | None) -> None:
    match = matches()
    figure = plot_correspondence(
        IMAGE_Q, IMAGE_K, match, top_k=top_k, sample=sample, query_grid=QUERY, key_grid=KEY, vertical=vertical
    )
    shift = shift_of(figure)
    assert shift[int(vertical)] > (60 if vertical else 90)  # beyond the query image
    assert shift[int(not vertical)] == 0
    chosen = sorted((i for i in range(12) if match.valid[sample, i]), key=lambda i: float(match.score[sample, i]))
    chosen = chosen if top_k is None else chosen[-top_k:]  # the best one last, on top
    assert len(chosen) >= 1
    drawn, colour = segments(figure)
    expected = [
        [centre(i, QUERY, (60, 90)), centre(int(match.index[sample, i]), KEY, (80, 50)) + shift] for i in chosen
    ]
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    np.testing.assert_allclose(colour, match.score[sample, chosen], atol=1e-7)
    valid = int(match.valid[sample].sum())
    assert figure.axes[0].get_title() == f"{len(chosen)} of {valid} valid matches, by score"
    left, right = figure.axes[0].get_xlim()
    bottom, top = figure.axes[0].get_ylim()
    assert (left <= drawn[..., 0]).all()
    assert (drawn[..., 0] <= right).all()
    assert (top <= drawn[..., 1]).all()
    assert (drawn[..., 1] <= bottom).all()


def test_truth_decides_colour_style_and_share() -> None:
    match = matches(0.8)
    truth = torch.where(torch.arange(12) % 2 == 0, match.index[0], (match.index[0] + 1) % 10)
    truth[[0, 5]] = -1
    figure = plot_correspondence(
        IMAGE_Q, IMAGE_K, match, top_k=None, truth=truth, query_grid=QUERY, key_grid=KEY, vertical=True
    )
    shift, seen = shift_of(figure), {}
    for line in figure.axes[0].lines:
        seen[tuple(line.get_xydata().ravel().round(2).tolist())] = (
            line.get_color(),
            line.get_linestyle(),
            line.get_marker(),
        )
    looks = {"right": (RIGHT, "-", "o"), "wrong": (WRONG, "--", "X"), "unknown": ("#666666", ":", ".")}
    expected, right, known = {}, 0, 0
    for i in range(12):
        if match.valid[0, i]:
            kind = "unknown" if truth[i] < 0 else "right" if truth[i] == match.index[0, i] else "wrong"
            ends = centre(i, QUERY, (60, 90)), centre(int(match.index[0, i]), KEY, (80, 50)) + shift
            expected[tuple(np.concatenate(ends).round(2).tolist())] = looks[kind]
            right, known = right + (kind == "right"), known + (kind != "unknown")
    assert seen == expected
    assert len({look[0] for look in seen.values()}) == 3
    share = f"{100 * right / known:.1f}% right ({right} of {known}), {len(expected)} drawn"
    assert figure.axes[0].get_title() == share
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["right", "truth unknown", "wrong"]
    few = plot_correspondence(IMAGE_Q, IMAGE_K, match, top_k=3, truth=truth, query_grid=QUERY, key_grid=KEY)
    assert few.axes[0].get_title() == share.replace(f"{len(expected)} drawn", "3 drawn")  # the share is of all
    assert len(few.axes[0].lines) == 3


def test_nothing_known_and_nothing_valid() -> None:
    nothing = torch.full((12,), -1)
    unknown = plot_correspondence(IMAGE_Q, IMAGE_K, matches(2.0), truth=nothing, query_grid=QUERY, key_grid=KEY)
    assert unknown.axes[0].get_title() == "no match with known truth, 12 drawn"
    for truth in (None, nothing):
        empty = plot_correspondence(IMAGE_Q, IMAGE_K, matches(-1.0), truth=truth, query_grid=QUERY, key_grid=KEY)
        assert empty.axes[0].get_title().startswith(("0 of 0 valid", "no match with known truth, 0 drawn"))
        assert rendered(empty).std() > 0


@pytest.mark.parametrize("with_truth", [False, True])
def test_whatever_the_default_dtype_and_device(defaults: None, with_truth: bool) -> None:
    index = torch.tensor([[3, 2, 1, 0]], device="cpu")
    match = Correspondence(index, torch.ones_like(index, dtype=torch.float32), index >= 0)
    truth = torch.tensor([3, 0, 1, -1], device="cpu") if with_truth else None
    figure = plot_correspondence(np.ones((301, 301)), IMAGE_K, match, truth=truth)
    ends = [line.get_xydata() for line in figure.axes[0].lines] if with_truth else segments(figure)[0]
    shift = shift_of(figure)
    expected = [[*centre(i, (2, 2), (301, 301)), *(centre(3 - i, (2, 2), (80, 50)) + shift)] for i in range(4)]
    drawn = np.array([np.asarray(end).ravel() for end in ends])
    np.testing.assert_allclose(
        drawn[np.lexsort(drawn.T)], np.array(expected)[np.lexsort(np.array(expected).T)], atol=1e-4
    )


@pytest.mark.parametrize("score", [float("nan"), 0.5])
def test_scores_without_a_range(score: float) -> None:
    match = Correspondence(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), score), torch.ones(1, 4).bool())
    figure = plot_correspondence(IMAGE_Q, IMAGE_K, match)
    assert len(segments(figure)[0]) == 4
    assert rendered(figure).std() > 0


def drawn_image(image: object) -> np.ndarray:
    """The query image as handed to matplotlib, without the fading to white."""
    match = Correspondence(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4), torch.ones(1, 4).bool())
    shown = np.asarray(plot_correspondence(image, IMAGE_K, match).axes[0].images[0].get_array())
    assert shown.dtype == np.float32
    return (shown - 0.6) / 0.4


RGB = np.random.default_rng(0).random((8, 6, 3)).astype(np.float32)
BYTES = (RGB * 255).astype(np.uint8)
NORMALISED = (RGB - 0.45) / 0.22


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, RGB),
        (RGB[::-1], RGB[::-1]),
        (BYTES, BYTES / 255.0),
        (RGB[..., :1], RGB[..., :1]),
        (RGB[..., 0], RGB[..., :1]),
        (torch.tensor(RGB).permute(2, 0, 1), RGB),
        (torch.tensor(RGB).permute(2, 0, 1).double().requires_grad_(), RGB),
        (torch.tensor(BYTES).permute(2, 0, 1), BYTES / 255.0),
        (torch.tensor(RGB[..., 0])[None], RGB[..., :1]),
        (torch.tensor(RGB[..., 0]), RGB[..., :1]),
        (torch.tensor(RGB).permute(2, 0, 1) * 0.5, RGB * 0.5),  # dark, but in range: not stretched
        (NORMALISED, (NORMALISED - NORMALISED.min()) / (NORMALISED.max() - NORMALISED.min())),
        (RGB * 3, (RGB * 3 - (RGB * 3).min()) / (3 * (RGB.max() - RGB.min()))),
        (np.full((4, 4), 7.0), np.zeros((4, 4, 1))),
    ],
)
def test_images(image: object, expected: np.ndarray) -> None:
    shown = drawn_image(image)
    np.testing.assert_allclose(shown, np.broadcast_to(expected, shown.shape), atol=2e-6)


@pytest.mark.parametrize("vertical", [False, True])
def test_rendering(vertical: bool) -> None:
    """White images and one right, one wrong match: the lines' colours stand where the lines are, nothing is cut off."""
    index = torch.tensor([[0, 1, 2, 3]])
    match = Correspondence(index, torch.ones(1, 4), torch.tensor([[True, False, False, True]]))
    white = torch.ones(3, 64, 64)
    figure = plot_correspondence(white, white, match, truth=torch.tensor([0, 1, 2, 0]), vertical=vertical)
    pixels = rendered(figure)
    axes, shift = figure.axes[0], shift_of(figure)
    for position, colour in ((0, RIGHT), (3, WRONG)):
        for point in (centre(position, (2, 2), (64, 64)), centre(position, (2, 2), (64, 64)) + shift):
            x, y = axes.transData.transform(point)
            near = pixels[len(pixels) - round(y) - 2 : len(pixels) - round(y) + 2, round(x) - 2 : round(x) + 2]
            assert np.abs(near - to_rgb(colour)).max(-1).min() < 0.05
    x, y = axes.transData.transform(centre(1, (2, 2), (64, 64)))  # not valid: nothing is drawn
    assert pixels[len(pixels) - round(y) - 8, round(x)].tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [(64, 64), (40, 200), (200, 40)])
@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("with_truth", [False, True])
def test_everything_lies_inside_the_figure(size: tuple[int, int], vertical: bool, with_truth: bool) -> None:
    match = DenseCorrespondence()(torch.randn(1, 8, 7, 7), torch.randn(1, 8, 7, 7))
    truth = torch.arange(49) if with_truth else None
    image = torch.rand(3, *size)
    figure = plot_correspondence(image, image, match, truth=truth, vertical=vertical)
    rendered(figure)
    parts = [figure.axes[0].title, *figure.axes[0].images, figure.axes[0].get_legend(), *figure.axes[1:]]
    for part in filter(None, parts):
        box = part.get_tightbbox()
        assert box.x0 >= -0.5, part
        assert box.y0 >= -0.5, part
        assert box.x1 <= figure.bbox.x1 + 0.5, part
        assert box.y1 <= figure.bbox.y1 + 0.5, part
    image = figure.axes[0].images[0].get_window_extent()  # and the figure is not mostly margin
    drawn = image.width if vertical else 2 * image.width + shift_of(figure)[0] / size[1] * image.width - image.width
    assert max(drawn / figure.bbox.width, image.height * (1 + vertical) / figure.bbox.height) > 0.85


def test_draws_into_given_axes() -> None:
    match = DenseCorrespondence()(torch.randn(1, 8, 7, 7), torch.randn(1, 8, 7, 7))
    figure = Figure()
    ax = figure.subfigures(1, 2)[1].add_subplot()
    assert plot_correspondence(IMAGE_Q, IMAGE_Q, match, ax) is figure
    assert len(ax.images) == 2
    assert rendered(figure).std() > 0


def test_add_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    match = DenseCorrespondence()(torch.randn(1, 8, 7, 7), torch.randn(1, 8, 7, 7))
    figure = plot_correspondence(IMAGE_Q, IMAGE_Q, match)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_figure("matches", figure, 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("matches")
    assert image.step == 3
    assert (image.width, image.height) == tuple(int(side) for side in figure.bbox.size)


def python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


EXAMPLE = (
    "import sys, torch\nfrom densecl_ops import DenseCorrespondence\n"
    "from densecl_ops.visualize import plot_correspondence\n"
    "features, image = torch.randn(1, 4, 7, 7), torch.rand(3, 9, 9)\n"
    "match = DenseCorrespondence()(features, features)\n"
)


def test_pyplot_is_left_alone() -> None:
    code = EXAMPLE + "print('matplotlib' in sys.modules)\nplot_correspondence(image, image, match)\n"
    assert python(code + "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)")[:2] == [
        "False",
        "True False",
    ]


def test_without_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None\n" + EXAMPLE
    code += "try:\n    plot_correspondence(image, image, match)\nexcept ImportError as error:\n    print(error)"
    assert python(code)[0] == 'densecl_ops.visualize needs matplotlib: pip install "densecl-ops[plot]"'


SQUARE = Correspondence(torch.zeros(2, 4, dtype=torch.int64), torch.rand(2, 4), torch.ones(2, 4).bool())
TRUTH = torch.zeros(4, dtype=torch.int64)


def plot(match: object = SQUARE, image: object = IMAGE_Q, **options: object) -> Callable[[], Figure]:
    return lambda: plot_correspondence(image, IMAGE_K, match, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (plot(TRUTH), TypeError, "correspondence: got Tensor, expected a Correspondence"),
        (plot(SQUARE._replace(index=TRUTH)), ValueError, r"correspondence.index: got shape \(4,\), expected \(B, P\)"),
        (plot(SQUARE._replace(index=SQUARE.score)), TypeError, "correspondence.index: got dtype torch.float32"),
        (plot(SQUARE._replace(score=TRUTH)), ValueError, r"correspondence.score: got shape \(4,\), expected \(2, 4\)"),
        (plot(SQUARE._replace(index=SQUARE.index + 4)), ValueError, r"key_grid: got \(2, 2\) for indices 4 to 4"),
        (plot(SQUARE._replace(index=SQUARE.index - 1)), ValueError, r"key_grid: got \(2, 2\) for indices -1 to -1"),
        (plot(matches()), ValueError, "query_grid: got None for 12 positions, no square; expected"),
        (plot(query_grid=(1, 3)), ValueError, r"query_grid: got \(1, 3\), expected a grid of 4 positions"),
        (plot(key_grid=0), ValueError, "key_grid: got 0"),
        (plot(sample=2), ValueError, "sample: got 2, expected 0 to 1"),
        (plot(sample=True), TypeError, "sample: got True, expected an int"),
        (plot(top_k=0), ValueError, "top_k: got 0, expected at least 1"),
        (plot(vertical=1), TypeError, "vertical: got 1, expected a bool"),
        (plot(truth=TRUTH[:3]), ValueError, r"truth: got shape \(3,\), expected \(4,\)"),
        (plot(truth=TRUTH.float()), TypeError, "truth: got dtype torch.float32"),
        (plot(truth=TRUTH + 4), ValueError, "truth: got values from 4 to 4, expected them within -1 to 3"),
        (plot(truth=TRUTH - 2), ValueError, "truth: got values from -2 to -2"),
        (plot(image=[[0.0]]), TypeError, "image_q: got list, expected a torch.Tensor or a numpy array"),
        (plot(image=RGB.transpose(2, 0, 1)), ValueError, r"image_q: got shape \(3, 8, 6\), expected \(H, W, 3\)"),
        (plot(image=torch.tensor(RGB)), ValueError, r"image_q: got shape \(8, 6, 3\), expected \(3, H, W\)"),
        (plot(image=IMAGE_Q[None]), ValueError, r"image_q: got shape \(1, 3, 60, 90\)"),
        (plot(image=IMAGE_Q[:, :0]), ValueError, r"image_q: got shape \(3, 0, 90\)"),
        (plot(image=IMAGE_Q.long()), TypeError, "image_q: got dtype torch.int64, expected uint8 or a float dtype"),
        (plot(image=RGB > 0.5), TypeError, "image_q: got dtype torch.bool"),
    ],
)
def test_errors(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
