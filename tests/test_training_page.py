"""docs/training.md: its code runs, and its figures are those of the recorded runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import render
from densecl_ops import DenseInfoNCELoss

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()
RECORDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results/curves_cpu").glob("*.json")}
LIMIT = math.log(1 + RECORDS["random"]["settings"]["queue_size"])


def test_table_is_that_of_the_records() -> None:
    assert render.load_curves("curves_cpu").keys() == RECORDS.keys()
    assert render.rendered("docs/training.md") == PAGE, "run `python -m benchmarks render`"


def test_records_are_whole() -> None:
    for name, run in RECORDS.items():
        assert run["name"] == name
        assert run["commit"]
        columns = {"image_loss", "dense_loss", "top1", "top5", "match_score", "mutual_share"}
        assert run["history"].keys() == columns
        assert {len(values) for values in run["history"].values()} == {run["settings"]["steps"]}
        assert all(a <= b for a, b in zip(run["history"]["top1"], run["history"]["top5"], strict=True))


def said() -> list[str]:
    """Every phrase of the page that holds a decimal fraction, made from the records."""
    runs = {name: run["history"] for name, run in RECORDS.items()}
    random, broken, same, fast = (runs[name] for name in ("random", "enqueue-first", "same-view", "high-lr"))
    late, sooner = max(runs["random-no-warmup"]["dense_loss"]), max(runs["empty-no-warmup"]["dense_loss"])
    low, lower = min(runs["random-no-warmup"]["mutual_share"]), min(random["mutual_share"])
    untrained = json.loads((ROOT / "benchmarks/results/demo_cpu/seed0.json").read_text())["rows"]["random weights"]
    scores = f"match score up to {max(fast['match_score']):.2f} while the mutual share falls to"
    once = f"top-1 at the *first* step: {broken['top1'][0]:.2f} instead of {random['top1'][0]:.2f}"
    return [
        "temperature 0.2",
        "within 1.5 cells",
        f"random weights reach {untrained['close']:.2f}.",
        f"(top-1 is {random['top1'][0]:.2f} at the first step)",
        f"({random['top1'][1]:.2f} at the second step)",
        f"log(1 + K), here {LIMIT:.2f}:",
        f"log(1 + 32) = {math.log(33):.2f}",
        f"(peak {sooner:.2f} at step 8, not {late:.2f} at step 17)",
        f"(peak {max(random['dense_loss']):.2f})",
        f"the same view twice has {np.mean(same['top1'][-20:]):.2f}",
        f"Random weights start at {random['mutual_share'][0]:.2f} here",
        f"the warm-up ({lower:.2f}) than without ({low:.2f})",
        once,
        f"mutual share of {same['mutual_share'][0]:.2f} at the first step, and top-1 of {same['top1'][1]:.2f} at the",
        f"{scores} {min(fast['mutual_share']):.2f}",
        f"log(1 + K) = {LIMIT:.2f}",
        f"top-1, still {fast['top1'][99]:.2f} at step 100",
    ]


def test_prose_says_what_the_records_say() -> None:
    prose = re.sub(r"```.*?```|<!-- curves:begin -->.*?<!-- curves:end -->", "", PAGE, flags=re.DOTALL)
    prose = " ".join(prose.split())
    for phrase in said():
        assert phrase in prose, phrase
        prose = prose.replace(phrase, "")
    assert not re.findall(r"\d+\.\d+", prose)


def test_prose_claims_that_are_not_numbers() -> None:
    runs = {name: {key: np.array(v) for key, v in run["history"].items()} for name, run in RECORDS.items()}
    healthy = [runs[name] for name in ("random", "empty", "random-no-warmup", "empty-no-warmup")]
    for run in healthy:  # over the last hundred steps both terms rise
        for term in ("image_loss", "dense_loss"):
            assert run[term][-20:].mean() > run[term][-120:-100].mean()
    assert runs["empty"]["image_loss"][0] == runs["empty"]["dense_loss"][0] == 0
    assert runs["empty-no-warmup"]["dense_loss"].argmax() == 7
    assert runs["random-no-warmup"]["dense_loss"].argmax() == 16
    for start in ("random", "empty"):  # above log(1 + K) during the warm-up only
        assert runs[start]["dense_loss"].max() > LIMIT > runs[f"{start}-no-warmup"]["dense_loss"].max()
        for key in ("top1", "match_score", "mutual_share"):
            assert runs[f"{start}-no-warmup"][key][-20:].mean() > runs[start][key][-20:].mean()
        assert RECORDS[f"{start}-no-warmup"]["matches"]["close"] <= RECORDS[start]["matches"]["close"]
    at_150 = slice(130, 150)
    broken, sound = runs["enqueue-first"], runs["random"]
    assert broken["dense_loss"][at_150].mean() > sound["dense_loss"][at_150].mean()
    assert broken["top1"][at_150].mean() < sound["top1"][at_150].mean()
    same = runs["same-view"]
    assert same["mutual_share"][0] == 1
    assert same["dense_loss"][at_150].mean() < sound["dense_loss"][at_150].mean()
    collapsed = runs["high-lr"]
    assert collapsed["image_loss"][-20:].mean() > collapsed["image_loss"][80:100].mean()
    assert collapsed["dense_loss"][-20:].mean() > collapsed["dense_loss"][80:100].mean()


def test_page_runs() -> None:
    space: dict[str, object] = {}
    first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(first, space)
    assert set(space["log"]) == {"loss", "top1", "top5", "match_score", "mutual_share"}  # type: ignore[call-overload]
    pytest.importorskip("matplotlib")
    exec(second, space)


def test_equal_logits_give_log_1_plus_k() -> None:
    """What the page says of zero features and of features whose squares overflow."""
    negatives = torch.nn.functional.normalize(torch.randn(37, 6), dim=1)
    criterion, key = DenseInfoNCELoss(), torch.randn(2, 6, 4)
    assert criterion(torch.zeros(2, 6, 4), key, negatives).item() == pytest.approx(math.log(38), rel=1e-6)
    for value in (math.nan, math.inf, 1e30):
        assert criterion(torch.full((2, 6, 4), value), key, negatives).isnan()
