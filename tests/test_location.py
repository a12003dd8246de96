"""Matching by place against brute force."""

from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densecl_ops.functional import location_correspondence

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
# Of an enormous image, as far from its origin as the dtype can tell pixels apart.
CORNERS = dict.fromkeys((torch.uint8, torch.float16, torch.bfloat16), 0) | {torch.float32: 2**20}
CORNERS |= dict.fromkeys((torch.float64, torch.int64), 2**40)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 12),
    grids=st.tuples(GRIDS, GRIDS),
    max_distance=st.sampled_from([None, 0, 0.3, Fraction(7, 10), 2.0, 10**300]),
    dtype=st.sampled_from([*CORNERS]),
)
def test_location(seed: int, batch: int, grids: Any, max_distance: float | None, dtype: torch.dtype) -> None:
    """Whole pixels, but cells of any size. Of keys that are as near, the lowest index wins."""
    rng = np.random.default_rng(seed)
    corners = CORNERS[dtype] + rng.integers(0, 8, (2, batch, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 12, (2, batch, 2))], 2)
    flips = rng.random((2, batch)) < 0.5
    index, distance = oracle.location_match(boxes, grids, flips)
    query_flip, key_flip = torch.tensor(flips)
    seen = location_correspondence(
        *torch.tensor(boxes).to(dtype), *grids, query_flip=query_flip, key_flip=key_flip, max_distance=max_distance
    )
    turned = torch.tensor(np.where(flips[:, :, None], boxes[:, :, [2, 1, 0, 3]], boxes)).to(dtype)
    same = location_correspondence(*turned, *grids, max_distance=max_distance)
    assert all(map(torch.equal, seen, same)), "x0 > x1 must say the same as a flip"
    assert (seen.index.dtype, seen.score.dtype, seen.valid.dtype) == (torch.int64, torch.float32, torch.bool)
    np.testing.assert_array_equal(seen.index.numpy(), index)
    np.testing.assert_allclose(seen.score.numpy(), -distance, atol=1e-5)
    bound = float("inf") if max_distance is None else max_distance
    clear = np.abs(distance - bound) > 1e-6
    np.testing.assert_array_equal(seen.valid.numpy()[clear], (distance <= bound)[clear])


def test_default_distance_is_pixpros() -> None:
    """Cells of 1 x 1: centres 0.9 apart are 0.636 diagonals apart, 1.1 apart 0.778."""
    here = torch.tensor([[0.0, 0, 1, 1]]).expand(2, -1)
    there = here + torch.tensor([[0.9, 0, 0.9, 0], [1.1, 0, 1.1, 0]])
    assert location_correspondence(here, there, 1).valid.tolist() == [[True], [False]]
