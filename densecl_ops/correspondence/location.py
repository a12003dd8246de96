"""Matching by place: which positions of two crops show the same spot of the image they were cut from."""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ops import _checks
from densecl_ops._types import Correspondence


def location_correspondence(
    query_boxes: Tensor,
    key_boxes: Tensor,
    query_grid: int | tuple[int, int],
    key_grid: int | tuple[int, int] | None = None,
    *,
    query_flip: Tensor | None = None,
    key_flip: Tensor | None = None,
    max_distance: float | None = 0.7,
) -> Correspondence:
    r"""Matches every position of one crop with the position of the other crop that lies nearest in the image.

    With c the centres of the grid cells in image coordinates and d the diagonal of a cell, the larger of the two
    views',

    .. math:: \mathrm{index}_{b,i} = \arg\min_j |c^q_{b,i} - c^k_{b,j}|, \qquad
              \mathrm{valid}_{b,i} = |c^q_{b,i} - c^k_{b,\mathrm{index}(i)}| / d_b \le \mathrm{max\_distance}

    (the distance rule of PixPro, arXiv 2011.10043, section 3.1.) Ties go to the lowest index.

    Args:
        query_boxes: (B, 4) crop of the first view as (x0, y0, x1, y1): the outer edges, in pixels of the original
            image (any unit that both boxes share will do). x0 > x1 says that the crop was mirrored left to right
            after cutting, y0 > y1 top to bottom. `boxes_from_torchvision` and `boxes_from_kornia` make them.
        key_boxes: The same of the second view.
        query_grid: S, or (H, W): the grid the query projections have.
        key_grid: The same of the key projections. Default: query_grid.
        query_flip: (B,) bool, True where the crop was mirrored left to right (once more, if x0 > x1) after cutting.
            Default: none was.
        key_flip: The same of the second view.
        max_distance: Largest distance of a valid match, in cell diagonals. Default 0.7, PixPro's. None: all valid.

    Returns:
        Correspondence of index (B, P_q) int64, score (B, P_q) float32 (minus the distance in cell diagonals, 0 at
        best) and valid (B, P_q) bool.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device, grid or distance does not fit, or a box is empty or not finite; names the argument.

    Example:
        >>> import torch
        >>> from densecl_ops.functional import location_correspondence
        >>> whole, right_half = torch.tensor([[0.0, 0, 8, 4]]), torch.tensor([[4.0, 0, 8, 4]])
        >>> match = location_correspondence(right_half, whole, query_grid=2, key_grid=(2, 4))
        >>> match.index.tolist(), match.valid.tolist()
        ([[2, 3, 6, 7]], [[True, True, True, True]])
    """
    grid_q = _checks.require_grid_size("query_grid", query_grid)
    grid_k = grid_q if key_grid is None else _checks.require_grid_size("key_grid", key_grid)
    if grid_q is None or grid_k is None:
        raise TypeError("query_grid: got None, expected an int or a pair (height, width)")
    if max_distance is not None:
        max_distance = _checks.require_number("max_distance", max_distance)
        if max_distance < 0:
            raise ValueError(f"max_distance: got {max_distance}, expected at least 0")
    query_boxes, key_boxes = _as_boxes("query_boxes", query_boxes), _as_boxes("key_boxes", key_boxes)
    _checks.require_shape("key_boxes", key_boxes, tuple(query_boxes.shape))
    _checks.require_same_device("key_boxes", key_boxes, "query_boxes", query_boxes)
    _require_extent("query_boxes", query_boxes)
    _require_extent("key_boxes", key_boxes)

    x_q, y_q, diagonal_q = _cell_centres(query_boxes, grid_q, _as_flip("query_flip", query_flip, query_boxes))
    x_k, y_k, diagonal_k = _cell_centres(key_boxes, grid_k, _as_flip("key_flip", key_flip, key_boxes))
    # Both grids are upright, so nearest in the plane is nearest in x and nearest in y: H + W numbers, not P x P.
    off_x, column = (x_q[:, :, None] - x_k[:, None, :]).abs().min(2)
    off_y, row = (y_q[:, :, None] - y_k[:, None, :]).abs().min(2)
    index = (row[:, :, None] * grid_k[1] + column[:, None, :]).flatten(1)
    distance = torch.hypot(off_y[:, :, None], off_x[:, None, :]).flatten(1)
    distance = distance / torch.maximum(diagonal_q, diagonal_k)[:, None]
    valid = torch.ones_like(index, dtype=torch.bool) if max_distance is None else distance <= max_distance
    return Correspondence(index, -distance.float(), valid)


def _as_boxes(name: str, value: object) -> Tensor:
    boxes = _checks.require_real(name, value)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.shape[0] == 0:
        raise ValueError(f"{name}: got shape {_checks.shape_of(boxes)}, expected (B, 4) with B at least 1")
    return boxes.detach().double()  # exact for integer crops of any image; (B, 4) costs nothing


def _require_extent(name: str, boxes: Tensor) -> None:
    if not _checks.host_may_look(boxes):
        return
    sides = boxes[:, 2:] - boxes[:, :2]
    wrong = ~(sides.isfinite() & (sides != 0)).all(1)
    if wrong.any():
        raise ValueError(f"{name}: got {boxes[wrong][0].tolist()}, expected finite corners and sides other than 0")


def _as_flip(name: str, value: Tensor | None, boxes: Tensor) -> Tensor | None:
    if value is None:
        return None
    return _checks.require_mask(name, value, (boxes.shape[0],), "query_boxes", boxes)


def _cell_centres(boxes: Tensor, grid: tuple[int, int], flip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x of every column (B, W), y of every row (B, H), and the diagonal of a cell (B,), in image coordinates."""
    height, width = grid
    x0, y0, x1, y1 = boxes.unbind(1)
    if flip is not None:  # a mirrored crop runs from x1 to x0
        x0, x1 = torch.where(flip, x1, x0), torch.where(flip, x0, x1)

    def centres(low: Tensor, high: Tensor, cells: int) -> Tensor:
        fraction = (torch.arange(cells, dtype=boxes.dtype, device=boxes.device) + 0.5) / cells
        return low[:, None] + (high - low)[:, None] * fraction

    return centres(x0, x1, width), centres(y0, y1, height), torch.hypot((x1 - x0) / width, (y1 - y0) / height)
