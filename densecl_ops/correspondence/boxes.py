"""Crop boxes from what torchvision and kornia keep of their random crops. Neither need be installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densecl_ops import _checks

# In pixels of an image. A crop or a flip leans by 1e-5 at most, the rounding of what kornia draws in float32; a
# rotation by a thousandth of a degree leans by 4e-3 over 224 pixels.
TOLERANCE = 1e-3


def boxes_from_torchvision(params: Any) -> Tensor:
    """Crop boxes from the (top, left, height, width) that torchvision's RandomResizedCrop.get_params returns.

    A box runs between the outer edges of the crop's pixels, from left to left + width: the area that `resized_crop`
    scales, antialiased or not.

    Args:
        params: (top, left, height, width) of one image; a sequence of B such tuples; a (B, 4) tensor; or the four
            (B,) tensors that PyTorch's default_collate makes of B tuples. Four (4,) tensors are refused: they may as
            well be one tensor per image. `torch.stack(params, 1)` of default_collate's works for every B.

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels, as `location_correspondence` takes them; B is 1 for one image.
        They are where the tensors are, or on the CPU.

    Raises:
        TypeError: params is none of these.
        ValueError: There are not four values per image, they are four (4,) tensors, or a height or width is not above
            0.

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
    top, left, height, width = widened(rows).unbind(1)
    return torch.stack([left, top, left + width, top + height], 1).float()


def widened(boxes: Tensor) -> Tensor:
    """int64, float32 or float64, without gradient: sums and differences of uint8 or float16 need not fit the same."""
    return boxes.detach().to(
        torch.promote_types(boxes.dtype, torch.float32 if boxes.is_floating_point() else torch.int64)
    )


def _torchvision_rows(params: Any) -> Tensor:
    columns = isinstance(params, (list, tuple)) and len(params) == 4 and all(isinstance(x, Tensor) for x in params)
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
            f"params: got {type(params).__name__} ({error}), expected (top, left, height, width), a sequence of such "
            "tuples, a (B, 4) tensor or four (B,) tensors"
        ) from None
    return rows.unsqueeze(0) if rows.ndim == 1 else rows


def boxes_from_kornia(augmentation: Any) -> Tensor:
    """Crop boxes of the last call of a kornia augmentation, mirrored where a flip was drawn.

    Every step of the call has a matrix that maps pixels of its input to pixels of its output. Inverted, they carry
    the outer edges of the view back into the image. What leaves no upright box is refused, whatever it is called.

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
    for step, following in pairwise(steps):
        if step.size_out != following.size_in:
            raise _no_box(f"{following.name} of an image that {step.name} did not make")

    height, width = steps[-1].size_out
    x, y = torch.tensor([[0, width, width, 0], [0, 0, height, height]], dtype=torch.float64, device="cpu") - 0.5
    corners = torch.stack([x, y, torch.ones_like(x)])  # of the view, clockwise, where pixel centres are integers
    for step in reversed(steps):
        corners = _undo(step, corners, torch.tensor([width, height], device="cpu"))
    return torch.cat([corners[:, :2, 0], corners[:, :2, 2]], 1).add(0.5).float()


class _Step(NamedTuple):
    """One augmentation as it was drawn: (B, 3, 3) float64 from pixels of its input to those of its output."""

    name: str
    matrix: Tensor
    size_in: tuple[int, int]
    size_out: tuple[int, int]


def _steps(module: Any, draw: Any) -> Iterator[_Step]:
    """The augmentations of one call in their order, sequences inside sequences unrolled."""
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
    batch, _, height, width = shape
    if "pad_mode" in module.flags or ("padding_size" in draw and bool(draw["padding_size"].any())):
        raise _no_box(f"{name} with padding")
    if module.flags.get("align_corners") is False:
        _require_true_matrices(name)
    with torch.device("cpu"):  # whatever the default device is
        # Only the shape and the dtype of the input matter: no channels, no memory.
        images = torch.empty(batch, 0, height, width, dtype=torch.float64)
        matrix = module.generate_transformation_matrix(images, draw, module.flags)
    if matrix.shape != (batch, 3, 3):
        raise _no_box(f"{name}, whose matrix has shape {_checks.shape_of(matrix)}")
    size_out = height, width
    if "output_size" in draw and bool((draw["batch_prob"] > 0.5).any()):
        size_out = tuple(draw["output_size"][0].tolist())
    yield _Step(name, matrix, (height, width), size_out)


def _undo(step: _Step, corners: Tensor, view_size: Tensor) -> Tensor:
    """(B, 3, 4) corners of the view in the output of a step, carried into its input."""
    try:
        corners = torch.linalg.solve(step.matrix, corners)
    except RuntimeError:
        raise _no_box(f"{step.name}, whose map cannot be inverted") from None
    corners = corners / corners[:, 2:]
    first, second, third, fourth = corners[:, :2].unbind(2)
    lean = torch.stack([(fourth - first)[:, 0], (third - second)[:, 0], (second - first)[:, 1], (third - fourth)[:, 1]])
    if not bool((lean.abs() < TOLERANCE).all()):  # NaN is no box either
        raise _no_box(f"{step.name}, whose map is not upright")
    half_pixel = (third - first) / (2 * view_size)
    outermost = torch.cat([first + half_pixel, third - half_pixel])  # centres of the view's corner pixels
    inside = torch.tensor(step.size_in[::-1], device="cpu").double() - 0.5
    if not bool(((outermost > -0.5 - TOLERANCE) & (outermost < inside + TOLERANCE)).all()):
        raise _no_box(f"{step.name}, which shows more than its input")
    return corners


def _require_true_matrices(name: str) -> None:
    """Before 0.9 the matrix of a crop or resize was that of align_corners=True, up to 0.9 pixels beside the view."""
    import kornia

    if tuple(map(int, kornia.__version__.split(".")[:2])) < (0, 9):
        raise ValueError(
            f"augmentation: got {name} with align_corners=False of kornia {kornia.__version__}, expected "
            "align_corners=True or kornia 0.9"
        )


def _no_box(what: str) -> ValueError:
    return ValueError(f"augmentation: got {what}, expected only crops, flips, resizes and what moves no pixels")
