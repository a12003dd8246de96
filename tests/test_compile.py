"""torch.compile(fullgraph=True) against eager mode, and the registered operators against torch's own checks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import helpers
import pytest
import torch
from helpers import assert_close
from test_step import Step, views
from torch import Tensor

from densecl_ops import Correspondence, DenseInfoNCELoss, MomentumQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def compiled(function: Callable[..., Any], compiler: str = "aot_eager", dynamic: bool | None = False) -> Any:
    """One graph, forward and backward; "aot_eager" traces all of it and spares the slow code generation."""
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)


def no_recompile(first_call: bool) -> AbstractContextManager[Any]:
    return nullcontext() if first_call else torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.parametrize(("compiler", "init"), [("inductor", "random"), ("aot_eager", "empty")])
def test_whole_step(fused: str, compiler: str, init: str) -> None:
    """Heads, matching, both losses, rank, backward and enqueue: four steps as in eager mode, and one graph."""
    plain = Step(fused, torch.float32, init)
    other = copy.deepcopy(plain)
    fast = compiled(other, compiler)
    for step in range(4):  # 16 keys into 13 rows: wraps once
        features, results = helpers.to_device(fused, *views(4, torch.float32)), []
        for model, call in ((plain, plain), (other, fast)):
            model.head.zero_grad()
            with no_recompile(step == 0):
                *losses, rank = call(*features)
            sum(losses).backward()
            results.append((losses, rank, [p.grad for p in model.head.parameters()], model.state_dict()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])  # the last by autocast
def test_everything_learns(backend: str, dtype: torch.dtype) -> None:
    """Every gradient, exclude, validity and rank through one graph, which an optimiser's step leaves as it is."""
    device, autocast = helpers.DEVICES.get(backend, "cpu"), dtype == torch.bfloat16
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    exclude, valid = helpers.to_device(backend, torch.tensor([1, 2, 3]), torch.rand(3, 6) < 0.7)
    case = helpers.make_case(0).to(torch.float32 if autocast else dtype)
    criterion = DenseInfoNCELoss(0.3, learnable_temperature=True, backend=backend).to(device, case.query.dtype)
    tensors = helpers.to_device(backend, case.query, case.key, case.negatives, torch.full((3, 6), 0.4))
    leaves = [x.clone().requires_grad_() for x in tensors]

    def loss(query: Tensor, key: Tensor, negatives: Tensor, weight: Tensor) -> Any:
        match = dense_correspondence(query, key, mutual=True, backend=backend)
        match = Correspondence(match.index, match.score, match.valid | valid)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return criterion(query, key, negatives, match, weight=weight, exclude=exclude, return_rank=True)

    fast, optimizer = compiled(loss), torch.optim.SGD([*leaves, criterion.logit_scale], lr=0.01)
    for step in range(3):
        results = []
        for function in (loss, fast):
            optimizer.zero_grad()
            with no_recompile(step == 0):
                value, rank = function(*leaves)
            value.backward()
            results.append([value, rank, *(x.grad.clone() for x in (*leaves, criterion.logit_scale))])
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(loss(*leaves), compiled(loss)(*leaves), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dynamic", [True, None])
def test_batches_and_temperatures_that_change(fused: str, dynamic: bool | None) -> None:
    queue = helpers.to_device(fused, MomentumQueue(11, 6, dtype=torch.float64))[0]
    fast = compiled(lambda *args, t: dense_info_nce(*args, temperature=t, backend=fused), dynamic=dynamic)
    for batch, temperature in ((2, 0.2), (3, 0.2), (3, 0.15), (5, 0.1), (5, 0.05)):
        case = helpers.make_case(5, batch=batch, temperature=temperature)
        case.negatives = queue.rows
        query, key, index = helpers.to_device(fused, case.query, case.key, case.index)
        loss = fast(query.requires_grad_(), key, queue, index, t=temperature)
        loss.backward()
        truth = helpers.expected(case)
        assert_close(loss, truth.loss, 1e-10)
        assert_close(query.grad, truth.query, 1e-9)


CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
OPS = torch.ops.densecl_ops
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("mutual", [False, True])
def test_opcheck_match(fused: str, dtype: torch.dtype, mutual: bool) -> None:
    query, key = torch.randn(2, 4, 6).to(dtype), torch.randn(2, 6, 4).to(dtype).transpose(1, 2)
    query, key = helpers.to_device(fused, query, key)
    torch.library.opcheck(OPS.match, (query, key, mutual, fused), test_utils=CHECKS)


@DTYPES
@pytest.mark.parametrize("plain", [True, False])
def test_opcheck_loss(fused: str, dtype: torch.dtype, plain: bool) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, key = torch.randn(2, 4, 6).to(dtype), torch.randn(2, 6, 4).to(dtype).transpose(1, 2)
    options = (5.0, None, None, None, None)
    if not plain:  # with a learned scale, matches, exclude and count
        options = None, torch.tensor(5.0, dtype=wide), torch.randint(6, (2, 6)), torch.tensor([0, 8]), torch.tensor(7)
    tensors = helpers.to_device(fused, query, key, torch.randn(9, 4).to(dtype), *options)
    arguments = (*tensors, False, wide, dtype)
    for want_grad in (False, True):
        for want_rank in (False, True):
            torch.library.opcheck(OPS.info_nce, (*arguments, want_grad, want_rank, fused), test_utils=CHECKS)
    rows = torch.rand(2, 6, dtype=wide, device=tensors[0].device)
    torch.library.opcheck(OPS.info_nce_grad_negatives, (*arguments, rows, rows, fused), test_utils=CHECKS)
    torch.library.opcheck(OPS.info_nce_grad_key, (*arguments, rows, fused), test_utils=CHECKS)


@pytest.mark.parametrize("rows", ["zero", "large", "equal"])
def test_float16(fused: str, rows: str) -> None:
    """Where compiled float16 models are known to answer otherwise: normalised zeros, logits that are all equal."""
    query, key = torch.randn(2, 3, 16, 4, dtype=torch.float16)
    negatives = torch.nn.functional.normalize(torch.randn(4096, 16), dim=1).half()
    if rows == "zero":
        query[0], key[1] = 0, 0
    elif rows == "large":
        query, key = (60_000 * x.sign() for x in (query, key))
    else:
        query, key, negatives = (torch.full_like(x, 0.25) for x in (query, key, negatives))
    results = []
    for function in (dense_info_nce, compiled(dense_info_nce, "inductor")):
        leaf, *others = helpers.to_device(fused, query.clone(), key, negatives)
        loss, rank = function(leaf.requires_grad_(), *others, return_rank=True, backend=fused)
        loss.backward()
        results.append((loss, rank.double(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert_close(b, a, 1e-3)  # hence finite
