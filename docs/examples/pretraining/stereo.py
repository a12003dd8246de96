"""Dense matching on a stereo pair with measured disparities ("Motorcycle", Middlebury 2014)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence
from pretraining.augment import normalize

CLOSE = 1.5  # cells


class Pair(NamedTuple):
    """Left and right image (1, 3, H, W) in [0, 1], and the disparities (H, W); both sides are multiples of stride."""

    left: Tensor
    right: Tensor
    disparity: Tensor
    stride: int


class Matches(NamedTuple):
    """What every cell of the left image was matched with.

    Attributes:
        predicted: (H, W, 2) row and column in the right image, in cells.
        error: (H, W) distance from the measured place, in cells; NaN where none was measured.
        close: Share of the measured cells within CLOSE.
        median: Median error.
    """

    predicted: Tensor
    error: Tensor
    close: float
    median: float


def load_pair(stride: int, device: torch.device) -> Pair:
    """Cuts off what does not fill a cell at the lower and right edges."""
    import skimage.data

    arrays = skimage.data.stereo_motorcycle()  # type: ignore[no-untyped-call]
    height, width = (side // stride * stride for side in arrays[2].shape)
    left, right, disparity = (
        torch.from_numpy(array[:height, :width].astype(np.float32)).to(device) for array in arrays
    )
    return Pair(left.permute(2, 0, 1)[None] / 255, right.permute(2, 0, 1)[None] / 255, disparity, stride)


def true_columns(disparity: Tensor, stride: int) -> Tensor:
    """(H, W) column, in cells of the right image, that each left cell's centre matches; NaN where there is none.

    left[y, x] is right[y, x - disparity], whatever the docstring of scikit-image says, and an unknown disparity is
    inf. Cells whose match lies outside the right image have no right answer either.
    """
    at_centre = disparity[stride // 2 :: stride, stride // 2 :: stride]
    column = torch.arange(at_centre.shape[1], device=disparity.device) - at_centre / stride
    inside = (column >= -0.5) & (column < column.shape[1] - 0.5)  # half a cell: from centres to edges
    return column.masked_fill(~inside, torch.nan)


@torch.no_grad()
def evaluate(backbone: nn.Module, pair: Pair) -> Matches:
    """Matches each cell of the left image with the whole right image, by nothing but the backbone's features."""
    training = backbone.training
    backbone.eval()
    index = DenseCorrespondence()(backbone(normalize(pair.left)), backbone(normalize(pair.right))).index
    backbone.train(training)
    column = true_columns(pair.disparity, pair.stride)
    height, width = column.shape
    predicted = torch.stack([index // width, index % width], -1).view(height, width, 2).float()
    row = torch.arange(height, device=column.device)[:, None]
    error = torch.hypot(predicted[..., 0] - row, predicted[..., 1] - column)
    known = error[~error.isnan()]
    return Matches(predicted, error, float((known <= CLOSE).float().mean()), float(known.median()))
