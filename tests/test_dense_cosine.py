"""The dense term without negatives, against numpy in float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, flat64
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


def at_keys(per_position: np.ndarray, index: Tensor) -> np.ndarray:
    """(B, D, P) summed into the (B, D, P_K) that the index points at."""
    return np.einsum("bdi,bij->bdj", per_position, np.eye(P_K)[index])


def expected(
    query: Tensor, key: Tensor, match: Correspondence, weight: Tensor, reduction: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loss and its gradients to query and key."""
    (q, q_inverse), (k, k_inverse) = (oracle.unit(flat64(x), 1) for x in (query, key))
    k, k_inverse = (np.take_along_axis(x, match.index[:, None].numpy(), 2) for x in (k, k_inverse))
    cosine = (q * k).sum(1)
    rows = np.where(match.valid, weight.numpy(), 0.0)
    loss, divisor = rows * (2 - 2 * cosine), rows.sum() if reduction == "mean" else 1.0
    slope, cosine = (-2 * rows / divisor)[:, None], cosine[:, None]
    d_q, d_k = slope * (k - cosine * q) * q_inverse, slope * (q - cosine * k) * k_inverse
    return (loss if reduction == "none" else loss.sum() / divisor), d_q, at_keys(d_k, match.index)


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
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for found, wish in zip((loss, query.grad, key.grad), expected(query, key, match, weight, reduction), strict=True):
        assert_close(found, wish, tolerance)


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
    found = gather_matches(key.requires_grad_(), match)
    for b in range(B):
        assert torch.equal(found[b], key.flatten(2)[b][:, match.index[b]])
    upstream = torch.randn_like(found)
    found.backward(upstream)
    assert_close(key.grad, at_keys(upstream.numpy(), match.index), 1e-14, "shared keys add up")
