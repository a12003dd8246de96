"""in_batch_negatives on one process; test_distributed.py has the ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from helpers import EPS, numpy64
from torch import Tensor

from densecl_ops.functional import in_batch_negatives


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x[::2, 1:]])
def test_unit_rows_in_order(dtype: torch.dtype, batch: int, layout: Callable[[Tensor], Tensor]) -> None:
    keys = layout((3 * torch.randn(batch, 4, dtype=torch.float64)).to(dtype))
    before = keys.clone()
    negatives, own = in_batch_negatives(keys)
    assert (negatives.dtype, negatives.shape, own.dtype) == (dtype, keys.shape, torch.int64)
    np.testing.assert_allclose(numpy64(negatives), oracle.unit(numpy64(keys), 1)[0], atol=EPS[dtype])
    assert own.tolist() == list(range(len(keys)))
    assert torch.equal(keys, before)
    assert not negatives.requires_grad


def test_extreme_keys() -> None:
    """Zero keys stay zero; squares that overflow float16, or vanish in it, do neither here."""
    keys = torch.tensor([[0.0, 0.0], [3e4, 4e4], [3e-4, 4e-4]], dtype=torch.float16)
    np.testing.assert_allclose(numpy64(in_batch_negatives(keys)[0]), [[0, 0], [0.6, 0.8], [0.6, 0.8]], atol=1e-3)


def test_gradient() -> None:
    keys = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: in_batch_negatives(x)[0], keys)
    with torch.no_grad():
        assert not in_batch_negatives(keys)[0].requires_grad


def test_one_graph_and_autocast_change_nothing() -> None:
    keys = torch.randn(5, 16, requires_grad=True)
    compiled = torch.compile(in_batch_negatives, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        inside = in_batch_negatives(keys)
    for same, seen, wish in zip(inside, compiled(keys), in_batch_negatives(keys), strict=True):
        assert torch.equal(same, wish)
        torch.testing.assert_close(seen, wish)
