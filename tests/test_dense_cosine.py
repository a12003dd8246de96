"""The dense term without negatives, against numpy in float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close
from torch import Tensor

from densecl_ops import Correspondence
from densecl_ops.functional import dense_cosine, gather_matches

B, D, P, P_K = 3, 20, 12, 15


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Correspondence, Tensor]:
    query, key = torch.randn(B, D, 3, 4).to(dtype), torch.randn(B, D, 3, 5).to(dtype)
    index = torch.randint(P_K, (B, P))
    index[:, :3] = 7  # shared
    valid = torch.rand(B, P) > 0.3
    return query, key, Correspondence(index, torch.zeros(B, P), valid), torch.rand(B, P).to(torch.float64)


def expected(
    query: Tensor, key: Tensor, match: Correspondence, weight: Tensor, reduction: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loss and its gradients to query and key, position by position."""
    q, k = (x.detach().double().flatten(2).numpy() for x in (query, key))
    (q_hat, q_inverse), (k_hat, k_inverse) = oracle.unit(q, 1), oracle.unit(k, 1)
    rows = np.where(match.valid, weight.numpy(), 0.0)
    loss, d_q, d_k = np.zeros((B, P)), np.zeros(q.shape), np.zeros(k.shape)
    divisor = rows.sum() if reduction == "mean" else 1.0
    for b in range(B):
        for i in range(P):
            j = int(match.index[b, i])
            cosine = q_hat[b, :, i] @ k_hat[b, :, j]
            loss[b, i] = rows[b, i] * (2 - 2 * cosine)
            slope = -2 * rows[b, i] / divisor
            d_q[b, :, i] = slope * (k_hat[b, :, j] - cosine * q_hat[b, :, i]) * q_inverse[b, 0, i]
            d_k[b, :, j] += slope * (q_hat[b, :, i] - cosine * k_hat[b, :, j]) * k_inverse[b, 0, j]
    return (loss if reduction == "none" else loss.sum() / divisor), d_q, d_k


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_loss_and_gradients(dtype: torch.dtype, tolerance: float, reduction: str) -> None:
    query, key, match, weight = inputs(dtype)
    query.requires_grad_()
    key = key.to(memory_format=torch.channels_last).requires_grad_()
    loss = dense_cosine(query, key, match, weight=weight, reduction=reduction)
    loss.sum().backward()
    answers = expected(query, key, match, weight, reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = (loss, query.grad.flatten(2), key.grad.flatten(2))
    for got, want, name in zip(found, answers, ("loss", "query", "key"), strict=True):
        assert_close(got.double(), want, max(tolerance, 1e-6 if loss.dtype == torch.float32 else 0), name)


def test_same_position_and_vectors() -> None:
    query, key = torch.randn(2, B, D, 3, 4, dtype=torch.float64)
    every = torch.arange(P).expand(B, P)
    assert_close(dense_cosine(query, key), dense_cosine(query, key, every), 1e-14, "None is position by position")
    byol = 2 - 2 * torch.nn.functional.cosine_similarity(query[:, :, 0, 0], key[:, :, 0, 0])
    assert_close(dense_cosine(query[:, :, 0, 0], key[:, :, 0, 0]), byol.mean(), 1e-14, "BYOL's loss")


def test_left_out_rows() -> None:
    query, key, match, weight = inputs()
    weight = weight * match.valid
    clean = dense_cosine(query, key, match, weight=weight)
    query.flatten(2).transpose(1, 2)[weight == 0] = float("nan")
    assert_close(dense_cosine(query, key, match, weight=weight), clean, 1e-14, "rows of weight 0")
    nothing = match._replace(valid=torch.zeros(B, P, dtype=torch.bool))
    assert dense_cosine(query, key, nothing).item() == 0
    zero = torch.zeros(1, D, 1, dtype=torch.float16, requires_grad=True)
    loss = dense_cosine(zero, torch.randn(1, D, 1).half())
    loss.backward()
    assert loss.item() == 2
    assert not zero.grad.any()


def test_autocast_and_compile() -> None:
    query, key, match, weight = inputs(torch.float32)
    plain = dense_cosine(query, key, match, weight=weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(dense_cosine(query, key, match, weight=weight), plain.double(), 1e-6, "autocast")
    compiled = torch.compile(dense_cosine, fullgraph=True, backend="aot_eager")
    assert_close(compiled(query, key, match, weight=weight), plain.double(), 1e-6, "compiled")


def test_gather_matches() -> None:
    _, key, match, _ = inputs()
    key.requires_grad_()
    found = gather_matches(key, match)
    for b in range(B):
        assert torch.equal(found[b], key.flatten(2)[b][:, match.index[b]])
    upstream = torch.randn_like(found)
    found.backward(upstream)
    want = np.zeros((B, D, P_K))
    for b in range(B):
        for i in range(P):
            want[b, :, match.index[b, i]] += upstream[b, :, i].numpy()
    assert_close(key.grad.flatten(2), want, 1e-14, "shared keys add up")


@pytest.mark.parametrize("function", [lambda q, k, c: dense_cosine(q, k, c), lambda q, k, c: gather_matches(k, c)])
def test_several_matches_per_position_are_refused(function: object) -> None:
    query, key, match, _ = inputs()
    with pytest.raises(ValueError, match=r"correspondence: got shape \(3, 12, 2\), expected \(3, .*\)"):
        function(query, key, match.index[:, :, None].expand(-1, -1, 2))  # type: ignore[operator]
