"""densecl_ops.metrics against loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from helpers import flat64
from torch import Tensor

from densecl_ops import Correspondence, DenseCorrespondence, DenseInfoNCELoss
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share


def is_scalar(x: Tensor) -> bool:
    return x.shape == () and x.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2, 5, 100])
@pytest.mark.parametrize("shape", [(3,), (1, 1), (4, 49)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_contrastive_accuracy(top_k: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rank = torch.randint(0, 8, shape, dtype=dtype)
    masks = [None, torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool), torch.rand(shape) < 0.4]
    for valid in masks:
        rows = np.ones(shape, bool) if valid is None else valid.numpy()
        hits = [int(r) < top_k for r, counts in zip(rank.flatten(), rows.flat, strict=True) if counts]
        actual = contrastive_accuracy(rank, top_k, valid)
        assert is_scalar(actual)
        assert actual.item() == pytest.approx(sum(hits) / len(hits) if hits else 0.0, abs=1e-7)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_float32_whatever_the_default(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    features = torch.randn(2, 5, 4)
    torch.set_default_dtype(default)
    try:
        rank, valid = torch.tensor([0, 0, 1]), torch.tensor([True, True, True])
        assert is_scalar(contrastive_accuracy(rank))
        assert contrastive_accuracy(rank, valid=valid).item() == pytest.approx(2 / 3, abs=1e-7)
        assert is_scalar(mutual_share(features, features))
        assert is_scalar(match_score(DenseCorrespondence()(features, features)))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("vectors", [False, True], ids=["map", "vectors"])
def test_accuracy_of_the_losss_own_ranks(vectors: bool) -> None:
    shape = (5, 6) if vectors else (5, 6, 3)
    query, key = torch.randn(2, *shape)
    negatives = torch.nn.functional.normalize(torch.randn(9, 6), dim=1)
    _, rank = DenseInfoNCELoss()(query, key, negatives, return_rank=True)
    truth = oracle.info_nce(flat64(query), flat64(key), negatives.double().numpy())
    for top_k in (1, 3):
        expected = (truth.rank < top_k).mean()
        assert contrastive_accuracy(rank, top_k).item() == pytest.approx(expected, abs=1e-7)


def correspondence(score: Tensor, valid: Tensor) -> Correspondence:
    return Correspondence(torch.zeros(score.shape, dtype=torch.int64), score, valid)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_match_score(share: float) -> None:
    score, valid = 2 * torch.rand(3, 20) - 1, torch.rand(3, 20) < share
    rows = [float(s) for s, counts in zip(score.double().flatten(), valid.flatten(), strict=True) if counts]
    actual = match_score(correspondence(score, valid))
    assert is_scalar(actual)
    assert actual.item() == pytest.approx(sum(rows) / len(rows) if rows else 0.0, abs=1e-6)


def test_match_score_and_nan() -> None:
    score, valid = torch.tensor([[math.nan, 0.5, 0.25]]), torch.tensor([[False, True, True]])
    assert match_score(correspondence(score, valid)).item() == 0.375  # what is not valid does not count
    assert match_score(correspondence(score, ~valid)).isnan()


def nearest(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(B, P_q): for each query position of (B, C, P_q) the most similar of (B, C, P_k)."""
    return np.einsum("bci,bcj->bij", oracle.unit(query, 1)[0], oracle.unit(key, 1)[0]).argmax(2)


@pytest.mark.parametrize(("query_grid", "key_grid"), [((4, 4), (4, 4)), ((3, 5), (2, 4)), ((2, 2), (6, 6))])
def test_mutual_share(query_grid: tuple[int, int], key_grid: tuple[int, int]) -> None:
    query, key = torch.randn(3, 6, *query_grid), torch.randn(3, 6, *key_grid)
    there, back = nearest(flat64(query), flat64(key)), nearest(flat64(key), flat64(query))
    agreed = [back[b, there[b, i]] == i for b in range(3) for i in range(there.shape[1])]
    actual = mutual_share(query, key)
    assert is_scalar(actual)
    assert 0 < np.mean(agreed) < 1
    assert actual.item() == pytest.approx(np.mean(agreed), abs=1e-6)
    assert match_score(DenseCorrespondence()(query, key)).item() == pytest.approx(
        np.einsum("bci,bcj->bij", oracle.unit(flat64(query), 1)[0], oracle.unit(flat64(key), 1)[0]).max(2).mean(),
        abs=1e-6,
    )


def test_mutual_share_pools_to_the_grid() -> None:
    query, key = torch.randn(2, 2, 6, 4, 6)
    pooled = [x.double().reshape(2, 6, 2, 2, 2, 3).mean((3, 5)).flatten(2).numpy() for x in (query, key)]
    there, back = nearest(*pooled), nearest(*pooled[::-1])
    agreed = np.mean([[back[b, there[b, i]] == i for i in range(4)] for b in range(2)])
    assert mutual_share(query, key, grid_size=2, backend="eager").item() == pytest.approx(agreed, abs=1e-6)
    assert mutual_share(query, key, 2) != mutual_share(query, key)


def test_collapsed_features_share_one_key() -> None:
    features = torch.ones(2, 6, 5, 5) + 1e-3 * torch.randn(2, 6, 1, 1)
    assert mutual_share(features, features).item() == pytest.approx(1 / 25)
    assert match_score(DenseCorrespondence()(features, features)).item() == pytest.approx(1)


def test_compiles_without_a_graph_break() -> None:
    def log(rank: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        match = DenseCorrespondence(min_score=0.1)(query, key)
        return contrastive_accuracy(rank, 2, match.valid), match_score(match), mutual_share(query, key)

    arguments = torch.randint(0, 4, (2, 12)), torch.randn(2, 5, 3, 4), torch.randn(2, 5, 4, 4)
    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(log, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), log(*arguments), strict=True):
        assert is_scalar(actual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_no_gradient_and_no_look_at_the_values() -> None:
    """Meta tensors have no values: what looks at one raises."""
    rank = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    score = torch.zeros(2, 9, device="meta")
    assert contrastive_accuracy(rank, 5, score > 0).device.type == "meta"
    assert match_score(Correspondence(rank, score, score > 0)).device.type == "meta"
    features = torch.randn(2, 5, 9, requires_grad=True)
    assert not mutual_share(features, features).requires_grad
