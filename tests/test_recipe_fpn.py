"""docs/recipes/fpn.md: one level of a feature pyramid, pooled to a grid or not."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, numpy64
from recipes import Network, check_moco_step, example, views
from torch import nn


def network(encoder: nn.Module) -> Network:
    return Network(encoder, encoder.head, lambda images: (encoder.pyramid(images)[1],))


@pytest.mark.parametrize("grid_size", [4, 3, 8])
def test_step(grid_size: int) -> None:
    model = example("with_fpn").DenseCL(grid_size, queue_size=10).double()
    networks = network(model.encoder_q), network(model.encoder_k)
    grid = (grid_size, grid_size)
    shape = check_moco_step(model, lambda *images: model(*images, momentum=0.9), *networks, grid)
    assert shape == (4, 64, 8, 8)


def test_pyramid() -> None:
    """The level from its equation: output(lateral(c_4) + each lateral(c_8) on 2 x 2 cells)."""
    pyramid = example("with_fpn").Pyramid(6).double().eval()
    images, _ = views()
    c_8, level = pyramid(images)
    coarse, fine = numpy64(pyramid.lateral_8(c_8)), numpy64(pyramid.lateral_4(pyramid.stage_4(images)))
    merged = torch.from_numpy(fine + coarse.repeat(2, axis=2).repeat(2, axis=3))
    assert_close(level, nn.functional.conv2d(merged, pyramid.output_4.weight, pyramid.output_4.bias, padding=1), 1e-12)
    assert c_8.shape == (4, 64, 4, 4)
