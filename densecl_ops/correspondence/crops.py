"""Crop boxes from what torchvision and kornia keep of their random crops. Neither is imported here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks

# Parts of the names of those kornia augmentations that move pixels as no box can describe.
_NO_BOX = (
    *("Affine", "Perspective", "Rotation", "Shear", "Translate", "Elastic", "Fisheye", "ThinPlate", "Pad"),
    *("CutMix", "Jigsaw", "MixUp", "Mosaic", "PatchMix", "Transplantation"),
)


def boxes_from_torchvision(params: Any) -> Tensor:
    """Crop boxes from the (top, left, height, width) that torchvision's RandomResizedCrop.get_params returns.

    A box runs between the outer edges of the crop's pixels, from left to left + width: the area that `resized_crop`
    scales, antialiased or not.

    Args:
        params: (top, left, height, width) of one image; a sequence of B such tuples; the four (B,) tensors that
            PyTorch's default_collate makes of them; or a (B, 4) tensor.

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels, as `location_correspondence` takes them; B is 1 for one image.

    Raises:
        TypeError: params is none of these.
        ValueError: There are not four values per image, or a height or width is not above 0.

    Example:
        >>> from densecl_ops.functional import boxes_from_torchvision
        >>> boxes_from_torchvision([(10, 20, 100, 120), (0, 0, 64, 64)]).tolist()
        [[20.0, 10.0, 140.0, 110.0], [0.0, 0.0, 64.0, 64.0]]
    """
    rows = _checks.require_real("params", _torchvision_rows(params))
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.shape[0] == 0:
        raise ValueError(f"params: got shape {_checks.shape_of(rows)}, expected (B, 4): top, left, height, width")
    if _checks.host_may_look(rows) and not bool((rows[:, 2:] > 0).all()):
        raise ValueError("params: got a height or width of 0 or less, expected (top, left, height, width)")
    top, left, height, width = rows.detach().double().unbind(1)  # the sum of two uint8 need not fit uint8
    return torch.stack([left, top, left + width, top + height], 1).float()


def _torchvision_rows(params: Any) -> Tensor:
    try:
        if isinstance(params, Tensor):
            rows = params
        elif len(params) == 4 and all(isinstance(column, Tensor) for column in params):
            rows = torch.stack(tuple(params), -1)
        else:
            rows = torch.tensor(params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"params: got {type(params).__name__} ({error}), expected (top, left, height, width), a sequence of such "
            "tuples, four (B,) tensors or a (B, 4) tensor"
        ) from None
    return rows.unsqueeze(0) if rows.ndim == 1 else rows


def boxes_from_kornia(params: Any, *, align_corners: bool = True) -> Tensor:
    """Crop boxes, mirrored where a flip was drawn, from the parameters that a kornia augmentation keeps.

    kornia stores the first and the last pixel of a crop, both of which belong to it. With align_corners=True the
    centres of those two pixels become centres of pixels of the view, so that the box of the view's outer edges is
    slightly smaller or larger than the crop's; with False it is exactly the crop.

    Args:
        params: `aug._params` after a call, of one RandomResizedCrop, RandomCrop or CenterCrop, or of an
            AugmentationSequential of crops, flips and resizes in any order, beside anything that moves no pixels.
        align_corners: As given to the crop. Default True, kornia's. Also True for cropping_mode="resample".

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels of the input image, as `location_correspondence` takes them.
        x0 > x1 where the view is mirrored left to right, y0 > y1 where top to bottom. On the device of the
        parameters, which is the CPU unless kornia was told otherwise.

    Raises:
        TypeError: params is not what kornia keeps, or align_corners is not a bool.
        ValueError: An augmentation moved pixels in a way that no box describes: rotation, padding, mixing, ...

    Example:
        >>> import torch
        >>> from densecl_ops.functional import boxes_from_kornia
        >>> crop = {"src": torch.tensor([[[2, 1], [9, 1], [9, 4], [2, 4]]]),  # 8 x 4 pixels from (2, 1) on
        ...         "dst": torch.tensor([[[0, 0], [7, 0], [7, 7], [0, 7]]]),  # scaled to 8 x 8
        ...         "batch_prob": torch.ones(1), "forward_input_shape": torch.tensor([1, 3, 10, 12])}
        >>> boxes_from_kornia(crop, align_corners=False).tolist()
        [[2.0, 1.0, 10.0, 5.0]]
    """
    _checks.require_bool("align_corners", align_corners)
    box: Tensor | None = None
    for name, data in _operations(params):
        applied = data["batch_prob"] > 0.5
        batch, _, height, width = data["forward_input_shape"].tolist()
        size = torch.tensor([width, height, width, height], dtype=torch.float64, device=applied.device)
        if box is None:
            box = size * torch.tensor([0, 0, 1, 1], device=size.device).expand(batch, -1)
        part = _part(name, data, size, align_corners)
        if part is None:
            continue
        origin, extent = box[:, :2].repeat(1, 2), (box[:, 2:] - box[:, :2]).repeat(1, 2)
        inside = origin + extent * part / size  # the product first: whole pixels stay exact
        box = torch.where(applied.to(box.device)[:, None], inside, box)
    if box is None:
        raise _not_kornia(params)
    return box.float()


def _operations(params: Any) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Name and parameters of every augmentation in the order of application, sequences inside sequences unrolled."""
    if isinstance(params, Mapping):
        if "src" not in params:
            raise TypeError("params: got no 'src', expected the parameters of a crop, or the list of a sequence")
        params = [("", params)]
    if not isinstance(params, (list, tuple)):
        raise _not_kornia(params)
    for item in params:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise _not_kornia(item)
        name, data = item
        if isinstance(data, (list, tuple)):
            yield from _operations(data)
        elif isinstance(data, Mapping) and {"batch_prob", "forward_input_shape"} <= data.keys():
            yield name, _with_shapes(data)
        else:
            raise _not_kornia(data)


