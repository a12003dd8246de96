"""Pictures of dense matches. Needs matplotlib: pip install "densecl-ops[plot]"."""

import io
import math
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks
from densecl_ops._types import Correspondence
from densecl_ops.metrics import score_and_valid

try:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('densecl_ops.visualize needs matplotlib: pip install "densecl-ops[plot]"') from error

__all__ = ["plot_correspondence"]

# Told apart by every kind of colour vision; wrong ones last, on top of the many right ones.
LOOKS: dict[str, dict[str, Any]] = {
    "truth unknown": {"color": "#666666", "linestyle": ":", "marker": "."},
    "right": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "wrong": {"color": "#D55E00", "linestyle": "--", "marker": "X"},
}
GAP = 0.04  # of the longest side, between the images
PALE = 0.4  # of the images' contrast is kept, so that lines stand out


class _Picture(Figure):
    """A notebook shows it as the last line of a cell: pyplot, which does that for other figures, is not imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def plot_correspondence(
    image_q: Any,
    image_k: Any,
    correspondence: Correspondence,
    ax: Axes | None = None,
    top_k: int | None = 40,
    truth: Tensor | None = None,
    *,
    sample: int = 0,
    query_grid: int | tuple[int, int] | None = None,
    key_grid: int | tuple[int, int] | None = None,
    vertical: bool = False,
) -> Figure:
    """Draws two views beside each other and a line from the centre of each query cell to that of its match.

    Lines are coloured by score (viridis, dark is high), best ones on top. With `truth`, right matches are solid blue
    with dots, wrong ones dashed orange with crosses, and those without truth dotted grey. A notebook shows the result
    of a cell's last line, and TensorBoard takes it (`writer.add_figure`). pyplot is not imported.

    Args:
        image_q: Query view: a (3, H, W), (1, H, W) or (H, W) tensor, on any device, or a (H, W, 3), (H, W, 1) or
            (H, W) numpy array; uint8, or float in [0, 1]. A float image beyond that, such as a normalised one, is
            shifted and scaled by its minimum and maximum over all channels.
        image_k: Key view, the same; it may have another size.
        correspondence: Matches of a batch, index, score and valid each (B, P_q), such as DenseCorrespondence returns.
        ax: Axes to draw into. Default: those of a new Figure.
        top_k: How many matches to draw, those of highest score among the valid ones. None: all. Default 40.
        truth: (P_q,) integers: the right key position of each query position, negative where unknown. The title then
            states the share of right ones among *all* valid matches with known truth. To let near misses count, pass
            the match's own index wherever you call it right.
        sample: Which image of the batch. Default 0.
        query_grid: S or (H, W), in cells. Default: P_q is taken for a square.
        key_grid: The same of the key view. Default: that of the query view.
        vertical: Puts the key view below the query view, as for a stereo pair, whose lines would cover each other.
            Default False.

    Returns:
        The Figure drawn into; of `ax`, if that was given.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, grids or numbers do not fit.

    Example:
        >>> import torch
        >>> from densecl_ops import DenseCorrespondence
        >>> from densecl_ops.visualize import plot_correspondence
        >>> image, features = torch.rand(3, 64, 64), torch.randn(1, 16, 7, 7)
        >>> matches = DenseCorrespondence()(features, features.flip(3))
        >>> figure = plot_correspondence(image, image.flip(2), matches, top_k=10)
        >>> figure.axes[0].get_title()
        '10 of 49 valid matches, by score'
    """
    score, valid = score_and_valid(correspondence)
    index = _checks.require_index("correspondence.index", correspondence.index, tuple(score.shape), "score", score)
    _checks.require_values("correspondence", index)
    if not isinstance(sample, int) or not 0 <= sample < len(index):
        raise ValueError(f"sample: got {sample!r}, expected an int from 0 to {len(index) - 1}")
    index, score, valid = (x[sample].detach().cpu() for x in (index.long(), score.float(), valid))
    if top_k is not None:
        _checks.require_positive_int("top_k", top_k)
    _checks.require_bool("vertical", vertical)
    side = math.isqrt(len(index))
    grid_q = _checks.require_grid_size("query_grid", query_grid) or (side, side)
    if math.prod(grid_q) != len(index):
        raise ValueError(f"query_grid: got {query_grid}, expected (height, width) of {len(index)} positions")
    grid_k = _checks.require_grid_size("key_grid", key_grid) or grid_q
    _checks.require_range("key_grid", index, math.prod(grid_k))
    picture_q, picture_k = _pixels("image_q", image_q), _pixels("image_k", image_k)

    (height_q, width_q), (height_k, width_k) = picture_q.shape[:2], picture_k.shape[:2]
    gap = max(1.0, GAP * max(height_q, width_q, height_k, width_k))
    shift = (0.0, height_q + gap) if vertical else (width_q + gap, 0.0)
    width, height = max(width_q, shift[0] + width_k), max(height_q, shift[1] + height_k)
    if ax is None:
        wide = min(7.0, 7.0 * width / height)
        size = max(wide, 5.0), wide * height / width + 1.0  # title, and colour bar or legend
        ax = _Picture(figsize=size, layout="constrained").add_subplot()
    drawn = torch.where(valid, score.nan_to_num(-math.inf), -math.inf).argsort(descending=True, stable=True)
    drawn = drawn[: int(valid.sum())][:top_k].flip(0)  # the best are drawn last, on top
    views = (picture_q, drawn, grid_q, (0.0, 0.0)), (picture_k, index[drawn], grid_k, shift)
    ends = []
    for picture, cell, (rows, columns), (x, y) in views:
        high, wide = picture.shape[:2]
        faded = (PALE * picture + 1 - PALE).numpy()
        ax.imshow(faded, extent=(x, x + wide, y + high, y), interpolation="antialiased")
        centre_x, centre_y = (cell % columns).float() + 0.5, (cell // columns).float() + 0.5
        ends.append(torch.stack([x + centre_x * wide / columns, y + centre_y * high / rows], 1))
    lines = torch.stack(ends, 1)
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    ax.set_axis_off()
    if truth is None:
        coloured = LineCollection(list(lines.numpy()), array=score[drawn].numpy(), cmap="viridis_r", linewidths=1.3)
        ax.add_collection(coloured, autolim=False)
        bar = ax.figure.colorbar(coloured, ax=ax, location="bottom", fraction=0.05, pad=0.02, shrink=0.5, aspect=30)
        bar.set_label("score")
        title = f"{len(drawn)} of {int(valid.sum())} valid matches, by score"
    else:
        truth = _checks.require_integer("truth", truth)
        _checks.require_shape("truth", truth, tuple(index.shape))
        truth = truth.detach().cpu().long()
        _checks.require_range("truth", truth.clamp(min=0), math.prod(grid_k))
        kind = torch.where(truth < 0, 0, 2 - (truth == index).long())  # as in LOOKS
        for number, (label, look) in enumerate(LOOKS.items()):
            chosen = lines[kind[drawn] == number]
            if len(chosen):
                x, y = chosen.permute(2, 1, 0).numpy()
                ax.plot(x, y, linewidth=1.1, markersize=4, **look)[0].set_label(label)
        if len(drawn):
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False)
        right, total = int((kind[valid] == 1).sum()), int((kind[valid] > 0).sum())
        share = f"{right / total:.1%} right ({right} of {total})" if total else "no match with known truth"
        title = f"{share}, {len(drawn)} drawn"
    ax.set_title(title, fontsize=12)
    return ax.figure.figure  # the second one leaves subfigures


def _pixels(name: str, image: Any) -> Tensor:
    """(H, W, 3) float32 in [0, 1] on the host."""
    expected = "(3, H, W), (1, H, W) or (H, W)"
    if isinstance(image, Tensor):
        _checks.require_values(name, image)
        pixels = _checks.require_real(name, image).detach().cpu()
        pixels = pixels.movedim(0, 2) if pixels.ndim == 3 else pixels
    elif type(image).__module__ == "numpy" and hasattr(image, "shape"):
        pixels = torch.from_numpy(image.copy())  # a copy: torch refuses negative strides and warns of read-only arrays
        expected = "(H, W, 3), (H, W, 1) or (H, W)"
    else:
        raise TypeError(f"{name}: got {type(image).__name__}, expected a torch.Tensor or a numpy array")
    if pixels.dtype not in (torch.uint8, *_checks.FLOAT_DTYPES):
        raise TypeError(f"{name}: got dtype {pixels.dtype}, expected uint8 or a float dtype")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(image.shape)}, expected {expected}")
    pixels = pixels.float() / (255 if pixels.dtype == torch.uint8 else 1)
    low, high = pixels.aminmax()
    if low < 0 or high > 1:
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    return pixels.expand(-1, -1, 3)
