"""Crop boxes from what torchvision, kornia and albumentations drew, and from matrices. None need be installed."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks, _tracing

# In pixels of an image. A crop or a flip leans by 1e-5 at most, the rounding of what kornia draws in float32; a
# rotation by a thousandth of a degree leans by 4e-3 over 224 pixels.
TOLERANCE = 1e-3
CROP = ("top", "left", "height", "width")

# Classes of albumentations: what runs others in order, and what keeps the box. An ImageOnlyTransform does, too; all
# else is refused.
IN_ORDER = {"ReplayCompose", "Compose", "Sequential", "OneOf", "OneOrOther"}
KEPT = {"Resize", "RandomScale", "SmallestMaxSize", "LongestMaxSize", "NoOp", "ToTensorV2", "PixelDropout"}
KEPT |= {"CoarseDropout", "GridDropout", "ConstrainedCoarseDropout", "Erasing"}

Size = tuple[int, int]
ImageSize = Any  # (height, width), or a sequence or tensor of one pair per image


def boxes_from_torchvision(params: Any, image_size: ImageSize = None) -> Tensor:
    """Crop boxes from what torchvision's RandomResizedCrop draws: (top, left, height, width).

    A box runs between the outer edges of the crop's pixels: the area that `resized_crop` scales, antialiased or not.

    Args:
        params: (top, left, height, width) of one image, or the dict that `make_params` of torchvision.transforms.v2
            returns; a sequence of B of either; a (B, 4) tensor; or what default_collate makes of B tuples or dicts,
            but for B = 4: four (4,) tensors may be one per image. `torch.stack(params, 1)` of it works for every B.
        image_size: (height, width) of the images, or B of them. Boxes are then checked to lie inside, which finds
            most mix-ups with other libraries' order. Default: not checked.

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels, as `location_correspondence` takes them, where the tensors
        are, or on the CPU.

    Raises:
        TypeError: params is none of these.
        ValueError: Shape or size do not fit, or a box leaves its image by more than a pixel.

    Example:
        >>> from densecl_ops.functional import boxes_from_torchvision
        >>> boxes_from_torchvision([(10, 20, 100, 120), (0, 0, 64, 64)], image_size=(128, 160)).tolist()
        [[20.0, 10.0, 140.0, 110.0], [0.0, 0.0, 64.0, 64.0]]
    """
    rows = _checks.require_real("params", _torchvision_rows(params))
    rows = rows.unsqueeze(0) if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.shape[0] == 0:
        raise ValueError(f"params: got shape {_checks.shape_of(rows)}, expected (B, 4): top, left, height, width")
    if _tracing.host_may_look(rows) and not bool((rows[:, 2:] > 0).all()):
        raise ValueError("params: got a height or width of 0 or less, expected (top, left, height, width)")
    top, left, height, width = widened(rows).unbind(1)
    boxes = torch.stack([left, top, left + width, top + height], 1).float()
    if image_size is not None and _tracing.host_may_look(boxes):
        size = _image_sizes(image_size, len(boxes)).flip(1)
        outside = ((boxes < -1) | (boxes > size.repeat(1, 2) + 1)).any(1)
        if outside.any():
            raise ValueError(
                f"params: got the box {boxes[outside][0].tolist()} beyond its image, expected (top, left, height, "
                "width): not corners, and not x before y"
            )
    return boxes


def widened(boxes: Tensor) -> Tensor:
    """int64, float32 or float64, without gradient: sums and differences of uint8 or float16 need not fit the same."""
    least = torch.float32 if boxes.is_floating_point() else torch.int64
    return boxes.detach().to(torch.promote_types(boxes.dtype, least))


def _torchvision_rows(params: Any) -> Tensor:
    """(4,) or (B, 4)."""
    several = isinstance(params, (list, tuple)) and len(params) > 0
    if several and all(isinstance(one, Mapping) for one in params):
        return torch.cat([_torchvision_rows(one).reshape(-1, 4) for one in params])
    columns: Any = [params.get(name) for name in CROP] if isinstance(params, Mapping) else None
    if several and len(params) == 4 and all(isinstance(one, Tensor) for one in params):
        columns = params
        if all(one.shape == (4,) for one in params):
            raise ValueError(
                "params: got four (4,) tensors, which may be four images or the four numbers, expected one (B, 4) "
                "tensor: torch.stack(params) of images, torch.stack(params, 1) of what default_collate returns"
            )
    try:
        padded = isinstance(params, Mapping) and bool(_as_tensor(params.get("needs_pad", False)).any())
        rows = _as_tensor(params) if columns is None else torch.stack([_as_tensor(one) for one in columns], -1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"params: got {type(params).__name__} ({error}), expected (top, left, height, width), a dict of them, a "
            "sequence of such tuples or dicts, a (B, 4) tensor or four (B,) tensors"
        ) from None
    if padded:
        raise ValueError("params: got needs_pad, expected a crop without padding: its view shows more than a box")
    return rows


def _as_tensor(numbers: Any) -> Tensor:
    """A tensor as it is, other numbers as float32 on the CPU whatever the defaults."""
    return numbers if isinstance(numbers, Tensor) else torch.as_tensor(numbers, dtype=torch.float32, device="cpu")


def _image_sizes(image_size: ImageSize, batch: int) -> Tensor:
    """(1 or B, 2) float32 heights and widths on the CPU."""
    try:
        sizes = torch.as_tensor(image_size, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        sizes = torch.empty(0)
    if sizes.shape not in ((2,), (batch, 2)) or not bool((sizes > 0).all()):
        raise ValueError(f"image_size: got {image_size!r}, expected (height, width), or {batch} of them")
    return sizes.reshape(-1, 2)


def boxes_from_matrix(matrix: Any, size: Size, image_size: ImageSize = None) -> Tensor:
    """Crop boxes from the matrices that map pixels of an image to pixels of the view cut out of it.

    Inverted, they carry the outer edges of the view back into the image. Coordinates are (x, y) and count from the
    centre of the first pixel, as in OpenCV, kornia and albumentations. A library that counts from the corner of the
    image has `matrix = shift @ theirs @ shift.inverse()`, with `shift` the translation by -1/2 in x and y.

    Args:
        matrix: (3, 3) or (2, 3), or B of them: a tensor, an array or nested sequences.
        size: (height, width) of the view.
        image_size: (height, width) of the images, or B of them. Then the centres of the view's pixels are checked to
            lie at most a pixel outside. Default: not checked.

    Returns:
        (B, 4) float32 boxes (x0, y0, x1, y1) in pixels of the image, on the CPU. x0 > x1 where the view is mirrored
        left to right, y0 > y1 where top to bottom.

    Raises:
        TypeError: matrix holds no real numbers.
        ValueError: matrix has another shape, cannot be inverted, or turns or shears; or the view leaves the image.

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
    if (view := _checks.require_grid_size("size", size)) is None:
        raise TypeError("size: got None, expected (height, width) of the view")
    inside = None if image_size is None else _image_sizes(image_size, len(rows))
    return _upright_boxes("matrix: got a map that", rows, view, inside)


