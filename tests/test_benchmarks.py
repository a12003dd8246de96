"""Every benchmark runs at toy size, its numbers are right, and the committed result files hold what readers need."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks import matching, records, step
from benchmarks.__main__ import main
from benchmarks.measure import commit, compare, compiled
from benchmarks.records import RESULTS

CPU = torch.device("cpu")
SERVED = {"densecl_ops", "eager", "materialise", "torch.compile", "chunked", "attention, flash"}


@pytest.fixture(autouse=True)
def _no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor takes a minute a suite, and what the suites do with its result is the same without it."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, fullgraph=True, backend="eager"))


def check(record: dict) -> None:
    """What every reader of a file relies on."""
    assert record.keys() == {"suite", "runs", "cases"}
    assert all(one.keys() >= {"command", "environment"} for one in record["runs"])
    shapes = {json.dumps(case["shape"]) for case in record["cases"]}
    assert len(shapes) == len(record["cases"])
    for case in record["cases"]:
        assert 0 <= case["run"] < len(record["runs"])
        for row in case["rows"].values():
            if "failed" not in row:
                low, middle, high = row["milliseconds"]
                assert 0 < low <= middle <= high
                assert row["rounds"] >= 3 or (row["rounds"] == 1 and low == high)
                assert all(0 <= value < 1 for key, value in row.items() if key.startswith("error_"))


@pytest.mark.parametrize(
    ("suite", "cases", "options"),
    [
        ("loss", 2, ["--dtypes", "float32"]),
        ("matching", 4, []),
        ("matching", 2, ["--maps"]),
        ("queue", 1, ["--busy", "1"]),
        ("step", 1, []),
        ("host", 5, []),
    ],
)
def test_suite(tmp_path: Path, suite: str, cases: int, options: list[str]) -> None:
    command = [suite, "--toy", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01", *options]
    if "--maps" in options:
        command.append(str(tmp_path))
        torch.save(torch.randn(2, 3, 16, 4, 4), tmp_path / "maps.pt")
    main(command)
    path = tmp_path / f"{suite}{'-busy1' * (suite == 'queue')}.json"
    record = json.loads(path.read_text())
    check(record)
    assert len(record["cases"]) == cases
    for case in record["cases"]:
        served = {name: row for name, row in case["rows"].items() if "failed" not in row}
        assert served.keys() >= (SERVED if suite == "loss" else case["rows"].keys())
        assert served["densecl_ops"]["ratio"] == 1
        worst = 1e-2 if case["shape"].get("dtype") == "bfloat16" else 1e-5
        for name, row in served.items():
            errors = (row.get(key, 0) for key in ("error_loss", "error_gradient", "error_score"))
            assert all(error < worst for error in errors), name
    main(command)
    assert json.loads(path.read_text()) == record, "a finished case is not measured again"


def test_a_wrong_match_is_counted_and_a_tie_apart() -> None:
    shape = {"b": 2, "c": 16, "grid": 5, "dtype": "float32", "layout": "NCHW"}
    maps = matching.make_inputs(shape, CPU, 0)
    index = matching.ours(maps)
    assert matching.gap(maps, index) == (0, 0, 0)
    index[1, 3] = (index[1, 3] + 1) % 25
    share, tied, lost = matching.gap(maps, index)
    assert (share, tied) == (1 / 50, 0)
    assert lost > 0
    maps[1][1] = 1.0  # whichever is chosen, its score is the same
    assert matching.gap(maps, torch.tensor([[0], [24]]).expand(2, 25))[1] == 1 / 2


def test_both_ways_of_a_dense_step_give_the_same_loss() -> None:
    """The rival does the same work: equal queues, equal weights, equal loss."""
    ours = step.Trainer({"backbone": "small", "batch": 4, "pixels": 32, "k": 16, "dtype": "float32"}, CPU)
    ours.image_slices.queue.copy_(ours.image_queue.rows.t())
    ours.dense_slices.queue.copy_(ours.dense_queue.rows.t())
    images, usual = torch.randn(4, 3, 32, 32), copy.deepcopy(ours)
    torch.testing.assert_close(ours.step(ours.ours, images), usual.step(usual.usual, images))
    torch.testing.assert_close(ours.dense_queue.rows.t(), usual.dense_slices.queue)


def test_committed_results() -> None:
    """A line per case, of a clean commit, without a path of the machine."""
    for path in RESULTS.rglob("*.json"):
        record = json.loads(path.read_text())
        assert records.dumps(record) + "\n" == path.read_text(), path
        assert not re.search(r"(?<![\w.])(/[\w.+-]+){2,}", path.read_text()), path
        runs = [] if isinstance(record, list) else record.get("runs", [record])  # a list: what a compiler made
        for one in runs:
            assert re.fullmatch("[0-9a-f]{7,40}", one.get("environment", one)["commit"]), path
        if "suite" in record:
            check(record)


def test_commit_comes_from_the_variable_where_git_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.collect_env.run_and_read_all", lambda *_: None)
    monkeypatch.setenv("COMMIT", "0123abc")
    assert commit() == "0123abc"


def test_what_a_contestant_cannot_do_is_a_result() -> None:
    """And names no path of the machine. A hopeless one is timed once."""
    broken = Mock(side_effect=OSError("/home/me/lib/x.so: no file"))
    entries = {"greedy": Mock(), "broken": broken, "slow": lambda _: time.sleep(0.2), "fast": Mock()}
    rows = compare(entries, [None], CPU, seconds=0.2, needs={"greedy": 2**50})
    assert rows["greedy"] == {"failed": "MemoryError: not run, needs about 1048576 GiB"}
    assert rows["broken"] == {"failed": "OSError: (path): no file"}
    assert [rows[name]["rounds"] for name in ("slow", "fast")] == [1, 25]
    low, middle, high = rows["slow"]["milliseconds"]
    assert 200 <= low == middle == high


def test_torch_compile_is_compiled_in_every_case() -> None:
    """Dynamo runs a function eagerly, silently, once it has compiled it for eight shapes."""
    seen = []
    rival = compiled(lambda x: seen.append(torch.compiler.is_compiling()) or 2 * x, backend="eager")
    for n in range(2, 12):
        assert "failed" not in compare({"rival": rival}, [torch.ones(n)], CPU, seconds=0)["rival"]
    assert all(seen)


@pytest.mark.parametrize("name", ["same-view", "enqueue-first"])
def test_curves(name: str, tmp_path: Path) -> None:
    for module in ("kornia", "matplotlib", "skimage", "tqdm"):
        pytest.importorskip(module)
    main(["curves", "--runs", name, "--out", str(tmp_path), "--options", "--steps 2 --batch-size 4 --lambda-warmup 0"])
    paths = (folder / "curves_cpu" / f"{name}.json" for folder in (tmp_path, RESULTS))
    record, committed = (json.loads(path.read_text()) for path in paths)
    assert record.keys() == committed.keys()
    assert record["settings"]["queue_size"] == committed["settings"]["queue_size"]
    assert {key: len(values) for key, values in record["history"].items()} == dict.fromkeys(committed["history"], 2)
    first = {key: values[0] for key, values in record["history"].items()}
    if name == "same-view":  # at the first step both encoders are equal: each position is its own match
        assert first["match_score"] == pytest.approx(1, abs=1e-3)
        assert first["mutual_share"] == 1
    else:  # random negatives would lose against every positive
        assert first["top1"] < 0.5


@pytest.mark.parametrize(("call", "seconds"), [("first", 420), ("second", 240)])
def test_gpu_run_fits_its_call(tmp_path: Path, call: str, seconds: int) -> None:
    """Programs that note how they are called stand in for those of a machine with a GPU."""
    for program in (tmp_path / "timeout", tmp_path / "nvidia-smi"):
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/notes\n')
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = ["bash", RESULTS.with_name("gpu_run.sh"), tmp_path / "out", call]
    subprocess.run(command, env=environment, check=True)
    limits = [int(line.split()[2]) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(limits) >= 5
    assert sum(limits) <= seconds
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"out/races.txt", "out/selftest.txt", "out/loss.txt"} <= set(archive.getnames())
