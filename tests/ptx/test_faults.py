"""Faults planted on purpose, in the kernels and in their PTX: by which check the executor sees each."""

from __future__ import annotations

import importlib.util
import re
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import error, lay_out
from ptx import executor
from ptx.test_execute import case_of, check

import densecl_ops.correspondence.triton_launch as matching
import densecl_ops.info_nce.triton_launch as loss
from densecl_ops.functional import dense_correspondence

pytestmark = pytest.mark.usefixtures("gpu")
NUMBERS = "relative error|^assert"  # the comparison with the oracle
PLANTED = {  # in the source: module, text, what takes its place, what is seen
    "a store without its mask": (
        loss,
        "tl.store(denominator_ptr + out + tile_row, tl.sum(denominator, 1), mask=row_exists)",
        "tl.store(denominator_ptr + out + tile_row, tl.sum(denominator, 1))",
        "wrote too|outside every tensor",
    ),
    "a load without its mask": (
        loss,
        "return tl.load(pointers, mask=_mask(exists, channel, CHANNELS), other=0.0)",
        "return tl.load(pointers)",
        "load of .* outside every tensor",
    ),
    "a load without other=": (matching, "mask=mask, other=0.0)", "mask=mask)", ""),  # Triton 3.7 writes zeros there
    "an index off by one": (loss, "== (excluded - first)", "== (excluded - first + 1)", NUMBERS),
    "a bound that forgets the count": (
        loss,
        "stop = tl.minimum(start + per_split, existing)",
        "stop = tl.minimum(start + per_split, size)",
        NUMBERS,
    ),
    "a column too many": (loss, "exists = column < stop if", "exists = column <= stop if", NUMBERS),
    "the wrong stride": (
        loss,
        "position.to(tl.int64) * stride_p",
        "position.to(tl.int64) * stride_d",
        NUMBERS + "|outside every tensor",
    ),
    "a shift that is not rescaled": (loss, "numerator *= rescale[:, None]", "numerator *= 1.0", NUMBERS),
    "a split left out": (loss, "in tl.range(0, splits)", "in tl.range(1, splits)", NUMBERS + "|where program"),
    "two programs that write one row": (
        loss,
        "out = tl.program_id(1).to(tl.int64) * rows + tl",
        "out = tl.program_id(1).to(tl.int64) * (rows - 1) + tl",
        "which program .* wrote too",
    ),
    "a last tile of channels left out": (
        matching,
        "for first_channel in tl.range(0, channels, BLOCK_C)",
        "for first_channel in tl.range(0, channels - BLOCK_C, BLOCK_C)",
        NUMBERS,
    ),
}
EDITED = {  # in the PTX: kernel, pattern, what takes its place, what is seen, the oldest target that has it
    "one stage too few waited for": (
        "attend_kernel",
        r"cp\.async\.wait_group\s+\d+;",
        "cp.async.wait_group 9;",
        "before the copy into it was waited for|under a pending copy",
        80,
    ),
    "a barrier left out": ("combine_kernel", r"\tbar\.sync\s+0;\n", "\n", "race: ", 80),
    "a wgmma not waited for": (
        "attend_kernel",
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 9;",
        "wgmma|relative error",
        90,
    ),
    "a fence left out": ("attend_kernel", r"fence\.proxy\.async\.shared::cta;", "", "no fence.proxy.async", 90),
}


def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What together takes every line with a fault: three splits of several tiles, cut tiles, channels_last."""
    query, key = (torch.randn(2, 100, 7, 7).bfloat16() for _ in range(2))
    seen = dense_correspondence(query, key, mutual=True, backend="triton")
    wish = dense_correspondence(query.double(), key.double(), mutual=True, backend="eager")
    assert torch.equal(seen.index, wish.index)
    assert error(seen.score, wish.score) < 2e-6, "relative error of the score"
    forward = loss.forward
    monkeypatch.setattr(loss, "forward", lambda *arguments: forward(*arguments, splits=3))
    case = case_of(torch.bfloat16, 128, negatives=1_100, count=1_037)
    case.query, case.key = (lay_out(x, "channels_last") for x in (case.query, case.key))
    check(case, ("query", "key"), rank=False)
    check(case_of(torch.float32, 64, exclude=torch.tensor([3, 150, 299])), ("query",))


def test_nothing_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    probe(monkeypatch)


@pytest.mark.parametrize("fault", PLANTED)
def test_in_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    launcher, old, new, seen = PLANTED[fault]
    text = Path(launcher.kernels.__file__).read_text()
    assert old in text
    path = tmp_path / "triton_kernels.py"
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(launcher, "kernels", _import(path))
    with pytest.raises(AssertionError, match=seen) if seen else nullcontext():
        probe(monkeypatch)


@pytest.mark.parametrize("fault", EDITED)
def test_in_the_machine_code(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    kernel, pattern, to, seen, oldest = EDITED[fault]
    if oldest > executor.TARGET:
        pytest.skip(f"from sm_{oldest} on")

    def edit(name: str, text: str) -> str:
        return re.sub(pattern, to, text) if name == kernel else text

    monkeypatch.setattr(executor, "EDITS", [edit])
    with pytest.raises(AssertionError, match=seen):
        probe(monkeypatch)


def test_a_second_use_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why match_kernel finds norms by products on sm_90. When this passes without GRAM, GRAM can go."""
    if executor.TARGET < 90:
        pytest.skip("no wgmma before sm_90")
    monkeypatch.setattr(matching._triton, "family", lambda _: "mfma")  # tiles by cp.async, no GRAM
    query = lay_out(torch.randn(1, 256, 7, 7), "channels_last").bfloat16()
    with pytest.raises(executor.FaultError, match="under a pending wgmma"):
        dense_correspondence(query, query, backend="triton")


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_kernels", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
