"""Matching by place: which positions of two crops show the same spot of the image they were cut from."""

import torch
from torch import Tensor

from densecl_ops import _checks, _tracing
from densecl_ops._types import Correspondence, with_grids
from densecl_ops.correspondence.boxes import widened


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
    """Matches every position of one crop with the position of the other crop that lies nearest in the image.

    With c the centres of the grid cells in image coordinates and d the diagonal of a cell, the larger of the two
    views'::

        index[b, i] = argmin_j |c_q[b, i] - c_k[b, j]|
        valid[b, i] = |c_q[b, i] - c_k[b, index(i)]| / d_b <= max_distance

    (the distance rule of PixPro, arXiv 2011.10043, section 3.1.) Ties go to the lowest index.

    Args:
        query_boxes: (B, 4) crop of the first view as (x0, y0, x1, y1): the outer edges, in pixels of the original
            image (or any unit that both boxes share), as `boxes_from_torchvision`, `boxes_from_kornia`,
            `boxes_from_albumentations` and `boxes_from_matrix` make them. x0 > x1 says that the crop was mirrored
            left to right after cutting, y0 > y1 top to bottom.
        key_boxes: The same of the second view.
        query_grid: S, or (H, W): the grid the query projections have.
        key_grid: The same of the key projections. Default: query_grid.
        query_flip: (B,) bool, True where the crop was mirrored left to right, once more if x0 > x1. Default: none was.
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

    # Relative to the query box numbers are small, however large the image. So float32 does: MPS has no float64.
    origin = torch.minimum(query_boxes[:, :2], query_boxes[:, 2:])
    origin = origin.to(torch.promote_types(query_boxes.dtype, key_boxes.dtype))
    x_q, y_q = _sides(query_boxes, origin, "query_flip", query_flip)
    x_k, y_k = _sides(key_boxes, origin, "key_flip", key_flip)
    # Both grids are upright, so nearest in the plane is nearest in x and nearest in y: H + W numbers, not P x P.
    off_x, column = _nearest(x_q, x_k, grid_q[1], grid_k[1])
    off_y, row = _nearest(y_q, y_k, grid_q[0], grid_k[0])
    index = (row[:, :, None] * grid_k[1] + column[:, None, :]).flatten(1)
    views = (x_q, y_q, grid_q), (x_k, y_k, grid_k)
    diagonal = torch.maximum(*(torch.hypot(x.diff() / grid[1], y.diff() / grid[0]) for x, y, grid in views))
    distance = torch.hypot(off_y[:, :, None], off_x[:, None, :]).flatten(1) / diagonal
    valid = torch.ones_like(index, dtype=torch.bool) if max_distance is None else distance <= max_distance
    return with_grids(Correspondence(index, -distance.float(), valid), (grid_q, grid_k))


def _as_boxes(name: str, value: object) -> Tensor:
    boxes = _checks.require_real(name, value)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.shape[0] == 0:
        raise ValueError(f"{name}: got shape {_checks.shape_of(boxes)}, expected (B, 4) with B at least 1")
    boxes = widened(boxes)
    if _tracing.host_may_look(boxes):
        sides = boxes[:, 2:] - boxes[:, :2]
        wrong = boxes[~(sides.isfinite() & (sides != 0)).all(1)].tolist()
        if wrong:
            raise ValueError(f"{name}: got {wrong[0]}, expected finite corners and sides other than 0")
    return boxes


def _sides(boxes: Tensor, origin: Tensor, name: str, flip: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, 2) x and (B, 2) y where a view starts and ends in the image, from an origin (B, 2) on; float32 or float64."""
    corners = boxes.to(origin.dtype).reshape(-1, 2, 2) - origin[:, None]
    x, y = corners.to(torch.promote_types(origin.dtype, torch.float32)).unbind(2)
    if flip is not None:  # a mirrored crop runs from x1 to x0
        mirrored = _checks.require_mask(name, flip, (len(boxes),), "query_boxes", boxes)
        x = torch.where(mirrored[:, None], x.flip(1), x)
    return x, y


def _nearest(query: Tensor, key: Tensor, query_cells: int, key_cells: int) -> tuple[Tensor, Tensor]:
    """Distance (B, query_cells) along one axis from every cell centre to the nearest of the other view; and which."""

    scale, centres = 2 * query_cells * key_cells, []
    for ends, cells in ((query, query_cells), (key, key_cells)):
        number = torch.arange(1, 2 * cells, 2, dtype=ends.dtype, device=ends.device)
        # Times the scale: integers where ends are, so that equal distances compare equal.
        centres.append(scale * ends[:, :1] + scale // (2 * cells) * ends.diff() * number)
    distance, which = (centres[0][:, :, None] - centres[1][:, None, :]).abs().min(2)
    return distance / scale, which
