"""Geometric matching against brute force on rendered coordinates."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densecl_ops.functional import location_correspondence

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def random_boxes(rng: np.random.Generator, batch: int, grid: tuple[int, int]) -> np.ndarray:
    """Integer boxes whose sides are multiples of the grid, so that cells are whole pixels."""
    corner = rng.integers(0, 25, (batch, 2))
    cell = rng.integers(1, 6, (batch, 2))
    return np.concatenate([corner, corner + cell * np.array(grid[::-1])], 1)


def check_location(
    boxes: tuple[np.ndarray, np.ndarray],
    grids: tuple[tuple[int, int], tuple[int, int]],
    flips: tuple[np.ndarray, np.ndarray],
    max_distance: float | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    truth = oracle.location_match(boxes, grids, flips, max_distance)
    seen = location_correspondence(
        *(torch.tensor(box).to(dtype) for box in boxes),
        *grids,
        query_flip=torch.tensor(flips[0]),
        key_flip=torch.tensor(flips[1]),
        max_distance=max_distance,
    )
    assert (seen.index.dtype, seen.score.dtype, seen.valid.dtype) == (torch.int64, torch.float32, torch.bool)
    np.testing.assert_allclose(seen.score.numpy(), truth.score, atol=1e-5)
    ordered = np.sort(-truth.similarity, 2)[:, :, :2]
    clear = (truth.similarity.shape[2] == 1) | (ordered[:, :, -1] - ordered[:, :, 0] > 1e-9)
    np.testing.assert_array_equal(seen.index.numpy()[clear], truth.index[clear])
    tied = np.take_along_axis(truth.similarity, seen.index.numpy()[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(tied, truth.score, atol=1e-9)
    if max_distance is not None:
        clear = np.abs(-truth.score - max_distance) > 1e-9
    np.testing.assert_array_equal(seen.valid.numpy()[clear], truth.valid[clear])


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    grids=st.tuples(GRIDS, GRIDS),
    max_distance=st.sampled_from([None, 0.0, 0.3, 0.7, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]),
)
def test_location(
    seed: int,
    batch: int,
    grids: tuple[tuple[int, int], tuple[int, int]],
    max_distance: float | None,
    dtype: torch.dtype,
) -> None:
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, batch, grids[0]), random_boxes(rng, batch, grids[1])
    flips = rng.random(batch) < 0.5, rng.random(batch) < 0.5
    check_location(boxes, grids, flips, max_distance, dtype)


def test_same_crop_matches_itself_at_distance_zero() -> None:
    boxes = torch.tensor([[3.0, 5.0, 17.0, 19.0]])
    match = location_correspondence(boxes, boxes, 7, max_distance=0.0)
    assert match.index.tolist() == [list(range(49))]
    assert (match.score == 0).all()
    assert match.valid.all()


def test_flip_mirrors_the_columns() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8]]).expand(2, -1)
    match = location_correspondence(boxes, boxes, 2, key_flip=torch.tensor([True, False]))
    assert match.index.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]]
    match = location_correspondence(boxes, boxes, 2, query_flip=torch.tensor([True, False]))
    assert match.index.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]]


def test_ties_go_to_the_lowest_index() -> None:
    """One query cell centred on the corner of four key cells."""
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    for key_grid, flip in ((2, False), (4, False), ((2, 4), True)):
        match = location_correspondence(boxes, boxes, 1, key_grid, key_flip=torch.tensor([flip]))
        grid = (key_grid, key_grid) if isinstance(key_grid, int) else key_grid
        lowest = (grid[0] // 2 - 1) * grid[1] + grid[1] // 2 - 1
        assert match.index.tolist() == [[lowest]]


def test_default_distance_is_pixpros() -> None:
    """Cells of 1 x 1: centres 0.9 apart are 0.636 diagonals apart, 1.1 apart 0.778."""
    here = torch.tensor([[0.0, 0, 1, 1]]).expand(2, -1)
    there = here + torch.tensor([[0.9, 0, 0.9, 0], [1.1, 0, 1.1, 0]])
    match = location_correspondence(here, there, 1)
    assert match.valid.tolist() == [[True], [False]]
    assert match.score.flatten().tolist() == pytest.approx([-0.9 / 2**0.5, -1.1 / 2**0.5])


def test_distance_is_in_diagonals_of_the_larger_cell() -> None:
    small, large = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 0, 5, 4]])
    for a, b in ((small, large), (large, small)):
        assert location_correspondence(a, b, 1).score.item() == pytest.approx(-np.hypot(3, 1.5) / 5)


def test_disjoint_crops_have_no_match() -> None:
    match = location_correspondence(torch.tensor([[0, 0, 10, 10]]), torch.tensor([[90, 90, 99, 99]]), 5)
    assert not match.valid.any()
    assert ((match.index >= 0) & (match.index < 25)).all()
