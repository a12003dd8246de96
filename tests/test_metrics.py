"""densecl_ops.metrics against loops in float64."""

import math

import numpy as np
import oracle
import pytest
import torch
from helpers import flat64
from torch import Tensor

from densecl_ops import Correspondence, DenseCorrespondence
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share


def assert_scalar(actual: Tensor, expected: float) -> None:
    assert (actual.shape, actual.dtype, actual.requires_grad) == ((), torch.float32, False)
    assert actual.item() == pytest.approx(expected, abs=1e-6)


def mean(values: Tensor, valid: Tensor | None) -> float:
    rows = values[... if valid is None else valid].double().flatten().tolist()
    return math.fsum(rows) / max(len(rows), 1)


@pytest.mark.parametrize("shape", [(3,), (1, 1), (4, 49)])
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
def test_means_of_valid_rows(shape: tuple[int, ...], share: float | None) -> None:
    valid = None if share is None else torch.rand(shape) < share
    for dtype in (torch.int64, torch.int32, torch.uint8):
        rank = torch.randint(0, 8, shape, dtype=dtype)
        for top_k in (1, 5, 100):
            assert_scalar(contrastive_accuracy(rank, top_k, valid), mean(rank < top_k, valid))
    if valid is not None and len(shape) == 2:
        score = (2 * torch.rand(shape) - 1).masked_fill(~valid, math.nan)  # what is not valid does not count
        assert_scalar(match_score(Correspondence(rank, score, valid)), mean(score, valid))
        assert match_score(Correspondence(rank, score, ~valid)).isnan() == (not valid.all())


@pytest.mark.parametrize(
    ("query_grid", "key_grid", "grid_size"),
    [((4, 4), (4, 4), None), ((3, 5), (2, 4), None), ((2, 2), (6, 6), None), ((6, 8), (6, 8), (3, 4))],
)
def test_features(query_grid: tuple[int, int], key_grid: tuple[int, int], grid_size: tuple[int, int] | None) -> None:
    """In one graph, too. Pooled, 2 x 2 positions become one."""
    maps = torch.randn(3, 6, *query_grid, requires_grad=True), torch.randn(3, 6, *key_grid)
    pooled = maps if grid_size is None else [x.reshape(3, 6, 3, 2, 4, 2).mean((3, 5)) for x in maps]
    query, key = (oracle.unit(flat64(x), 1)[0] for x in pooled)
    similarity = np.einsum("bci,bcj->bij", query, key)
    there, back = similarity.argmax(2), similarity.argmax(1)
    agreed = np.mean([[back[b, there[b, i]] == i for i in range(there.shape[1])] for b in range(3)])
    assert 0 < agreed < 1

    def log(*maps: Tensor) -> tuple[Tensor, ...]:
        match = DenseCorrespondence(grid_size)(*maps)
        return mutual_share(*maps, grid_size), match_score(match), contrastive_accuracy(match.index, 3, match.valid)

    for function in (log, torch.compile(log, fullgraph=True, backend="eager")):
        for seen, wish in zip(function(*maps), (agreed, similarity.max(2).mean(), np.mean(there < 3)), strict=True):
            assert_scalar(seen, wish)
