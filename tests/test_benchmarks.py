"""Every benchmark runs at toy size, its numbers are right, and the committed result files hold what readers need."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from benchmarks import loss, matching, queue, records, rivals, step
from benchmarks.__main__ import main

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CPU = torch.device("cpu")


def run(suite: str, out: Path, *options: str) -> dict:
    main([suite, "--toy", "--device", "cpu", "--out", str(out), "--seconds", "0.01", *options])
    return json.loads((out / f"{suite}.json").read_text())


def test_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run("loss", tmp_path, "--dtypes", "float32")
    records.validate(record)
    train, forward = record["cases"]
    assert (train["shape"]["mode"], forward["shape"]["mode"]) == ("train", "forward")
    for case in (train, forward):
        served = {name: row for name, row in case["rows"].items() if "failed" not in row}
        assert {"densecl_ops", "eager", "materialise", "torch.compile", "chunked", "attention, flash"} <= served.keys()
        for name, row in served.items():
            assert row["error_loss"] < 1e-5, name
            assert case is forward or row["error_gradient"] < 1e-5, name
        assert case["rows"]["densecl_ops"]["ratio"] == 1
    assert "no module" in train["rows"]["pykeops"]["failed"].lower() or "ratio" in train["rows"]["pykeops"]
    before = (tmp_path / "loss.json").read_text()
    assert "N = 66" in capsys.readouterr().out
    assert run("loss", tmp_path, "--dtypes", "float32") == json.loads(before), "a finished case is not measured again"


def test_exact_loss_agrees_with_the_oracle() -> None:
    inputs = loss.make_inputs(37, 50, 16, torch.float64, CPU)
    value, grad = loss.exact(inputs)
    arrays = [x.numpy() for x in inputs]
    expected = oracle.info_nce(arrays[0][:, :, None], arrays[1][:, :, None], arrays[2], temperature=rivals.TEMPERATURE)
    np.testing.assert_allclose(value, expected.loss.mean(), rtol=1e-12)
    np.testing.assert_allclose(grad, expected.query[:, :, 0], rtol=0, atol=1e-14)


def test_matching(tmp_path: Path) -> None:
    record = run("matching", tmp_path)
    records.validate(record)
    assert len(record["cases"]) == 4
    for case in record["cases"]:
        for name, row in case["rows"].items():
            assert "failed" not in row, (name, row)
            assert row["error_score"] < (1e-6 if case["shape"]["dtype"] == "float32" else 1e-2), name


def test_a_wrong_match_is_counted() -> None:
    shape = {"b": 2, "c": 16, "grid": 5, "dtype": "float32", "layout": "NCHW"}
    maps = matching.make_inputs(shape, CPU, 0)
    index = matching.ours(maps)
    assert matching.gap(maps, index) == (0, 0)
    index[1, 3] = (index[1, 3] + 1) % 25
    share, lost = matching.gap(maps, index)
    assert share == 1 / 50
    assert lost > 0


def test_queue(tmp_path: Path) -> None:
    record = run("queue", tmp_path)
    records.validate(record)
    reads = {name: row["host_reads"] for name, row in record["cases"][0]["rows"].items()}
    assert reads == {"densecl_ops": 0, "slice, host pointer": 1, "the same, queue cloned": 1}


def test_step(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    record = run("step", tmp_path)
    records.validate(record)
    rows = record["cases"][0]["rows"]
    assert not [row for row in rows.values() if "failed" in row]
    assert rows["MoCo-v2"]["percent_of_moco"] == 0
    assert sum(name.startswith("part") for name in rows) == 4


def test_both_ways_of_a_dense_step_give_the_same_loss() -> None:
    """The rival does the same work: equal queues, equal weights, equal loss."""
    shape = {"backbone": "example", "batch": 4, "pixels": 32, "k": 16, "dtype": "float32"}
    torch.manual_seed(0)
    trainer = step.Trainer(shape, CPU)
    trainer.image_slices.queue.copy_(trainer.image_queue.rows.t())
    trainer.dense_slices.queue.copy_(trainer.dense_queue.rows.t())
    images = torch.randn(4, 3, 32, 32)
    twin = copy.deepcopy(trainer)
    twin.pairs = [
        [(a, b) for a, b in zip(x.parameters(), y.parameters(), strict=True)]
        for x, y in ((twin.backbone_k, twin.backbone_q), (twin.head_k, twin.head_q))
    ]
    torch.testing.assert_close(trainer.dense_ours(images), twin.dense_usual(images))
    torch.testing.assert_close(trainer.dense_queue.rows.t(), twin.dense_slices.queue)


def test_slice_queue_holds_what_ours_holds() -> None:
    torch.manual_seed(0)
    ours, usual = queue.MomentumQueue(8, 4), queue.SliceQueue(8, 4)
    for _ in range(3):
        keys = torch.randn(4, 4)
        ours.enqueue(keys)
        usual.enqueue(keys)
    torch.testing.assert_close(usual.queue.t(), ours.rows)
    assert int(usual.position) == int(ours.position)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_results(path: Path) -> None:
    record = json.loads(path.read_text())
    if "suite" in record:
        records.validate(record)
        assert not any(run["environment"]["commit"].endswith("dirty") for run in record["runs"])


def test_validate_finds_what_is_wrong(tmp_path: Path) -> None:
    good = run("queue", tmp_path)

    def broken(change: str) -> dict:
        record = copy.deepcopy(good)
        exec(change, {"record": record, "case": record["cases"][0], "row": record["cases"][0]["rows"]["densecl_ops"]})
        return record

    for change in (
        "record['extra'] = 1",
        "record['runs'][0]['environment']['torch'] = None",
        "record['runs'][0]['rates']['exp_gops'] = 0",
        "record['runs'][0]['command'] = 'something else'",
        "case['run'] = 1",
        "case['clocks'] = []",
        "record['cases'].append(case)",
        "row['milliseconds'] = [2, 1, 3]",
        "row['rounds'] = 1",
        "row['peak_extra_mib'] = -1",
        "row['error_loss'] = float('nan')",
        "row['failed'] = ''",
    ):
        with pytest.raises(ValueError, match=r"\w"):
            records.validate(broken(change))


def test_tune(tmp_path: Path) -> None:
    """In the interpreter: the table's row and two others, all with the right loss."""
    pytest.importorskip("triton")
    main(["tune", "--toy", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01", "--dtype", "float32"])
    record = json.loads((tmp_path / "tune-float32-128-train.json").read_text())
    records.validate(record)
    rows = record["cases"][0]["rows"]
    assert len(rows) == 3
    assert all(row["error_loss"] < 1e-5 for row in rows.values())


def test_running_out_of_memory_is_a_result() -> None:
    from benchmarks.measure import compare

    def greedy(_: object) -> None:
        raise torch.OutOfMemoryError

    rows = compare({"greedy": greedy, "densecl_ops": lambda _: None}, [None], CPU, cold=False, seconds=0.01)
    assert rows["greedy"] == {"failed": "out of memory"}
    assert rows["densecl_ops"]["rounds"] >= 3
