"""Crop boxes from the matrices of what kornia drew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks
from densecl_ops.correspondence.boxes import upright_boxes


def boxes_from_kornia(augmentation: Any) -> Tensor:
    """Crop boxes of the last call of a kornia augmentation, mirrored where a flip was drawn.

    The matrices of all steps of the call are multiplied and read as by `boxes_from_matrix`. The `transform_matrix` of
    a sequence would leave out sequences inside it, and steps drawn twice. What leaves no upright box is refused,
    whatever it is called.

    Args:
        augmentation: The kornia augmentation, after it was called on images: RandomResizedCrop, RandomCrop, ..., or
            an AugmentationSequential or ImageSequential, with others inside, RandAugment, ... Read the box before the
            next call draws anew.

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels of the input image, as `location_correspondence` takes them,
        on the CPU. x0 > x1 where the view is mirrored left to right, y0 > y1 where top to bottom.

    Raises:
        TypeError: augmentation is not one of kornia's.
        ValueError: It was not called yet; or it moved pixels in a way that no box describes: rotation, shear, padding,
            mixing of images, ...; or it holds a module that keeps no record, such as a plain torch.nn.Module.

    Example:
        >>> import torch
        >>> import kornia.augmentation as K  # doctest: +SKIP
        >>> from densecl_ops.functional import boxes_from_kornia
        >>> augment = K.AugmentationSequential(K.CenterCrop(8), K.RandomHorizontalFlip(p=1.0))  # doctest: +SKIP
        >>> view = augment(torch.rand(1, 3, 10, 12))  # doctest: +SKIP
        >>> boxes_from_kornia(augment).tolist()  # doctest: +SKIP
        [[10.0, 1.0, 2.0, 9.0]]
    """
    if isinstance(augmentation, (Mapping, list, tuple)):
        raise ValueError(
            f"augmentation: got {type(augmentation).__name__}, expected the augmentation itself, after its call: "
            "what it keeps in _params does not say how pixels moved"
        )
    if not hasattr(augmentation, "_params"):
        raise TypeError(f"augmentation: got {type(augmentation).__name__}, expected a kornia augmentation")
    if not augmentation._params:
        raise ValueError(f"augmentation: got {type(augmentation).__name__} before its call, expected one after it")
    steps = list(_steps(augmentation, augmentation._params))
    _, last, _, view = steps[-1]
    matrix, boxes, size = torch.eye(3, device="cpu").to(last), last, view
    for name, step, size_in, size_out in reversed(steps):  # a later crop may hide the border that a step added
        if size_out != size:
            raise _no_box(f"{name} before an image of another size")
        matrix, size = matrix @ step, size_in
        inside = torch.tensor([size_in], dtype=torch.float64, device="cpu")
        boxes = upright_boxes(matrix, view, inside, partial(_not_upright, name))
    return boxes


Size = tuple[int, int]


def _steps(module: Any, draw: Any) -> Iterator[tuple[str, Tensor, Size, Size]]:
    """The augmentations of one call in their order, sequences inside sequences unrolled.

    Of each its name, its (B, 3, 3) float64 matrix from pixels of its input to those of its output, and both sizes.
    """
    if isinstance(draw, (list, tuple)) and all(hasattr(item, "data") for item in draw):
        for item in draw:
            yield from _steps(module.get_submodule(item.name), item.data)
        return
    module = getattr(module, "op", module)  # policies such as RandAugment wrap each augmentation once more
    name = type(module).__name__
    if not isinstance(draw, Mapping) or not hasattr(module, "generate_transformation_matrix"):
        raise _no_box(f"{name}, which has no matrix")
    draw = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in draw.items()}
    shape = draw["forward_input_shape"].tolist()
    if len(shape) != 4 or draw["batch_prob"].shape != (shape[0],):
        raise _no_box(f"{name} of videos or volumes")
    if "pad_mode" in module.flags or ("padding_size" in draw and bool(draw["padding_size"].any())):
        raise _no_box(f"{name} with padding")
    if module.flags.get("align_corners") is False:
        import kornia

        # Before 0.9 the matrix of a crop or resize was that of align_corners=True, up to 0.9 pixels beside the view.
        if tuple(map(int, kornia.__version__.split(".")[:2])) < (0, 9):
            raise _no_box(f"{name} with align_corners=False of kornia {kornia.__version__}, older than 0.9")
    with torch.device("cpu"):  # only the shape and the dtype of the input matter: no channels, no memory
        images = torch.empty(shape[0], 0, *shape[2:], dtype=torch.float64)
        matrix = module.generate_transformation_matrix(images, draw, module.flags)
    if matrix.shape != (shape[0], 3, 3):
        raise _no_box(f"{name}, whose matrix has shape {_checks.shape_of(matrix)}")
    size_in = size_out = (shape[2], shape[3])
    if "output_size" in draw and bool((draw["batch_prob"] > 0.5).any()):
        size_out = tuple(draw["output_size"][0].tolist())
    yield name, matrix, size_in, size_out


def _not_upright(name: str, why: str) -> ValueError:
    return _no_box(f"{name}, whose map {why}")


def _no_box(what: str) -> ValueError:
    return ValueError(f"augmentation: got {what}, expected only crops, flips, resizes and what moves no pixels")
