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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_loss_and_gradients(dtype: torch.dtype, tolerance: float, reduction: str) -> None:
    """The loss by numpy, gradients by finite differences in float64, and those of other dtypes by these."""
    query, key, match, weight = inputs(dtype)
    leaves = [x.detach().requires_grad_() for x in (query, key.to(memory_format=torch.channels_last))]
    exact = [x.detach().double().requires_grad_() for x in (query, key)]

    def call(query: Tensor, key: Tensor) -> Tensor:
        return dense_cosine(query, key, match, weight=weight, reduction=reduction)

    loss = call(*leaves)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    q, k = (oracle.unit(flat64(x), 1)[0] for x in (query, key))
    rows = np.where(match.valid, weight.numpy(), 0.0)
    truth = rows * (2 - 2 * (q * np.take_along_axis(k, match.index[:, None].numpy(), 2)).sum(1))
    assert_close(loss, {"none": truth, "sum": truth.sum(), "mean": truth.sum() / rows.sum()}[reduction], tolerance)
    assert torch.autograd.gradcheck(call, exact, fast_mode=True)
    gradients = (torch.autograd.grad(call(*x).sum(), x) for x in (leaves, exact))
    for seen, wish in zip(*gradients, strict=True):
        assert_close(seen, wish, tolerance)


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
    zero = torch.zeros(1, D, 2, dtype=torch.float16, requires_grad=True)
    loss = dense_cosine(zero, torch.randn(1, D, 2).half())
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
    with torch.inference_mode():  # as a teacher's matching may run
        match = match._replace(index=match.index.clone())
    assert torch.autograd.gradcheck(lambda key: gather_matches(key, match), key, fast_mode=True)  # shared keys add up
