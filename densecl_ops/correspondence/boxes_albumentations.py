"""Crop boxes from the replay of what albumentations drew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from densecl_ops.correspondence.boxes import image_sizes

# Classes of albumentations. What is in none of these, and no ImageOnlyTransform, is refused.
IN_ORDER = {"ReplayCompose", "Compose", "Sequential", "OneOf", "OneOrOther"}
RESIZES = {"Resize", "RandomScale", "SmallestMaxSize", "LongestMaxSize"}
UNMOVED = {"NoOp", "ToTensorV2", "PixelDropout", "CoarseDropout", "GridDropout", "ConstrainedCoarseDropout", "Erasing"}


def boxes_from_albumentations(replay: Mapping[str, Any], image_size: tuple[int, int]) -> Tensor:
    """Crop box of one call of albumentations' ReplayCompose, mirrored where a flip was drawn.

    Crops are cut out of each other in their order, as "crop_coords" and "shape" of each applied step say. Read with
    albumentations 2.0.8 and albumentationsx 2.5.1.

    Args:
        replay: What the composed call returns under "replay".
        image_size: (height, width) of the image before the call.

    Returns:
        (1, 4) float32 box (x0, y0, x1, y1) in pixels of the image, as `location_correspondence` takes them, on the
        CPU. x0 > x1 where the view is mirrored left to right, y0 > y1 where top to bottom.

    Raises:
        TypeError: replay is not such a dict.
        ValueError: An applied step moved pixels in a way that no box describes: rotation, padding, steps in a random
            order, ...; or the image had another size.

    Example:
        >>> import albumentations as A  # doctest: +SKIP
        >>> from densecl_ops.functional import boxes_from_albumentations
        >>> augment = A.ReplayCompose([A.CenterCrop(8, 8), A.HorizontalFlip(p=1.0)])  # doctest: +SKIP
        >>> out = augment(image=numpy.zeros((10, 12, 3), "uint8"))  # doctest: +SKIP
        >>> boxes_from_albumentations(out["replay"], (10, 12)).tolist()  # doctest: +SKIP
        [[10.0, 1.0, 2.0, 9.0]]
    """
    if not isinstance(replay, Mapping) or "transforms" not in replay:
        raise TypeError(f'replay: got {type(replay).__name__}, expected what ReplayCompose returns under "replay"')
    height, width = image_sizes(image_size, 1).reshape(2).tolist()
    x0, y0, x1, y1 = 0.0, 0.0, width, height
    first = True
    for name, draw in _applied(replay):
        if "shape" not in draw:
            raise _no_replay(f"a {name} that keeps no shape")
        rows, columns = draw["shape"][:2]
        if first and (rows, columns) != (height, width):
            raise ValueError(f"image_size: got {image_size}, expected {(rows, columns)}, which the replay starts from")
        first = False
        if name == "HorizontalFlip":
            x0, x1 = x1, x0
        elif name == "VerticalFlip":
            y0, y1 = y1, y0
        elif draw.get("pad_params") is not None:
            raise _no_replay(f"a {name} with padding")
        elif (crop := draw.get("crop_coords", draw.get("crop_params"))) is not None:
            left, top, right, bottom = crop
            if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
                raise _no_replay(f"a {name} to {tuple(crop)} of {columns} x {rows} pixels")
            x0, x1 = x0 + (x1 - x0) * left / columns, x0 + (x1 - x0) * right / columns
            y0, y1 = y0 + (y1 - y0) * top / rows, y0 + (y1 - y0) * bottom / rows
        elif name not in RESIZES and not _moves_no_pixels(name):
            raise _no_replay(f"a {name}")
    return torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32, device="cpu")


def _applied(step: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Class and draw of the applied steps in their order, nested ones unrolled."""
    name = str(step.get("__class_fullname__"))  # with its module only where it is not albumentations' own
    if not step.get("applied"):
        return
    if "transforms" not in step:
        draw = step.get("params") or {}
        yield name, draw.get("params", draw)  # albumentationsx has one "params" more
    elif name not in IN_ORDER:
        raise _no_replay(f"a {name}, whose order is not kept")
    else:
        for inner in step["transforms"]:
            yield from _applied(inner)


def _moves_no_pixels(name: str) -> bool:
    from albumentations import ImageOnlyTransform
    from albumentations.core.serialization import SERIALIZABLE_REGISTRY

    return name in UNMOVED or issubclass(SERIALIZABLE_REGISTRY.get(name, object), ImageOnlyTransform)


def _no_replay(what: str) -> ValueError:
    return ValueError(f"replay: got {what}, expected only crops, flips, resizes and what moves no pixels")
