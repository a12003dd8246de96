"""The loss at extreme scales, with zero, NaN and infinity, in low precision and under autocast."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import GRADIENTS, assert_close, check, error, expected, make_case, run

from densecl_ops import _processor
from densecl_ops._processor import Processor
from densecl_ops.info_nce import at_once, blockwise
from densecl_ops.info_nce.eager import Problem

LOW = (torch.float16, torch.bfloat16)


def extremes() -> dict[str, tuple[helpers.Case, float]]:
    """With the tolerance in float32."""
    cases = {
        f"t = {t}": (make_case(0, negatives=1500, temperature=t), 1e-4 if t < 0.01 else 2e-5)
        for t in (1e-3, 0.01, 0.02, 1.0, 100.0)
    }
    # Norms from 0.01 to 1e3: logits up to 1e4, off by 6e-4, the largest in the last tile, in the first, in any.
    long = make_case(1, channels=16, negatives=4500, temperature=0.1, exclude=torch.tensor([0, 1024, 4499]))
    lengths = torch.logspace(-2, 3, 4500, dtype=torch.float64)[:, None]
    for name, order in (("last", lengths), ("first", lengths.flip(0)), ("any", lengths[torch.randperm(4500)])):
        cases[f"longest {name}"] = replace(long, negatives=long.negatives * order), 2e-4
    for count in (4400, 1025, 1024, 1):
        cases[f"longest any, {count} of them"] = replace(cases["longest any"][0], count=count), 2e-4
    # Every negative at s = -1e3, the positive too: exp() of each is 0, their ratio is not.
    query = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    negatives = torch.tensor([[-100.0, 0.0], [-101.0, 0.5], [-100.0, 1.0]], dtype=torch.float64)
    cases["underflow"] = helpers.Case(query, -query, negatives, temperature=0.1), 1e-4
    # All at s = -200, and one at -120: exp() of each is 0.
    query = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    cases["all opposite"] = helpers.Case(query, -query, -query, temperature=0.005), 1e-4
    few = make_case(2, channels=16, negatives=64)
    few.negatives[0] = -1e5  # at s = -1e6
    cases["one far below"] = replace(few, query=few.query.abs()), 1e-5
    low = make_case(12, channels=8, negatives=2000, temperature=0.1)
    low.query[:, 0], low.negatives[:, 0] = 5, low.negatives[:, 0] - 12  # at s = -110, more than a call at once
    cases["all far below"] = low, 1e-4
    across = make_case(13, channels=16, negatives=2500)
    across.query[:, 8:] = 0
    across.negatives[:, :8] *= 15  # logits up to 62, of rows whose shares alone are too long for float32
    across.negatives[:, 8:] *= 1e20
    cases["long and across"] = across, 2e-5
    zero = make_case(10)
    cases["all zero"] = replace(zero, query=0 * zero.query, key=0 * zero.key, negatives=0 * zero.negatives), 1e-6
    return cases


EXTREMES = extremes()


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("rank", [False, True])
def test_extremes(backend: str, name: str, rank: bool) -> None:
    case, tolerance = EXTREMES[name]
    for wanted in ((), ("query",), GRADIENTS[:4]):
        check(backend, case, wanted=wanted, rank=rank)
        check(backend, case.to(torch.float32), tolerance, wanted[:3], rank)


@pytest.mark.parametrize("rank", [False, True])
def test_tiny_loss_keeps_its_relative_precision(fused: str, rank: bool) -> None:
    """Positive at s+ = 1/t, negatives orthogonal or opposed: losses down to 1e-35, where log(1 + x) - 0 gives 0."""
    query = torch.eye(4)[:3]
    negatives = torch.tensor([[0.0, 0, 0, 1], [0, 0, -1, 0], [0, 0.5, 0, 0]])
    for temperature in (0.2, 0.05, 0.0125):
        case = helpers.Case(query, query, negatives, temperature=temperature, reduction="none")
        truth, seen = expected(case), run(fused, case, ("query",), rank)
        assert truth.loss.max() < 0.2
        np.testing.assert_allclose(seen.loss.cpu().numpy(), truth.loss, rtol=2e-5)
        assert_close(seen.query, truth.query, 2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("rank", [False, True])
def test_nan_and_inf_reach_exactly_their_rows(backend: str, bad: float, where: str, rank: bool) -> None:
    case = replace(make_case(11, key_grid=(2, 3), reduction="none", dtype=torch.float32), index=None)
    getattr(case, where)[1, 2, 0, 1] = bad
    for wanted in ((), ("query", "key", "negatives")):
        seen = run(backend, case, wanted, rank)
        assert (~seen.loss.isfinite()).nonzero().tolist() == [[1, 1]]
        assert seen.loss[1, 1].isnan()
        for name in wanted[:2]:
            assert torch.equal(getattr(seen, name).isnan().flatten(2).any(1), seen.loss.isnan()), name
        assert seen.negatives is None or seen.negatives.isnan().any()
    assert run(backend, replace(case, reduction="mean"), rank=rank).loss.isnan()


@pytest.mark.parametrize("how", ["weight", "valid", "index"])
@pytest.mark.parametrize("wanted", [("query",), ("query", "key"), ("query", "negatives"), ("temperature",)])
def test_nan_in_a_left_out_row(backend: str, how: str, wanted: tuple[str, ...]) -> None:
    """Loss and gradients are those of the rows that count; the eager backend promises that of the loss alone."""
    case = make_case(13, dtype=torch.float32)
    used = torch.ones(3, 6)
    used[0, 2] = used[2, 5] = 0
    if how == "index":  # a key that no row uses
        truth = expected(replace(case, index=case.index.clamp(min=1)))
        case = replace(case, index=case.index.clamp(min=1), key=case.key.clone())
        case.key[:, :, 0, 0] = math.nan
    else:
        case = replace(case, weight=used) if how == "weight" else replace(case, valid=used > 0)
        truth, case.query = expected(case), case.query.clone()
        case.query[0, :, 0, 2] = math.nan
        case.query[2, 3, 1, 2] = math.inf
    seen = run(backend, case, wanted)
    assert_close(seen.loss, truth.loss, 2e-6, "loss")
    for name in wanted if backend != "eager" or how == "index" else ():
        if (how, name) != ("index", "key"):
            assert_close(getattr(seen, name), getattr(truth, name), 5e-6, name)


MIXTURES = [(*dtypes, None) for dtypes in itertools.product([torch.float32, *LOW], repeat=3)]
MIXTURES += [(dtype, dtype, dtype, cast) for dtype in (torch.float32, torch.float16) for cast in LOW]
for narrow in (torch.float32, *LOW):  # any float64 makes the loss float64
    MIXTURES += [(*(torch.float64 if i == wide else narrow for i in range(3)), None) for wide in range(3)]


@pytest.mark.parametrize(("query", "key", "negatives", "autocast"), MIXTURES)
def test_low_precision(
    fused: str, query: torch.dtype, key: torch.dtype, negatives: torch.dtype, autocast: torch.dtype | None
) -> None:
    """Products run in the wider dtype of query and negatives: float32 unless both have the same narrow one."""
    dtypes = {"loss": torch.float64 if torch.float64 in (query, key, negatives) else torch.float32}
    dtypes |= {"query": query, "key": key, "negatives": negatives}
    for temperature, size in ((0.005, 300), (0.02, 100), (0.2, 2500), (1.0, 300)):
        case = make_case(15, channels=64, negatives=size, temperature=temperature, reduction="none")
        case = replace(case, query=case.query.to(query), key=case.key.to(key), negatives=case.negatives.to(negatives))
        case.autocast = autocast
        eager, ours = (run(backend, case, ("query", "key", "negatives"), rank=False) for backend in ("eager", fused))
        truth = expected(case)
        for name, dtype in dtypes.items():
            off, usual = (error(getattr(seen, name), getattr(truth, name)) for seen in (ours, eager))
            assert getattr(ours, name).dtype == getattr(eager, name).dtype == dtype
            assert off <= 2 * usual + (1e-12 if dtype == torch.float64 else 1e-5), (name, off, usual)
            assert usual < (1e-9 if dtype == torch.float64 else 0.1), name
            if name == "loss" and autocast is None and torch.promote_types(query, negatives) == torch.float32:
                assert off < 2e-7 / temperature


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_to_negatives_of_huge_logits(fused: str, dtype: torch.dtype) -> None:
    """Up to 1e10, which rounding moves by hundreds: a probability is still at most 1."""
    case = make_case(20, 8, channels=64, negatives=300, temperature=1e-10).to(dtype)
    assert error(run(fused, case, rank=False).negatives, expected(case).negatives) < 0.5


@pytest.mark.parametrize("autocast", LOW)
def test_autocast_rounds_only_the_products_with_negatives(backend: str, autocast: torch.dtype) -> None:
    """The loss is off by their rounding, no more and no less; with tiny ones only the exact positive decides it."""
    case = make_case(18, channels=64, negatives=300, reduction="none", autocast=autocast)
    tiny = replace(case, negatives=1e-4 * case.negatives[:3], temperature=1.0)
    for wide, dtype, low, high in (
        (case, torch.float32, 1e-6, 1e-3),
        (tiny, torch.float32, 0, 1e-6),
        (tiny, torch.float64, 0, 1e-12),
    ):
        wide = wide.to(dtype)
        for rows in (wide.negatives, torch._neg_view(-wide.negatives)):
            loss = run(backend, replace(wide, negatives=rows), rank=False).loss
            assert loss.dtype == dtype
            assert low <= error(loss, expected(wide).loss) < high


@pytest.mark.parametrize("form", ["one tile", "few rows", "many rows", "oneDNN", "at once"])
@pytest.mark.parametrize("images", [1, 3])  # the rows of one image are its map, transposed, where nothing copies
@pytest.mark.parametrize(("negatives", "count"), [(70, None), (70, 37), (70, 0), (16, None), (5000, 4300)])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_every_form(
    monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype, images: int, negatives: int, count: int | None
) -> None:
    """Any processor can do what another one is given: products in float32, or in bfloat16 where the input is."""
    for product in {torch.float32, dtype} - {torch.float16}:
        if (form == "oneDNN" and product != torch.float32) or (form == "at once" and dtype != torch.float32):
            continue
        monkeypatch.setattr(blockwise, "_product_dtype", lambda *_, product=product: product)
        if "rows" in form:
            monkeypatch.setattr(blockwise, "FEW_LOGITS", 0)
            monkeypatch.setattr(blockwise, "FEW_ROWS", 1024 * (form == "few rows"))
        monkeypatch.setattr(_processor, "processor", lambda: Processor(True, form == "oneDNN"))
        monkeypatch.setattr(at_once, "serves", lambda *_: form == "at once")
        case = make_case(21, images, channels=32, negatives=negatives, count=count).to(dtype)
        case.query[0, :, 0, 0] = case.key[-1, :, 0, 0] = case.negatives[0] = 0
        truth = expected(case)
        seen, usual = (run(backend, case, rank=False) for backend in ("blockwise", "eager"))
        frozen, without = (run("blockwise", case, wanted, rank=False) for wanted in (("query", "key"), ()))
        assert_close(without.loss, frozen.loss, 1e-6)
        if product == torch.float32:  # nothing is rounded where nothing asks for it
            assert_close(frozen.loss, truth.loss, 1e-6)
        for name in ("loss", "query", "key", "negatives"):
            wish, tolerance = getattr(truth, name), 2 * error(getattr(usual, name), getattr(truth, name))
            floor = 1e-5 if dtype == torch.float32 else 1e-3
            for given in (seen,) if name == "negatives" else (seen, frozen):
                assert_close(getattr(given, name), wish, tolerance + floor, name)


@pytest.mark.parametrize("few", [0, 1024], ids=["many rows", "few rows"])
@pytest.mark.parametrize(("block", "spans", "tile"), [(1, 1, 1), (25, 3, 4000), (512, 300, 60)])
def test_every_division(monkeypatch: pytest.MonkeyPatch, few: int, block: int, spans: int, tile: int) -> None:
    """Of rows, among them pieces of an image, and of negatives; rows that meet a long one need a shift."""
    limits = {"FEW_LOGITS": 0, "FEW_ROWS": few, "SPANS": spans, "BLOCK_ROWS": block, "TILE_BYTES": 4 * tile}
    for name, value in limits.items():
        monkeypatch.setattr(blockwise, name, value)
    for length in (1, 1e3):
        case = make_case(3, batch=5, channels=16, query_grid=(3, 4), key_grid=(3, 4), negatives=300)
        case.negatives[7] *= length
        case = replace(case, exclude=torch.arange(5))
        for matched in (case, replace(case, index=None)):
            check("blockwise", matched, wanted=("query", "key"))
            check("blockwise", replace(matched, exclude=None).to(torch.float32), 2e-5, ("query",), rank=False)


@pytest.mark.parametrize(
    ("instructions", "dtype", "product"),
    [
        ((), torch.bfloat16, torch.float32),
        (("avx512_bf16",), torch.bfloat16, torch.bfloat16),
        (("amx_bf16",), torch.bfloat16, torch.bfloat16),
        (("avx512_bf16",), torch.float16, torch.float32),
        (("avx512_bf16",), torch.float32, torch.float32),
        (("avx512_bf16",), torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_products(
    monkeypatch: pytest.MonkeyPatch, instructions: tuple[str, ...], dtype: torch.dtype, product: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True), raising=False)
    monkeypatch.setattr(blockwise, "processor", blockwise.processor.__wrapped__)
    case, exact = make_case(0).to(dtype), torch.promote_types(dtype, torch.float32)
    maps = case.query.flatten(2), case.key.flatten(2)
    problem = Problem(*maps, case.negatives, 5.0, None, case.index, None, None, True, exact, dtype)
    assert blockwise._product_dtype(problem) == product