def _upright_boxes(who: str, matrix: Tensor, size: Size, image_size: Tensor | None) -> Tensor:
    """(B, 4) of (B, 3, 3) float64; image_size (1 or B, 2) heights and widths. `who` begins what refuses."""
    height, width = size
    x, y = torch.tensor([[0, width, width, 0], [0, 0, height, height]], dtype=torch.float64, device="cpu") - 0.5
    corners = torch.stack([x, y, torch.ones_like(x)])  # of the view, clockwise
    try:
        corners = torch.linalg.solve(matrix, corners)
    except RuntimeError:
        raise _no_box(f"{who} cannot be inverted") from None
    first, second, third, fourth = (corners[:, :2] / corners[:, 2:]).unbind(2)
    lean = torch.stack([(fourth - first)[:, 0], (third - second)[:, 0], (second - first)[:, 1], (third - fourth)[:, 1]])
    if not bool((lean.abs() < TOLERANCE).all()):  # NaN is no box either
        raise _no_box(f"{who} is not upright")
    if image_size is not None:
        # Centres of the corner pixels: align_corners=True puts them on those of the image, and the edges beyond.
        half_pixel = (third - first) / (2 * torch.tensor([width, height], device="cpu"))
        low, high = torch.stack([first + half_pixel, third - half_pixel]).aminmax(dim=0)
        if not bool(((low >= -1.5) & (high <= image_size.flip(1) + 0.5)).all()):
            raise _no_box(f"{who} shows more than its image")
    return torch.cat([first, third], 1).add(0.5).float()


