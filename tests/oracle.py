"""What the library must compute, written once more from the equations in float64 numpy, without the library.

Arrays are (B, C, P) for maps, (K, D) for negatives. Nothing here is fast and nothing here is clever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Params = dict[str, Array]

Function = Callable[[Array], Array]
ZERO_NORM = 1e-12  # a vector shorter than this has no direction


def unit(x: Array, axis: int) -> tuple[Array, Array]:
    """Unit vectors and inverse norms; both 0 for a zero vector."""
    norm = np.sqrt((x * x).sum(axis, keepdims=True))
    inverse = np.where(norm <= ZERO_NORM, 0.0, 1.0 / np.where(norm <= ZERO_NORM, 1.0, norm))
    return x * inverse, inverse


class LossResult(NamedTuple):
    """The reduced loss and its gradients with respect to every raw input."""

    loss: Array  # 0-d, or (B, P) for reduction "none"
    rank: Integers  # (B, P)
    margin: Array  # (B, P, K), cosine of each negative less the positive's, as the rank compares; -inf: left out
    query: Array
    key: Array
    negatives: Array
    temperature: float
    weight: Array | None


def info_nce(
    query: Array,
    key: Array,
    negatives: Array,
    index: Integers | None = None,
    *,
    temperature: float = 0.2,
    reduction: str = "mean",
    weight: Array | None = None,
    valid: NDArray[np.bool_] | None = None,
    exclude: Integers | None = None,
    count: int | None = None,
    upstream: Array | None = None,
    tie: float = 2.0**-46,
    to_row: Function = np.asarray,
    to_operand: Function = np.asarray,
) -> LossResult:
    """Loss and analytic gradients. `upstream` (B, P) is d/d loss_i for reduction "none" (default: ones).

    The rank compares cosines of rounded vectors: the key as a row of the queue is kept, then all as multiplied.
    """
    batch, _, positions = query.shape
    if index is None:
        index = np.tile(np.arange(positions), (batch, 1))
    images = np.arange(batch)
    left_out = np.zeros((batch, 1, len(negatives)), bool)
    if count is not None:
        left_out[..., count:] = True
    if exclude is not None:
        left_out[images, 0, exclude] = True
    q, q_inverse = unit(query, 1)
    k_hat, k_inverse = unit(key, 1)
    k = np.take_along_axis(k_hat, index[:, None], 2)  # of the match of each query
    lost = np.isnan((q * k).sum(1))

    def margins(q: Array, k: Array, negatives: Array) -> Array:
        cosines = np.einsum("bdi,kd->bik", q, negatives) - (q * k).sum(1)[..., None]
        return np.where(left_out, -np.inf, cosines)  # a row that is left out may hold anything

    margin = margins(to_operand(q), to_operand(to_row(k)), to_operand(negatives))
    logits = margins(q, k, negatives) / temperature  # s_j - s+
    loss = np.logaddexp(0, np.logaddexp.reduce(logits, 2, initial=-np.inf))  # log(1 + sum_j exp(s_j - s+))
    loss = np.where(lost | (logits == np.inf).any(2), np.nan, loss)

    rows = np.ones(index.shape) if weight is None else weight.astype(np.float64)
    rows = rows if valid is None else np.where(valid, rows, 0.0)
    weighted, divisor = np.where(rows == 0, 0.0, loss * rows), rows.sum() or 1.0
    if reduction == "none":
        reduced, slope = weighted, rows if upstream is None else rows * upstream
    elif reduction == "sum":
        reduced, slope = weighted.sum(), rows
    else:
        reduced, slope = weighted.sum() / divisor, rows / divisor

    def used(x: Array) -> Array:
        """(B, ..., P) without what the rows of slope 0 hold, NaN perhaps."""
        return np.where(slope[:, None] == 0, 0.0, x)

    probability = np.exp(logits - loss[..., None])  # exp(s_j) / (exp(s+) + sum exp(s_j)); their sum is 1 - p+
    pull = used(slope[:, None] * probability.swapaxes(1, 2)) / temperature  # (B, K, P)
    kept = np.where(left_out.swapaxes(1, 2), 0.0, negatives)  # (B, K, D)
    d_q = np.einsum("bki,bkd->bdi", pull, kept) - pull.sum(1, keepdims=True) * used(k)
    d_k = np.zeros(key.shape)
    np.add.at(d_k, (images[:, None], slice(None), index), -(pull.sum(1, keepdims=True) * used(q)).swapaxes(1, 2))
    d_weight = None
    if weight is not None:
        d_weight = loss * (upstream if reduction == "none" and upstream is not None else 1.0)
        d_weight = (loss - reduced) / divisor if reduction == "mean" else d_weight
        d_weight = d_weight if valid is None else np.where(valid, d_weight, 0.0)
    return LossResult(
        loss=np.asarray(reduced),
        rank=np.where(lost, len(negatives), _rank(margin, tie)),
        margin=margin,
        query=_through_norm(d_q, q, q_inverse),
        key=_through_norm(d_k, k_hat, k_inverse),
        negatives=np.einsum("bki,bdi->kd", pull, used(q)),
        temperature=float(-(d_q * used(q)).sum() / temperature),
        weight=d_weight,
    )


def _through_norm(grad: Array, x_hat: Array, inverse: Array) -> Array:
    """(g - <g, x^> x^) / |x| along axis 1."""
    return (grad - (grad * x_hat).sum(1, keepdims=True) * x_hat) * inverse


def _rank(margin: Array, tie: float) -> Integers:
    """Negatives above the positive; ties are in the second sum alone, so they count half."""
    return ((margin > tie).sum(-1) + (margin >= -tie).sum(-1)) // 2


def rank_bounds(result: LossResult, tolerance: float, tie: float = 2.0**-46) -> tuple[Integers, Integers]:
    """Lowest and highest rank that cosines off by `tolerance` can give."""
    return _rank(result.margin - tolerance, tie), _rank(result.margin + tolerance, tie)


class Match(NamedTuple):
    index: Integers
    score: Array
    valid: NDArray[np.bool_]
    similarity: Array  # (B, P_q, P_k)


def match(query: Array, key: Array, mutual: bool = False, min_score: float | None = None) -> Match:
    """Nearest key position by cosine similarity; np.argmax takes the lowest index of a tie."""
    q_hat, k_hat = unit(query, 1)[0], unit(key, 1)[0]
    similarity = np.einsum("bci,bcj->bij", q_hat, k_hat)
    index = similarity.argmax(2)
    score = np.take_along_axis(similarity, index[:, :, None], 2)[:, :, 0]
    valid = np.ones(index.shape, bool)
    if mutual:
        back = similarity.argmax(1)
        for b, i in np.ndindex(*index.shape):
            valid[b, i] = back[b, index[b, i]] == i
    if min_score is not None:
        valid &= score >= min_score
    return Match(index, score, valid, similarity)


def location_match(
    boxes: tuple[Integers, Integers],
    grids: tuple[tuple[int, int], tuple[int, int]],
    flips: tuple[NDArray[np.bool_], NDArray[np.bool_]],
) -> tuple[Integers, Array]:
    """Index and distance in cell diagonals, by brute force over cells, in fractions: equal distances are equal."""
    index, distance = [], []
    for image in range(len(flips[0])):
        centres, diagonals = [], []
        for box, (height, width), flip in zip(boxes, grids, flips, strict=True):
            x0, y0, x1, y1 = box[image].tolist()
            cell_x, cell_y = Fraction(x1 - x0, width), Fraction(y1 - y0, height)
            columns = range(width)[::-1] if flip[image] else range(width)
            centres.append(
                [(x0 + (2 * i + 1) * cell_x / 2, y0 + (2 * j + 1) * cell_y / 2) for j in range(height) for i in columns]
            )
            diagonals.append(cell_x**2 + cell_y**2)
        squares = [[(x - u) ** 2 + (y - v) ** 2 for u, v in centres[1]] for x, y in centres[0]]
        index.append([row.index(min(row)) for row in squares])
        distance.append([float(min(row) / max(diagonals)) ** 0.5 for row in squares])
    return np.array(index), np.array(distance)


def adaptive_pool(x: Array, grid: tuple[int, int]) -> Array:
    """(B, C, H, W) -> (B, C, *grid): bin i of n covers floor(i * size / n) up to ceil((i + 1) * size / n)."""
    height, width = x.shape[2:]
    out = np.zeros((*x.shape[:2], *grid))
    for r, c in np.ndindex(*grid):
        top, bottom = r * height // grid[0], -(-(r + 1) * height // grid[0])
        left, right = c * width // grid[1], -(-(c + 1) * width // grid[1])
        out[:, :, r, c] = x[:, :, top:bottom, left:right].mean((2, 3))
    return out


def head(
    params: Params, features: Array, grid_size: tuple[int, int] | None = None, norm: Function = np.asarray
) -> tuple[Array, Array, Array]:
    """Image (B, D), dense (B, D, P) and pooled (B, D), from weights named as in the module's state_dict."""
    grid = features if grid_size is None else adaptive_pool(features, grid_size)

    def mlp(branch: str, x: Array) -> Array:
        w1, b1, *_, w2, b2 = (value for name, value in params.items() if name.startswith(branch))
        hidden = np.maximum(norm(np.einsum("hc,bcp->bhp", w1.reshape(len(b1), -1), x) + b1[:, None]), 0)
        return np.einsum("dh,bhp->bdp", w2.reshape(len(b2), -1), hidden) + b2[:, None]

    image = mlp("image_mlp", features.mean((2, 3))[:, :, None])[:, :, 0]
    dense = mlp("dense_mlp", grid.reshape(*features.shape[:2], -1))
    return image, dense, dense.mean(2)


class Queue:
    """A deque of unit rows, oldest first."""

    def __init__(self, size: int, rows: Array) -> None:
        self.size = size
        self.entries: deque[Array] = deque(rows, maxlen=size)
        self.written = 0

    def enqueue(self, keys: Array) -> None:
        self.entries.extend(unit(keys, 1)[0])
        self.written += len(keys)

    @property
    def position(self) -> int:
        return self.written % self.size

    @property
    def count(self) -> int:
        return len(self.entries)

    def rows(self) -> Array:
        """The entries where a ring buffer keeps them."""
        oldest_first = np.array(list(self.entries))
        return np.roll(oldest_first, self.position, axis=0) if self.count == self.size else oldest_first
