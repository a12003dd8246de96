"""Kernels at several programs, and several tiles a program, in every direction: executed as PTX, against the oracle.

`make execute` runs tests/test_triton.py in the executor too: every option and layout at small sizes.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from helpers import LAYOUTS, Case, assert_close, error, expected, flat64, lay_out, make_case, match, run
from ptx import count, executor

from benchmarks import kernels, loss
from benchmarks.records import RESULTS
from densecl_ops import selftest
from densecl_ops.info_nce import triton_launch as fused
from densecl_ops.info_nce import triton_plan

ALL = ("query", "key", "negatives", "temperature")
# Relative error of the loss and of the gradients: at most twice what was measured (one negative: 4e-4, 3e-3). One tile
# of other negatives in the place of the right ones moves both by more than 1e-2.
TOLERANCES = {torch.float32: (5e-7, 2e-6), torch.float16: (1e-4, 2e-3), torch.bfloat16: (1e-3, 8e-3)}

pytestmark = pytest.mark.usefixtures("gpu")


def case_of(dtype: torch.dtype, channels: int, negatives: int = 300, **options: object) -> Case:
    """147 rows and 300 negatives: tiles of 128 and 64 are whole, cut and several."""
    sizes = {"batch": 3, "query_grid": (7, 7), "key_grid": (5, 4)}
    case = make_case(**sizes | {"channels": channels, "negatives": negatives, "reduction": "none"} | options)
    case = replace(case.to(dtype), upstream=case.upstream.abs().float() + 0.5)
    if case.count is not None:
        case.negatives[case.count :] = torch.nan
    return case


def check(case: Case, wanted: tuple[str, ...] = ALL, rank: bool = True) -> None:
    truth, seen = expected(case), run("triton", case, wanted, rank)
    of_loss, of_gradient = TOLERANCES[case.query.dtype]
    cold = 1 + (case.temperature < 0.05) * 20  # errors of the logits grow with 1 / t
    assert_close(seen.loss, truth.loss, cold * of_loss, "loss")
    for name in wanted:
        assert_close(getattr(seen, name), getattr(truth, name), cold * of_gradient, f"gradient to {name}")
    if rank:
        low, high = oracle.rank_bounds(truth, 2 * torch.finfo(case.query.dtype).eps, tie=2.0**-18)
        assert ((low <= seen.rank.numpy()) & (seen.rank.numpy() <= high)).all()


FORMS = {
    "no shift": ({"count": 293}, ("query", "key"), False),
    "no shift, rank": ({"count": 293, "exclude": torch.tensor([5, 150, 292])}, ("query",), True),
    "running maximum": ({}, ALL, True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [20, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loss(dtype: torch.dtype, channels: int, form: str) -> None:
    options, wanted, rank = FORMS[form]
    batch = 3 if channels <= 128 else 1
    exclude = {"exclude": options["exclude"][:batch]} if "exclude" in options else {}
    case = case_of(dtype, channels, **options | exclude, batch=batch)
    check(case, tuple(x for x in wanted if x != "temperature" or "count" in options or channels == 128), rank)


@pytest.mark.parametrize(
    ("label", "options", "wanted"),
    [
        ("float16", {"dtype": torch.float16, "count": 300}, ("query", "key")),
        ("forward only", {"count": 293}, ()),
        ("cold", {"count": 293, "temperature": 0.01}, ("query",)),
        ("cold float32", {"dtype": torch.float32, "count": 293, "temperature": 0.01}, ("query",)),
        (
            "cold gradients",
            {"dtype": torch.float32, "channels": 24, "temperature": 0.01},
            ("query", "key", "negatives"),
        ),
        ("a larger grid", {"batch": 2, "query_grid": (9, 8), "key_grid": (9, 9), "count": 293}, ("query", "key")),
        ("one negative", {"negatives": 1, "batch": 1}, ("query",)),
        ("vectors", {"batch": 140, "query_grid": (1, 1), "key_grid": (1, 1), "count": 293}, ("query", "key")),
    ],
)
def test_loss_options(label: str, options: dict[str, object], wanted: tuple[str, ...]) -> None:
    check(case_of(**{"dtype": torch.bfloat16, "channels": 128} | options), wanted, rank=label != "one negative")


@pytest.mark.parametrize("layout", ["channels_last", "tokens", "slice", "swapped"])
def test_layouts(layout: str) -> None:
    case = case_of(torch.bfloat16, 128, count=293)
    check(replace(case, query=lay_out(case.query, layout), key=lay_out(case.key, layout)), ("query", "key"))


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("count", [None, 4_001])
@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 128), (torch.float32, 64)], ids=str)
def test_a_long_queue(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int, count: int | None, splits: int | None
) -> None:
    """Enough tiles that every stage of the pipeline fills, drains and wraps around."""
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *arguments: forward(*arguments, splits=splits))
    check(case_of(dtype, channels, negatives=4_100, count=count), ("query",))


@pytest.mark.parametrize("config", loss.CANDIDATES, ids=str)
@pytest.mark.parametrize("rank", [False, True])
def test_other_tiles(monkeypatch: pytest.MonkeyPatch, config: triton_plan.Config, rank: bool) -> None:
    """What the loss benchmark tries beside the table, whole tiles by a tensor descriptor (TMA) among it."""
    if config.descriptor and executor.TARGET < 90:
        pytest.skip("no tensor copies before sm_90")
    forward = fused.forward
    monkeypatch.setattr(triton_plan, "choose", lambda *arguments, **options: config)
    monkeypatch.setattr(fused, "forward", lambda *arguments: forward(*arguments, splits=2))
    check(case_of(torch.bfloat16, 128, negatives=1_500, count=1_437), ("query",), rank)


def test_order_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(torch.bfloat16, 128, negatives=700)
    there = run("triton", case)
    monkeypatch.setattr(executor, "REVERSED", [True])
    back = run("triton", case)
    assert all(torch.equal(getattr(there, x), getattr(back, x)) for x in ("loss", "rank", *ALL))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("channels", "grid", "key_grid"),
    [
        (256, (7, 7), (7, 7)),
        (96, (5, 5), (5, 5)),
        (256, (8, 8), (8, 8)),
        (100, (4, 4), (5, 8)),
        (256, (14, 14), (14, 14)),
        (128, (12, 12), (7, 9)),
        (20, (56, 56), (56, 56)),
    ],
    ids=str,
)
def test_matching(
    dtype: torch.dtype, channels: int, grid: tuple[int, int], key_grid: tuple[int, int], layout: str
) -> None:
    if grid == (56, 56) and (dtype != torch.bfloat16 or layout == "channels_last"):
        pytest.skip("49 tiles cost 20 times what the others do: one of their kind is enough")
    batch = 1 if grid == (56, 56) else 2
    query, key = (lay_out(torch.randn(batch, channels, *side).to(dtype), layout) for side in (grid, key_grid))
    truth = oracle.match(flat64(query), flat64(key), mutual=True)
    seen = match("triton", query, key, mutual=True)
    assert error(seen.score, truth.score) < 2e-6
    query_unit, key_unit = (oracle.unit(flat64(x), 1)[0] for x in (query, key))
    scores = np.einsum("bcq,bck->bqk", query_unit, key_unit)
    chosen = np.take_along_axis(scores, seen.index.numpy()[..., None], 2)[..., 0]
    assert (truth.score - chosen).max() < 1e-6
    alike = seen.index.numpy() == truth.index
    assert (seen.valid.numpy() == truth.valid)[alike].all()


def test_tiles_that_a_descriptor_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the queue that start at no multiple of 16 bytes come by pointers."""
    config = loss.CANDIDATES[1]
    assert config.descriptor
    monkeypatch.setattr(triton_plan, "choose", lambda *arguments, **options: config)
    case = case_of(torch.bfloat16, 128, count=293)
    flat = torch.cat([case.negatives.new_zeros(1), case.negatives.flatten()])
    check(replace(case, negatives=flat[1:].view_as(case.negatives)), ("query",))


def test_the_selftest_runs_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "LAUNCHES", [])
    assert selftest.main(["--small"]) == 0
    assert {launch.name for launch in executor.LAUNCHES} == {kernel for kernel, *_ in kernels.CASES}


@pytest.mark.parametrize("layout", LAYOUTS[2:])
@pytest.mark.parametrize("grids", [((7, 7), (7, 7)), ((10, 9), (7, 12)), ((1, 1), (9, 9))], ids=str)
def test_layouts_of_matching(layout: str, grids: tuple[tuple[int, int], ...]) -> None:
    test_matching(torch.bfloat16, 70, *grids, layout)


@pytest.mark.parametrize("form", ["bfloat16, no shift", "bfloat16, channels_last"])
def test_the_record_of_counts_is_up_to_date(form: str) -> None:
    """Else: `python -m ptx.count loss`, for both targets, and `python -m benchmarks render`."""
    record = json.loads((RESULTS / "counts" / f"loss_sm_{executor.TARGET}.json").read_text())
    assert [row for row in record if row["case"].startswith(form)] == count.count("loss", form)