def _no_box(what: str) -> ValueError:
    return ValueError(f"{what}, expected only crops, flips, resizes and what moves no pixels")


def boxes_from_kornia(augmentation: Any) -> Tensor:
    """Crop boxes of the last call of a kornia augmentation, mirrored where a flip was drawn.

    The matrices of all steps of the call are multiplied and read as by `boxes_from_matrix`. The `transform_matrix` of
    a sequence would leave out sequences inside it, and steps drawn twice.

    Args:
        augmentation: After it was called on images, and before the next call draws anew: RandomResizedCrop,
            RandomCrop, ..., or an AugmentationSequential or ImageSequential, with others inside, RandAugment, ...

    Returns:
        (B, 4) float32 boxes in pixels of the input image, on the CPU, mirrored as those of `boxes_from_matrix`.

    Raises:
        TypeError: augmentation is not one of kornia's.
        ValueError: It was not called yet; it moved pixels in a way that no box describes: rotation, shear, padding,
            mixing of images, ...; or it holds a module that keeps no record, such as a plain torch.nn.Module.

    Example:
        >>> import kornia.augmentation as K  # doctest: +SKIP
        >>> from densecl_ops.functional import boxes_from_kornia
        >>> augment = K.AugmentationSequential(K.CenterCrop(8), K.RandomHorizontalFlip(p=1.0))  # doctest: +SKIP
        >>> view = augment(torch.rand(1, 3, 10, 12))  # doctest: +SKIP
        >>> boxes_from_kornia(augment).tolist()  # doctest: +SKIP
        [[10.0, 1.0, 2.0, 9.0]]
    """
    name = type(augmentation).__name__
    if not hasattr(augmentation, "_params"):
        raise TypeError(f"augmentation: got {name}, expected the kornia augmentation itself, after its call")
    if not augmentation._params:
        raise ValueError(f"augmentation: got {name} before its call, expected one after it")
    steps = list(_kornia_steps(augmentation, augmentation._params))
    _, last, _, view = steps[-1]
    matrix, boxes = torch.eye(3, device="cpu").to(last), last
    for who, step, size_in, _ in reversed(steps):  # a later crop may hide the border that a step added
        matrix = matrix @ step
        boxes = _upright_boxes(f"{who}, whose map", matrix, view, torch.tensor([size_in], device="cpu"))
    return boxes


def _kornia_steps(module: Any, draw: Any) -> Iterator[tuple[str, Tensor, Size, Size]]:
    """What begins a refusal, the (B, 3, 3) float64 matrix and both sizes of each augmentation of a call, in order."""
    if isinstance(draw, (list, tuple)) and all(hasattr(item, "data") for item in draw):
        for item in draw:
            yield from _kornia_steps(module.get_submodule(item.name), item.data)
        return
    module = getattr(module, "op", module)  # policies such as RandAugment wrap each augmentation once more
    who = f"augmentation: got {type(module).__name__}"
    if not isinstance(draw, Mapping) or not hasattr(module, "generate_transformation_matrix"):
        raise _no_box(f"{who}, which has no matrix")
    draw = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in draw.items()}
    shape = draw["forward_input_shape"].tolist()
    if len(shape) != 4 or draw["batch_prob"].shape != (shape[0],):
        raise _no_box(f"{who} of videos or volumes")
    if "pad_mode" in module.flags or ("padding_size" in draw and bool(draw["padding_size"].any())):
        raise _no_box(f"{who} with padding")
    if module.flags.get("align_corners") is False:
        import kornia

        # Before 0.9 the matrix of a crop or resize was that of align_corners=True, up to 0.9 pixels beside the view.
        if tuple(map(int, kornia.__version__.split(".")[:2])) < (0, 9):
            raise _no_box(f"{who} with align_corners=False of kornia {kornia.__version__}, older than 0.9")
    with torch.device("cpu"):  # only the shape and the dtype of the input matter: no channels, no memory
        images = torch.empty(shape[0], 0, *shape[2:], dtype=torch.float64)
        matrix = module.generate_transformation_matrix(images, draw, module.flags)
    size_in = size_out = (shape[2], shape[3])
    if "output_size" in draw and bool((draw["batch_prob"] > 0.5).any()):
        size_out = tuple(draw["output_size"][0].tolist())
    yield who, matrix, size_in, size_out


