"""Matching by place against brute force, and every rule under every option of the loss."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import NoFloat64, check, flat64, make_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densecl_ops import Correspondence
from densecl_ops.functional import (
    dense_correspondence,
    location_correspondence,
)

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
    turned = [np.where(flip[:, None], box[:, [2, 1, 0, 3]], box) for box, flip in zip(boxes, flips, strict=True)]
    same = location_correspondence(*(torch.tensor(x).to(dtype) for x in turned), *grids, max_distance=max_distance)
    assert all(map(torch.equal, seen, same)), "x0 > x1 must say the same as a flip"
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


@given(seed=st.integers(0, 10**6), grids=st.tuples(GRIDS, GRIDS), dtype=st.sampled_from([torch.float32, torch.int64]))
def test_ties_of_any_two_grids(seed: int, grids: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype) -> None:
    """Whole pixels, but cells of any size: in fractions, so that equal distances are equal; the lowest index wins."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 8, (2, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 12, (2, 2))], 1)

    def centres(box: np.ndarray, grid: tuple[int, int]) -> list[tuple[Fraction, Fraction]]:
        sides = [Fraction(int(side)) / cells for side, cells in zip(box[2:] - box[:2], grid[::-1], strict=True)]
        rows, columns = (range(cells) for cells in grid)
        half = Fraction(1, 2)
        return [
            (int(box[0]) + (x + half) * sides[0], int(box[1]) + (y + half) * sides[1]) for y in rows for x in columns
        ]

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


def test_on_a_device_without_float64() -> None:
    boxes, flip = torch.tensor([[0, 0, 4, 4], [3, 1, 9, 9]]), torch.tensor([False, True])
    for dtype in (torch.float32, torch.int64, torch.uint8, torch.bfloat16):
        with NoFloat64():
            match = location_correspondence(boxes.to(dtype), boxes.float(), 3, key_flip=flip)
        assert match.index.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 0, 5, 4, 3, 8, 7, 6]]


def test_whatever_the_default_dtype(defaults: None) -> None:
    boxes = torch.tensor([[1000, 2000, 1007, 2007]], device="cpu")
    match = location_correspondence(boxes, boxes, 7, max_distance=0.0)
    assert match.index.tolist() == [list(range(49))]
    assert match.score.dtype == torch.float32
    assert match.valid.all()


def test_default_distance_is_pixpros() -> None:
    """Cells of 1 x 1: centres 0.9 apart are 0.636 diagonals apart, 1.1 apart 0.778."""
    here = torch.tensor([[0.0, 0, 1, 1]]).expand(2, -1)
    there = here + torch.tensor([[0.9, 0, 0.9, 0], [1.1, 0, 1.1, 0]])
    match = location_correspondence(here, there, 1)
    assert match.valid.tolist() == [[True], [False]]
    assert match.score.flatten().tolist() == pytest.approx([-0.9 / 2**0.5, -1.1 / 2**0.5])


@pytest.mark.parametrize("name", ["query_boxes", "key_boxes"])
@pytest.mark.parametrize("box", [[1, 1, 1, 4], [1, 3, 4, 3], [0, 0, float("nan"), 4], [0, 0, float("inf"), 4]])
def test_boxes_without_extent(name: str, box: list[float]) -> None:
    boxes = {key: torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]]) for key in ("query_boxes", "key_boxes")}
    boxes[name][1] = torch.tensor(box)
    with pytest.raises(ValueError, match=rf"{name}: got \[.*expected finite corners and sides other than 0"):
        location_correspondence(**boxes, query_grid=2)


# ---- every rule under every option of the loss ----------------------------------------------------------------------

QUERY_GRID, KEY_GRID = (3, 4), (4, 3)
BOXES = (
    np.array([[0, 0, 24, 24], [4, 2, 28, 14], [10, 10, 22, 34]]),
    np.array([[8, 4, 20, 28], [3, 0, 30, 16], [0, 0, 9, 8]]),
)
FLIPS = np.array([False, True, True]), np.array([False, False, True])
FEATURE_RULES = {
    "nearest": {},
    "mutual": {"mutual": True},
    "min_score": {"min_score": 0.35},
    "mutual, min_score": {"mutual": True, "min_score": 0.35},
}


def features(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 8, *grid, generator=generator).double() for grid in (QUERY_GRID, KEY_GRID))  # type: ignore[return-value]


def rule(name: str, backend: str = "auto") -> tuple[Correspondence, oracle.Match]:
    """What the library finds by a rule, beside what the oracle finds."""
    maps, options = features(5), FEATURE_RULES.get(name, {})
    boxes, flips = map(torch.tensor, BOXES), [torch.tensor(flip) for flip in FLIPS]
    place = location_correspondence(*boxes, QUERY_GRID, KEY_GRID, query_flip=flips[0], key_flip=flips[1])
    true_place = oracle.location_match(BOXES, (QUERY_GRID, KEY_GRID), FLIPS, 0.7)  # type: ignore[arg-type]
    if name == "location":
        return place, true_place
    options = {"mutual": True} if name == "location and mutual" else options
    found = dense_correspondence(*maps, **options, backend=backend)
    truth = oracle.match(*map(flat64, maps), **options)
    if name == "location and mutual":
        found = found._replace(valid=found.valid & place.valid)
        truth = truth._replace(valid=truth.valid & true_place.valid)
    return found, truth


def loss_case(found: Correspondence, dtype: torch.dtype = torch.float64) -> Any:
    case = make_case(3, channels=5, query_grid=QUERY_GRID, key_grid=KEY_GRID, negatives=9, dtype=dtype)
    return replace(case, index=found.index, valid=found.valid)


@pytest.mark.parametrize("name", [*FEATURE_RULES, "location", "location and mutual"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_rule_under_every_option(name: str, reduction: str, backend: str) -> None:
    """weight, exclude and rank, one by one and together; loss, rank and every gradient against the oracle."""
    found, truth = rule(name, backend)
    np.testing.assert_array_equal(found.valid.numpy(), truth.valid)
    if name == "location":  # whose ties test_location judges
        np.testing.assert_allclose(found.score.numpy(), truth.score, atol=1e-6)
    else:
        np.testing.assert_array_equal(found.index.numpy(), truth.index)
    assert bool(found.valid.all()) == (name == "nearest")
    assert found.valid.any()
    weight = torch.rand(3, 12, dtype=torch.float64)
    weight[0, :5] = 0
    for options in ({}, {"weight": weight}, {"exclude": torch.tensor([2, 8, 0])}):
        check(backend, replace(loss_case(found), reduction=reduction, **options))
    check(backend, replace(loss_case(found), reduction=reduction, weight=weight, exclude=torch.tensor([2, 8, 0])))


def test_a_rule_in_the_triton_interpreter() -> None:
    pytest.importorskip("triton", minversion="3.6")
    from densecl_ops import _triton

    if not torch.cuda.is_available() and not _triton.interpreting():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    found, truth = rule("location and mutual")
    case = replace(loss_case(found, torch.float32), weight=torch.rand(3, 12), exclude=torch.tensor([2, 8, 0]))
    assert 0 < truth.valid.sum() < truth.valid.size
    check("triton", case, 5e-6)
