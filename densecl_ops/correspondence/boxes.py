"""Crop boxes from what torchvision draws, and from the matrices of any library. Neither need be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks

# In pixels of an image. A crop or a flip leans by 1e-5 at most, the rounding of what kornia draws in float32; a
# rotation by a thousandth of a degree leans by 4e-3 over 224 pixels.
TOLERANCE = 1e-3
CROP = ("top", "left", "height", "width")

ImageSize = Any  # (height, width), or a sequence or tensor of one pair per image


def boxes_from_torchvision(params: Any, image_size: ImageSize = None) -> Tensor:
    """Crop boxes from what torchvision's RandomResizedCrop draws: (top, left, height, width).

    A box runs between the outer edges of the crop's pixels, from left to left + width: the area that `resized_crop`
    scales, antialiased or not.

    Args:
        params: (top, left, height, width) of one image, or the dict that `make_params` of torchvision.transforms.v2
            returns; a sequence of B of either; a (B, 4) tensor; or what PyTorch's default_collate makes of B tuples
            or dicts. Four (4,) tensors are refused: they may as well be one tensor per image.
            `torch.stack(params, 1)` of default_collate's works for every B.
        image_size: (height, width) of the images, or B of them. Boxes are then checked to lie inside, which finds
            most mix-ups with other libraries' order. Default: not checked.

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels, as `location_correspondence` takes them; B is 1 for one image.
        They are where the tensors are, or on the CPU.

    Raises:
        TypeError: params is none of these.
        ValueError: There are not four values per image, they are four (4,) tensors, a height or width is not above 0,
            or a box leaves its image by more than a pixel.

    Example:
        >>> from densecl_ops.functional import boxes_from_torchvision
        >>> boxes_from_torchvision([(10, 20, 100, 120), (0, 0, 64, 64)], image_size=(128, 160)).tolist()
        [[20.0, 10.0, 140.0, 110.0], [0.0, 0.0, 64.0, 64.0]]
    """
    rows = _checks.require_real("params", _torchvision_rows(params))
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.shape[0] == 0:
        raise ValueError(f"params: got shape {_checks.shape_of(rows)}, expected (B, 4): top, left, height, width")
    if _checks.host_may_look(rows) and not bool((rows[:, 2:] > 0).all()):
        raise ValueError("params: got a height or width of 0 or less, expected (top, left, height, width)")
    top, left, height, width = widened(rows).unbind(1)
    boxes = torch.stack([left, top, left + width, top + height], 1).float()
    if image_size is not None and _checks.host_may_look(boxes):
        size = image_sizes(image_size, len(boxes)).flip(1)
        outside = ((boxes < -1) | (boxes > size.repeat(1, 2) + 1)).any(1)
        if outside.any():
            raise ValueError(
                f"params: got the box {boxes[outside][0].tolist()} beyond its image, expected (top, left, height, "
                "width): not corners, and not x before y"
            )
    return boxes


def widened(boxes: Tensor) -> Tensor:
    """int64, float32 or float64, without gradient: sums and differences of uint8 or float16 need not fit the same."""
    return boxes.detach().to(
        torch.promote_types(boxes.dtype, torch.float32 if boxes.is_floating_point() else torch.int64)
    )


def _torchvision_rows(params: Any) -> Tensor:
    several = isinstance(params, (list, tuple)) and len(params) > 0
    if isinstance(params, Mapping):
        return _rows_of_dict(params)
    if several and all(isinstance(one, Mapping) for one in params):
        return torch.cat([_rows_of_dict(one) for one in params])
    columns = several and len(params) == 4 and all(isinstance(x, Tensor) for x in params)
    if columns and all(x.shape == (4,) for x in params):
        raise ValueError(
            "params: got four (4,) tensors, which may be four images or the four numbers, expected one (B, 4) tensor: "
            "torch.stack(params) of images, torch.stack(params, 1) of what default_collate returns"
        )
    try:
        if isinstance(params, Tensor):
            rows = params
        elif columns:
            rows = torch.stack(tuple(params), -1)
        else:
            rows = torch.tensor(params, device="cpu")
            if rows.ndim == 0:
                raise TypeError("not a sequence")
            if rows.is_floating_point():  # Python's numbers came in the default dtype, which may be bfloat16
                rows = torch.tensor(params, device="cpu", dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"params: got {type(params).__name__} ({error}), expected (top, left, height, width), a dict of them, a "
            "sequence of such tuples or dicts, a (B, 4) tensor or four (B,) tensors"
        ) from None
    return rows.unsqueeze(0) if rows.ndim == 1 else rows


def _rows_of_dict(params: Mapping[str, Any]) -> Tensor:
    """(B, 4) of what make_params returns, or of what default_collate makes of B."""
    try:
        columns = [
            torch.as_tensor(params[name], device=None if isinstance(params[name], Tensor) else "cpu") for name in CROP
        ]
        rows = torch.stack([column.flatten() for column in columns], 1)
        padded = bool(torch.as_tensor(params.get("needs_pad", False), device="cpu").any())
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise TypeError(f"params: got a dict of {sorted(map(str, params))}, expected numbers of {CROP}") from None
    if padded:
        raise ValueError("params: got needs_pad, expected a crop without padding: its view shows more than a box")
    return rows


def image_sizes(image_size: ImageSize, batch: int) -> Tensor:
    """(1 or B, 2) float32 heights and widths on the CPU."""
    try:
        sizes = torch.as_tensor(image_size, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        sizes = torch.empty(0)
    if sizes.shape not in ((2,), (batch, 2)) or not bool((sizes > 0).all()):
        raise ValueError(f"image_size: got {image_size!r}, expected (height, width), or {batch} of them")
    return sizes.reshape(-1, 2)


def boxes_from_matrix(matrix: Any, size: tuple[int, int], image_size: ImageSize = None) -> Tensor:
    """Crop boxes from the matrices that map pixels of an image to pixels of the view cut out of it.

    Inverted, they carry the outer edges of the view back into the image. Coordinates are (x, y) and count from the
    centre of the first pixel, as in OpenCV, kornia and albumentations. A library that counts from the corner of the
    image has `matrix = shift @ theirs @ shift.inverse()`, with `shift` the translation by -1/2 in x and y.

    Args:
        matrix: (3, 3) or (2, 3), or B of them: a tensor, an array or nested sequences.
        size: (height, width) of the view.
        image_size: (height, width) of the images, or B of them. Boxes are then checked to lie inside. Default: not
            checked.

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels of the image, as `location_correspondence` takes them, on the
        CPU. x0 > x1 where the view is mirrored left to right, y0 > y1 where top to bottom.

    Raises:
        TypeError: matrix holds no real numbers.
        ValueError: matrix has another shape, cannot be inverted, or turns or shears; or the centre of an outermost
            pixel of the view lies more than a pixel outside of the image.

    Example:
        >>> from densecl_ops.functional import boxes_from_matrix
        >>> boxes_from_matrix([[-1.0, 0, 9], [0, 1, -1]], size=(8, 8), image_size=(10, 12)).tolist()
        [[10.0, 1.0, 2.0, 9.0]]
    """
    try:
        if isinstance(matrix, Tensor):
            _checks.require_real("matrix", matrix)
        rows = torch.as_tensor(matrix, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"matrix: got {type(matrix).__name__} ({error}), expected a (B, 3, 3) tensor") from None
    rows = rows[None] if rows.ndim == 2 else rows
    if rows.ndim != 3 or rows.shape[1:] not in ((2, 3), (3, 3)) or len(rows) == 0:
        raise ValueError(f"matrix: got shape {_checks.shape_of(rows)}, expected (B, 3, 3) or (B, 2, 3)")
    if rows.shape[1] == 2:
        rows = torch.cat([rows, torch.tensor([0, 0, 1], device="cpu").to(rows).expand(len(rows), 1, 3)], 1)
    view = _checks.require_grid_size("size", size)
    if view is None:
        raise TypeError("size: got None, expected (height, width) of the view")
    inside = None if image_size is None else image_sizes(image_size, len(rows)).double()

    def refuse(why: str) -> ValueError:
        return ValueError(f"matrix: got a map that {why}, expected a map that crops, mirrors and scales")

    return upright_boxes(rows, view, inside, refuse)


def upright_boxes(
    matrix: Tensor, size: tuple[int, int], image_size: Tensor | None, refuse: Callable[[str], ValueError]
) -> Tensor:
    """(B, 4) of (B, 3, 3) float64; image_size (1 or B, 2) heights and widths."""
    height, width = size
    x, y = torch.tensor([[0, width, width, 0], [0, 0, height, height]], dtype=torch.float64, device="cpu") - 0.5
    corners = torch.stack([x, y, torch.ones_like(x)])  # of the view, clockwise
    try:
        corners = torch.linalg.solve(matrix, corners)
    except RuntimeError:
        raise refuse("cannot be inverted") from None
    corners = corners[:, :2] / corners[:, 2:]
    first, second, third, fourth = corners.unbind(2)
    lean = torch.stack([(fourth - first)[:, 0], (third - second)[:, 0], (second - first)[:, 1], (third - fourth)[:, 1]])
    if not bool((lean.abs() < TOLERANCE).all()):  # NaN is no box either
        raise refuse("is not upright")
    if image_size is not None:
        # Centres of the corner pixels: align_corners=True puts them on those of the image, and the edges beyond.
        half_pixel = (third - first) / (2 * torch.tensor([width, height], device="cpu"))
        low, high = torch.stack([first + half_pixel, third - half_pixel]).aminmax(dim=0)
        if not bool(((low >= -1.5) & (high <= image_size.flip(1) + 0.5)).all()):
            raise refuse("shows more than its image")
    return torch.cat([first, third], 1).add(0.5).float()
