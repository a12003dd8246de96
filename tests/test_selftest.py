"""`python -m densecl_ops.selftest`: passes where all is well, fails where it is not, and reports both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densecl_ops import selftest
from densecl_ops.correspondence import blockwise as matching
from densecl_ops.info_nce import blockwise as loss

all_cases = selftest.cases


def test_passes_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "cases", lambda real, images: list(all_cases(False, images))[::4])
    path = tmp_path / "report.json"
    assert selftest.main(["--small", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "3 checks, 0 failed" in printed
    for row in report["checks"]:
        assert row["case"] in printed
        assert "failed" not in row
        assert row["errors"]


@pytest.mark.parametrize(
    ("module", "field", "message"),
    [
        (loss, "loss", "loss has more than twice the error"),
        (loss, "rank", "rank has more than twice the error"),
        (loss, "grad_query", "gradient to query has more than twice the error"),
        (loss, "noise", "repeats differ"),
        (loss, "no field", "AttributeError: 'Result' object has no attribute 'no field'"),
        (matching, 0, "match has more than twice the error"),
        (matching, 1, "score has more than twice the error"),
        (matching, 2, "valid has more than twice the error"),
    ],
)
def test_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, module: Any, field: Any, message: str) -> None:
    name = "forward" if module is loss else "match"
    right = getattr(module, name)

    def wrong(*arguments: object) -> tuple[Tensor, ...]:
        result = right(*arguments)
        if field == "noise":
            return result._replace(loss=result.loss * (1 + 1e-6 * torch.rand(1)))
        broken = (result[field] if module is matching else getattr(result, field)).view(-1)
        broken[:3] = ~broken[:3] if broken.dtype == torch.bool else 30
        return result

    monkeypatch.setattr(module, name, wrong)
    case = next(case for case in all_cases(False, 32) if ("rank" if module is loss else "mutual") in case.options)
    assert message in selftest.check(case, "blockwise", torch.device("cpu"))["failed"]


@pytest.mark.parametrize("option", ["rank", "learned"])
def test_real_sizes_are_measured(option: str) -> None:
    case = next(case for case in all_cases(True, selftest.FEW_IMAGES + 2) if case.real and option in case.options)
    row = selftest.check(case._replace(negatives=256), "blockwise", torch.device("cpu"))
    assert "failed" not in row
    assert row["errors"].keys() == {"loss", "gradient to query"} | ({"rank"} & {option})
    assert all(float(row[side].removesuffix(" ms")) > 0 for side in ("ours", "eager"))