def _not_kornia(value: Any) -> TypeError:
    return TypeError(f"params: got {type(value).__name__}, expected what a kornia augmentation keeps in _params")


def _with_shapes(data: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    _checks.require_shape(
        "params: forward_input_shape", _checks.require_real("params", data["forward_input_shape"]), (4,)
    )
    batch = int(data["forward_input_shape"][0])
    _checks.require_shape("params: batch_prob", _checks.require_real("params", data["batch_prob"]), (batch,))
    for key in ("src", "dst") if "src" in data else ():
        corners = _checks.require_real("params", data.get(key))
        rows = 0 if corners.shape[:1] == (0,) else batch  # old versions keep no row of a crop that was left out
        _checks.require_shape(f"params: {key}", corners, (rows, 4, 2))
    return data


def _part(name: str, data: Mapping[str, Tensor], size: Tensor, align_corners: bool) -> Tensor | None:
    """(B, 4) box of the output in pixels of the input; None where the output is the whole input."""
    width, height, *_ = size.tolist()
    padding = data.get("padding_size")
    if any(word in name for word in _NO_BOX) or (padding is not None and bool(padding.any())):
        raise ValueError(f"params: got {name or 'a crop with padding'}, expected only crops, flips and resizes")
    if name.startswith("RandomHorizontalFlip"):
        return size.new_tensor([[width, 0.0, 0.0, height]])
    if name.startswith("RandomVerticalFlip"):
        return size.new_tensor([[0.0, height, width, 0.0]])
    if "src" not in data or data["src"].shape[0] == 0:
        return None
    (first, last), (out_first, out_last) = (data[key].to(size)[:, [0, 2]].unbind(1) for key in ("src", "dst"))
    pixels, out_pixels = last - first + 1, out_last - out_first + 1
    step = pixels / out_pixels
    if align_corners:  # but a single pixel has no second corner to align
        step = torch.where(pixels > 1, (pixels - 1) / (out_pixels - 1).clamp(min=1), step)
        first = first + 0.5 - step / 2
    return torch.cat([first, first + step * out_pixels], 1)
