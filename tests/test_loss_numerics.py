"""The loss at extreme scales, with zero, NaN and infinity, in low precision and under autocast."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import assert_close, check, error, loss_cases, make_case

from densecl_ops import DenseInfoNCELoss
from densecl_ops.info_nce import at_once, blockwise
from densecl_ops.info_nce.problem import Problem

LOW = (torch.float16, torch.bfloat16)

# ---- extremes of size and scale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("rank", [False, True])
def test_temperatures(backend: str, temperature: float, rank: bool) -> None:
    case = make_case(0, negatives=1500, temperature=temperature)
    check(backend, case, rank=rank)
    check(backend, case.to(torch.float32), 1e-4 if temperature < 0.01 else 2e-5, helpers.GRADIENTS[:3], rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("wanted", [("query",), ("query", "key", "negatives")])
def test_negatives_that_overflow_exp(backend: str, dtype: torch.dtype, rank: bool, wanted: tuple[str, ...]) -> None:
    """Norms from 0.01 to 1e3 at t = 0.1: logits up to 1e4, the largest in the last tile or in the first."""
    for order in (1, -1):
        case = make_case(1, channels=16, negatives=2500, temperature=0.1)
        case.negatives *= torch.logspace(-2, 3, 2500, dtype=torch.float64)[:, None]
        if order < 0:
            case.negatives = case.negatives.flip(0)
        check(backend, case.to(dtype), 1e-9 if dtype == torch.float64 else 1e-5, wanted, rank)


def test_all_logits_below_underflow(backend: str) -> None:
    """Every negative at s = -1e3, the positive too: exp() of each is 0, their ratio is not."""
    query = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    negatives = torch.tensor([[-100.0, 0.0], [-101.0, 0.5], [-100.0, 1.0]], dtype=torch.float64)
    check(backend, helpers.Case(query, -query, negatives, temperature=0.1))
    check(backend, helpers.Case(query, -query, negatives, temperature=0.1), rank=False)
    seen = helpers.run(backend, helpers.Case(query.float(), -query.float(), negatives.float(), temperature=0.1))
    assert torch.isfinite(seen.loss)
    assert torch.isfinite(seen.query).all()


@pytest.mark.parametrize("rank", [False, True])
def test_tiny_loss_keeps_its_relative_precision(fused: str, rank: bool) -> None:
    """Positive at s+ = 1/t, negatives orthogonal or opposed: losses down to 1e-35, where log(1 + x) - 0 gives 0."""
    query = torch.eye(4)[:3]
    negatives = torch.tensor([[0.0, 0, 0, 1], [0, 0, -1, 0], [0, 0.5, 0, 0]])
    for temperature in (0.2, 0.05, 0.0125):
        case = helpers.Case(query, query, negatives, temperature=temperature, reduction="none")
        truth, seen = helpers.expected(case), helpers.run(fused, case, ("query",), rank)
        assert truth.loss.max() < 0.2
        np.testing.assert_allclose(seen.loss.cpu().numpy(), truth.loss, rtol=2e-5)
        assert_close(seen.query, truth.query, 2e-5)


# ---- zero, NaN, infinity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("rank", [False, True])
def test_zero_vectors(backend: str, dtype: torch.dtype, tolerance: float, rank: bool) -> None:
    case = loss_cases(torch.float64)["zero vectors"].to(dtype)
    seen, truth = helpers.run(backend, case, rank=rank), helpers.expected(case)
    for name in ("loss", "query", "key", "negatives"):
        assert_close(getattr(seen, name), getattr(truth, name), tolerance, name)
    assert not seen.query[0, :, 0, 0].any()
    assert not seen.key[1, :, 0, 0].any()


def test_everything_zero(backend: str) -> None:
    case = make_case(10)
    case.query.zero_(), case.key.zero_(), case.negatives.zero_()
    seen = helpers.run(backend, case)
    assert float(seen.loss) == pytest.approx(np.log(18), rel=1e-12)
    assert (seen.query == 0).all()
    assert (seen.rank == 17 // 2).all()  # all equal


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("rank", [False, True])
def test_nan_and_inf_reach_exactly_their_rows(backend: str, bad: float, where: str, rank: bool) -> None:
    case = replace(make_case(11, key_grid=(2, 3), reduction="none"), index=None)
    getattr(case, where)[1, 2, 0, 1] = bad
    for wanted in ((), ("query", "key", "negatives")):
        loss = helpers.run(backend, case, wanted, rank).loss
        clean = torch.ones(3, 6, dtype=torch.bool)
        clean[1, 1] = False
        assert loss[1, 1].isnan()
        assert torch.isfinite(loss[clean]).all()
    assert helpers.run(backend, replace(case, reduction="mean"), rank=rank).loss.isnan()


@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("size", [17, 1500])
def test_nan_negative_gives_nan(backend: str, rank: bool, size: int) -> None:
    for wanted in ((), ("query",), ("query", "negatives")):
        for row in (0, size - 1):
            case = make_case(12, negatives=size)
            case.negatives[row, 0] = float("nan")
            assert helpers.run(backend, case, wanted, rank).loss.isnan()
            assert helpers.run(backend, case.to(torch.float32), wanted, rank).loss.isnan()


@pytest.mark.parametrize("how", ["weight", "valid", "index"])
@pytest.mark.parametrize("wanted", [("query",), ("query", "key"), ("query", "negatives"), ("temperature",)])
def test_nan_in_a_left_out_row(backend: str, how: str, wanted: tuple[str, ...]) -> None:
    """Loss and gradients are those of the rows that count; the eager backend promises that of the loss alone."""
    case = make_case(13)
    used = torch.ones(3, 6)
    used[0, 2] = used[2, 5] = 0
    if how == "index":  # a key that no row uses
        truth = helpers.expected(replace(case, index=case.index.clamp(min=1)))
        case = replace(case, index=case.index.clamp(min=1), key=case.key.clone())
        case.key[:, :, 0, 0] = math.nan
    else:
        case = replace(case, weight=used) if how == "weight" else replace(case, valid=used > 0)
        truth, case.query = helpers.expected(case), case.query.clone()
        case.query[0, :, 0, 2] = math.nan
        case.query[2, 3, 1, 2] = math.inf
    seen = helpers.run(backend, case, wanted)
    assert_close(seen.loss, truth.loss, 1e-10, "loss")
    for name in wanted if backend in helpers.FUSED or how == "index" else ():
        if (how, name) != ("index", "key"):
            assert_close(getattr(seen, name), getattr(truth, name), 1e-9, name)


# ---- low precision and autocast -------------------------------------------------------------------------------------


def row_errors(backend: str, case: helpers.Case, autocast: torch.dtype | None = None) -> dict[str, float]:
    """Relative error norms, of whole vectors and tensors, against the oracle on the same rounded inputs."""
    device = helpers.DEVICES.get(backend, "cpu")
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        seen = helpers.run(backend, case, ("query", "key", "negatives"))
    assert seen.loss.dtype == torch.float32
    truth = helpers.expected(case)
    for name in ("query", "key", "negatives"):
        assert getattr(seen, name).dtype == getattr(case, name).dtype
    return {name: error(getattr(seen, name), getattr(truth, name)) for name in ("loss", "query", "key", "negatives")}


def assert_no_worse_than_eager(fused: str, case: helpers.Case, autocast: torch.dtype | None = None) -> None:
    eager, ours = row_errors("eager", case, autocast), row_errors(fused, case, autocast)
    for name, off in ours.items():
        assert off <= 2 * eager[name] + 1e-5, (name, off, eager[name])
        assert off < 0.1


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("negatives", [100, 2500])
def test_low_precision(fused: str, dtype: torch.dtype, temperature: float, negatives: int) -> None:
    for seed in range(3):
        case = make_case(seed, channels=64, negatives=negatives, temperature=temperature, reduction="none")
        assert_no_worse_than_eager(fused, case.to(dtype))


@pytest.mark.parametrize("query", [torch.float32, *LOW])
@pytest.mark.parametrize("key", [torch.float32, *LOW])
@pytest.mark.parametrize("negatives", [torch.float32, *LOW])
def test_mixtures(fused: str, query: torch.dtype, key: torch.dtype, negatives: torch.dtype) -> None:
    """Products run in the wider dtype of query and negatives: float32 unless both have the same narrow one."""
    case = make_case(15, channels=64, negatives=300, reduction="none")
    mixed = replace(case, query=case.query.to(query), key=case.key.to(key), negatives=case.negatives.to(negatives))
    assert_no_worse_than_eager(fused, mixed)
    if torch.promote_types(query, negatives) == torch.float32:
        assert row_errors(fused, mixed)["loss"] < 1e-6


@pytest.mark.parametrize("wide", ["query", "key", "negatives"])
@pytest.mark.parametrize("narrow", [torch.float32, *LOW])
def test_any_float64_makes_the_loss_float64(backend: str, wide: str, narrow: torch.dtype) -> None:
    case = make_case(16).to(narrow)
    case = replace(case, **{wide: getattr(case, wide).double()})
    seen = helpers.run(backend, case, ("query", "key", "negatives"))
    truth = helpers.expected(case)
    assert seen.loss.dtype == torch.float64
    assert_close(seen.loss, truth.loss, 1e-12)
    assert_close(getattr(seen, wide), getattr(truth, wide), 1e-9)


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("negatives", [100, 2500])
def test_autocast(fused: str, autocast: torch.dtype, dtype: torch.dtype, negatives: int) -> None:
    case = make_case(17, channels=64, negatives=negatives, reduction="none").to(dtype)
    assert_no_worse_than_eager(fused, case, autocast)


@pytest.mark.parametrize("autocast", LOW)
def test_autocast_rounds_only_the_products_with_negatives(backend: str, autocast: torch.dtype) -> None:
    """The loss is off by their rounding, no more and no less; with tiny ones only the exact positive decides it."""
    case = make_case(18, channels=64, negatives=300, reduction="none")
    tiny = replace(case, negatives=1e-4 * case.negatives[:3], temperature=1.0)
    for wide, dtype, low, high in (
        (case, torch.float32, 1e-6, 1e-3),
        (tiny, torch.float32, 0, 1e-6),
        (tiny, torch.float64, 0, 1e-12),
    ):
        with torch.autocast(helpers.DEVICES.get(backend, "cpu"), autocast):
            loss = helpers.run(backend, wide.to(dtype)).loss
        assert loss.dtype == dtype
        assert low <= error(loss, helpers.expected(wide.to(dtype)).loss) < high


def test_backward_under_autocast(backend: str) -> None:
    """backward() inside the autocast region gives what it gives outside."""
    case = make_case(19).to(torch.float32)
    grads = []
    for inside in (True, False):
        leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.negatives)]
        with torch.autocast(helpers.DEVICES.get(backend, "cpu"), torch.bfloat16):
            loss = helpers.info_nce(backend, *leaves, case.index)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-6 if backend in helpers.FUSED else 1e-2)


@pytest.mark.parametrize("form", ["tiles", "tiles, oneDNN", "flash", "at once"])
@pytest.mark.parametrize(("negatives", "count"), [(70, None), (70, 37), (70, 0), (16, None), (5000, 4300)])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_every_form(
    monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype, negatives: int, count: int | None
) -> None:
    """Any processor can do what another one is given: products in float32, or in bfloat16 where the input is."""
    for product in {torch.float32, dtype} - {torch.float16}:
        if (form == "tiles, oneDNN" and product != torch.float32) or (form == "at once" and dtype != torch.float32):
            continue
        monkeypatch.setattr(blockwise, "_choose", lambda *_, product=product: (form, product))
        monkeypatch.setattr(at_once, "serves", lambda *_: form == "at once")
        case = make_case(21, channels=32, negatives=negatives, count=count).to(dtype)
        truth = helpers.expected(case)
        seen, usual = (helpers.run(backend, case, rank=False) for backend in ("blockwise", "eager"))
        without = helpers.run("blockwise", case, wanted=(), rank=False)
        assert_close(without.loss, seen.loss, 1e-6)
        for name in ("loss", "query", "key", "negatives"):
            wish, tolerance = getattr(truth, name), 2 * helpers.error(getattr(usual, name), getattr(truth, name))
            floor = 1e-5 if dtype == torch.float32 else 1e-3
            assert_close(getattr(seen, name), wish, tolerance + floor, name)


@pytest.mark.parametrize(
    ("capabilities", "dtype", "options", "form", "product"),
    [
        ({"cpu_name": "Intel"}, torch.float32, {}, "flash", torch.float32),
        ({"cpu_name": "Intel"}, torch.float32, {"rank": True}, "tiles", torch.float32),
        ({"cpu_name": "Intel"}, torch.float32, {"grad": False}, "tiles", torch.float32),
        ({"cpu_name": "Intel"}, torch.bfloat16, {}, "flash", torch.float32),
        ({"cpu_name": "Intel"}, torch.float16, {}, "flash", torch.float32),
        ({"cpu_name": "Intel"}, torch.float64, {}, "flash", torch.float64),
        ({"cpu_name": "Intel", "avx512_bf16": True}, torch.bfloat16, {}, "tiles", torch.bfloat16),
        ({"cpu_name": "Intel", "amx_bf16": True}, torch.bfloat16, {}, "flash", torch.bfloat16),
        ({"cpu_name": "Intel", "amx_bf16": True}, torch.bfloat16, {"exclude": True}, "tiles", torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, torch.float32, {}, "tiles, oneDNN", torch.float32),
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, torch.bfloat16, {"rank": True}, "tiles, oneDNN", torch.float32),
        ({}, torch.float32, {}, "flash", torch.float32),
    ],
)
def test_choice_of_the_form(
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, Any],
    dtype: torch.dtype,
    options: dict[str, bool],
    form: str,
    product: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(blockwise, "processor", blockwise.processor.__wrapped__)
    exclude = torch.zeros(3, dtype=torch.int64) if options.get("exclude") else None
    case, exact = make_case(0, negatives=4096).to(dtype), torch.promote_types(dtype, torch.float32)
    maps = case.query.flatten(2), case.key.flatten(2)
    problem = Problem(*maps, case.negatives, 5.0, None, case.index, exclude, None, True, exact, dtype)
    chosen = blockwise._choose(problem, options.get("grad", True), options.get("rank", False))
    assert chosen == (form, product)


def test_equal_logits_give_log_1_plus_k() -> None:
    """What docs/training.md says of zero features and of features whose squares overflow."""
    negatives = torch.nn.functional.normalize(torch.randn(37, 6), dim=1)
    criterion, key = DenseInfoNCELoss(), torch.randn(2, 6, 4)
    assert criterion(torch.zeros(2, 6, 4), key, negatives).item() == pytest.approx(math.log(38), rel=1e-6)
    for value in (math.nan, math.inf, 1e30):
        assert criterion(torch.full((2, 6, 4), value), key, negatives).isnan()