def boxes_from_albumentations(replay: Mapping[str, Any], image_size: Size) -> Tensor:
    """Crop box of one call of albumentations' ReplayCompose, mirrored where a flip was drawn.

    Crops are cut out of each other in their order, as "crop_coords" and "shape" of each applied step say. Read with
    albumentations 2.0.8 and albumentationsx 2.5.1.

    Args:
        replay: What the composed call returns under "replay"; not what `ReplayCompose.replay` does, which is empty.
        image_size: (height, width) of the image before the call.

    Returns:
        (1, 4) float32 box in pixels of the image, on the CPU, mirrored as those of `boxes_from_matrix`.

    Raises:
        TypeError: replay is not such a dict.
        ValueError: An applied step moved pixels as no box describes: rotation, padding, steps in a random order, ...;
            or the image had another size.

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
    certain = [one for one in replay["transforms"] if one.get("p") == 1 and "transforms" not in one]
    if certain and not replay.get("applied") and replay.get("p") == 1:
        raise ValueError(
            "replay: got one that applied nothing, not even a step of p=1, as ReplayCompose.replay() returns it, "
            "expected what the call that drew has returned"
        )
    before: Size | None = None
    height, width = _image_sizes(image_size, 1).reshape(2).tolist()
    x0, y0, x1, y1 = 0.0, 0.0, width, height
    for name, draw in _albumentations_steps(replay):
        who = f"replay: got a {name}"
        if "shape" not in draw:
            raise _no_box(f"{who} that keeps no shape")
        rows, columns = draw["shape"][:2]
        before = before or (rows, columns)
        if before != (height, width):
            raise ValueError(f"image_size: got {image_size}, expected {before}, which the replay starts from")
        if name == "HorizontalFlip":
            x0, x1 = x1, x0
        elif name == "VerticalFlip":
            y0, y1 = y1, y0
        elif draw.get("pad_params") is not None:
            raise _no_box(f"{who} with padding")
        elif (crop := draw.get("crop_coords", draw.get("crop_params"))) is not None:
            left, top, right, bottom = crop
            if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
                raise _no_box(f"{who} to {tuple(crop)} of {columns} x {rows} pixels")
            x0, x1 = x0 + (x1 - x0) * left / columns, x0 + (x1 - x0) * right / columns
            y0, y1 = y0 + (y1 - y0) * top / rows, y0 + (y1 - y0) * bottom / rows
        elif name not in KEPT:
            from albumentations import ImageOnlyTransform
            from albumentations.core.serialization import SERIALIZABLE_REGISTRY

            if not issubclass(SERIALIZABLE_REGISTRY.get(name, object), ImageOnlyTransform):
                raise _no_box(who)
    return torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32, device="cpu")


def _albumentations_steps(step: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Class and draw of the applied steps in their order, nested ones unrolled."""
    name = str(step.get("__class_fullname__"))  # with its module only where it is not albumentations' own
    if not step.get("applied"):
        return
    if "transforms" not in step:
        draw = step.get("params") or {}
        yield name, draw.get("params", draw)  # albumentationsx has one "params" more
    elif name not in IN_ORDER:
        raise _no_box(f"replay: got a {name}, whose order is not kept")
    else:
        for inner in step["transforms"]:
            yield from _albumentations_steps(inner)
