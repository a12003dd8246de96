"""Matching by place against brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densecl_ops.functional import location_correspondence

Grid = tuple[int, int]
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def random_boxes(rng: np.random.Generator, batch: int, grid: Grid) -> np.ndarray:
    """Integer boxes whose sides are multiples of the grid, so that cells are whole pixels."""
    corner = rng.integers(0, 25, (batch, 2))
    cell = rng.integers(1, 6, (batch, 2))
    return np.concatenate([corner, corner + cell * np.array(grid[::-1])], 1)


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    grids=st.tuples(GRIDS, GRIDS),
    max_distance=st.sampled_from([None, 0, 0.3, Fraction(7, 10), 2.0, 10**300]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.float16, torch.bfloat16]),
)
def test_location(
    seed: int, batch: int, grids: tuple[Grid, Grid], max_distance: float | None, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, batch, grids[0]), random_boxes(rng, batch, grids[1])
    flips = rng.random(batch) < 0.5, rng.random(batch) < 0.5
    truth = oracle.location_match(boxes, grids, flips, max_distance)
    seen = location_correspondence(
        *(torch.tensor(box).to(dtype) for box in boxes),
        *grids,
        query_flip=torch.tensor(flips[0]),
        key_flip=torch.tensor(flips[1]),
        max_distance=max_distance,
    )
    turned = [np.where(flip[:, None], box[:, [2, 1, 0, 3]], box) for box, flip in zip(boxes, flips, strict=True)]
    same = location_correspondence(*(torch.tensor(x).to(dtype) for x in turned), *grids, max_distance=max_distance)
    assert all(map(torch.equal, seen, same)), "x0 > x1 must say the same as a flip"
    assert (seen.index.dtype, seen.score.dtype, seen.valid.dtype) == (torch.int64, torch.float32, torch.bool)
    np.testing.assert_allclose(seen.score.numpy(), truth.score, atol=1e-5)
    tied = np.take_along_axis(truth.similarity, seen.index.numpy()[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(tied, truth.score, atol=1e-9)
    clear = np.ones(tied.shape, bool) if max_distance is None else np.abs(-truth.score - max_distance) > 1e-9
    np.testing.assert_array_equal(seen.valid.numpy()[clear], truth.valid[clear])


def centres(box: np.ndarray, grid: Grid) -> list[tuple[Fraction, Fraction]]:
    width, height = (Fraction(int(side)) / cells for side, cells in zip(box[2:] - box[:2], grid[::-1], strict=True))
    half = Fraction(1, 2)
    return [
        (int(box[0]) + (x + half) * width, int(box[1]) + (y + half) * height)
        for y in range(grid[0])
        for x in range(grid[1])
    ]


@given(seed=st.integers(0, 10**6), grids=st.tuples(GRIDS, GRIDS), dtype=st.sampled_from([torch.float32, torch.int64]))
def test_ties_of_any_two_grids(seed: int, grids: tuple[Grid, Grid], dtype: torch.dtype) -> None:
    """Whole pixels, but cells of any size: in fractions, so that equal distances are equal; the lowest index wins."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 8, (2, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 12, (2, 2))], 1)
    here, there = (centres(box, grid) for box, grid in zip(boxes, grids, strict=True))
    expected = [
        min(range(len(there)), key=lambda j: ((there[j][0] - x) ** 2 + (there[j][1] - y) ** 2, j)) for x, y in here
    ]
    seen = location_correspondence(*(torch.tensor(box[None]).to(dtype) for box in boxes), *grids)
    assert seen.index.tolist() == [expected]


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 2**20), (torch.int64, 2**40), (torch.float64, 2**40)])
def test_far_from_the_origin(dtype: torch.dtype, far: int) -> None:
    """Crops of an enormous image match as they would at its corner."""
    rng = np.random.default_rng(0)
    boxes = [torch.tensor(random_boxes(rng, 20, (4, 5))) for _ in range(2)]
    flip = torch.tensor(rng.random(20) < 0.5)
    near = location_correspondence(*boxes, (4, 5), 6, query_flip=flip)
    moved = location_correspondence(*((box + far).to(dtype) for box in boxes), (4, 5), 6, query_flip=flip)
    assert torch.equal(moved.index, near.index)
    assert torch.equal(moved.valid, near.valid)
    torch.testing.assert_close(moved.score, near.score, atol=1e-6, rtol=0)


def test_default_distance_is_pixpros() -> None:
    """Cells of 1 x 1: centres 0.9 apart are 0.636 diagonals apart, 1.1 apart 0.778."""
    here = torch.tensor([[0.0, 0, 1, 1]]).expand(2, -1)
    there = here + torch.tensor([[0.9, 0, 0.9, 0], [1.1, 0, 1.1, 0]])
    assert location_correspondence(here, there, 1).valid.tolist() == [[True], [False]]
