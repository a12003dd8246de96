"""Writes the tables of docs/dense-tasks.md from the committed records alone."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.records import RESULTS, spread, table
from benchmarks.transfer.pretraining import ARMS, BYOL, IMAGE
from benchmarks.transfer.suite import Record, chosen_rate, load, on_val
from benchmarks.transfer.tasks import CLASSES, TASKS

NAMES = {
    "random": "random weights",
    "image": "image term alone (MoCo-v2)",
    "nearest": "image + dense, nearest (DenseCL)",
    "mutual": "image + dense, mutual nearest",
    "place": "image + dense, same place",
    "byol": "BYOL's image term alone",
    "byol_dense": "BYOL + dense, nearest, cosine",
    "byol_contrast": "BYOL + dense, nearest, in-batch negatives",
}
HEADINGS = [heading for _, heading in TASKS.values()]
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 0.975 quantiles of Student's t, by degrees of freedom


def values(record: Record) -> list[float]:
    """Of every task, on test."""
    return [float(record[f"test.{task}"][key]) for task, (key, _) in TASKS.items()]


def by_arm(records: Iterable[Record], key: str = "seed") -> dict[str, dict[float, Record]]:
    """Arm: {seed, or another setting: record}."""
    every = sorted(records, key=lambda record: float(record["setting"][key]))
    found = {arm: {r["setting"][key]: r for r in every if r["setting"]["arm"] == arm} for arm in ARMS}
    return {arm: runs for arm, runs in found.items() if runs}


def results(folder: str) -> str:
    """Mean over the seeds and standard deviation, an arm per row."""
    records, rows = load(RESULTS / folder), []
    for arm, runs in by_arm(records).items():
        columns = zip(*map(values, runs.values()), strict=True)
        rows.append([NAMES[arm], str(len(runs)), *(spread(column, 3) for column in columns)])
    unmoved = f"{records[0]['test.unmoved']['miou']:.3f}"
    rows.append(["no features: labels left where they were", "", "", "", unmoved, ""])
    return table(["", "seeds", *HEADINGS], rows)


def differences(folder: str) -> str:
    """Each arm minus the image term of the same seed and host."""
    arms, rows = by_arm(load(RESULTS / folder)), []
    for arm, runs in arms.items():
        if arm not in (IMAGE, BYOL):
            base = arms[BYOL if arm.startswith(BYOL) else IMAGE]
            gains = [map(operator.sub, values(run), values(base[seed])) for seed, run in runs.items()]
            rows.append([NAMES[arm], *map(paired, zip(*gains, strict=True))])
    return table(["minus the image term of the same seed", *HEADINGS], rows)


def paired(values: Sequence[float]) -> str:
    """Mean, 95 % interval by Student's t, and on how many seeds it is above 0."""
    mean, up = statistics.mean(values), sum(value > 0 for value in values)
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}), {up} of {len(values)} up"


def each_class(folder: str) -> str:
    """IoU of k-NN retrieval per class, mean over the seeds."""
    rows = []
    for arm, runs in by_arm(load(RESULTS / folder)).items():
        columns = zip(*(run["test.knn"]["classes"] for run in runs.values()), strict=True)
        rows.append([arm, *(f"{statistics.mean(column):.2f}" for column in columns)])
    return table(["k-NN, IoU", *CLASSES], rows)


STUDIED: dict[str, Callable[[Record], float]] = {
    "(probe + k-NN) / 2": on_val,
    "label propagation": lambda record: float(record["val.propagation"]["miou"]),
    "stereo": lambda record: float(record["val.stereo"]["close"]),
}


def by_rate(folder: str, heading: str, value: Callable[[Record], float], bold: bool = False) -> str:
    """A measure on val of every run of the search; the rate that was taken in bold."""
    records, rows = load(RESULTS / folder / "search"), []
    rates = sorted({record["setting"]["rate"] for record in records})
    for arm, runs in by_arm(records, "rate").items():
        cells = [f"{value(runs[rate]):.3f}" if rate in runs else "" for rate in rates]
        if bold:
            taken = rates.index(chosen_rate(records, arm))
            cells[taken] = f"**{cells[taken]}**"
        rows.append([NAMES[arm], *cells])
    return table([heading, *(f"rate {rate:g}" for rate in rates)], rows)


CHANGES = {
    "steps": "{} steps",
    "view": "views of {} pixels",
    "temperature": "temperature {}",
    "norm": "{} norm",
    "dense_weight": "weight of the dense term {}",
    "dense_from": "dense term from {:.0%} of the steps on",
}


def study(folder: str) -> str:
    """One choice changed at a time: image term, nearest and place in every cell."""
    records = load(RESULTS / folder / "study")
    base = {key: statistics.mode(record["setting"][key] for record in records) for key in CHANGES}
    runs: dict[str, dict[str, Record]] = {}
    for record in records:
        setting = record["setting"]
        changed = [text.format(setting[key]) for key, text in CHANGES.items() if setting[key] != base[key]]
        runs.setdefault(", ".join(changed) or "none", {})[setting["arm"]] = record
    rows = []
    for change, arms in sorted(runs.items(), key=lambda item: (item[0] != "none", item[0])):
        found = [
            [f"{value(arms[arm]):.3f}" if arm in arms else "\N{EN DASH}" for arm in ("image", "nearest", "place")]
            for value in STUDIED.values()
        ]
        rows.append([change, *map(" / ".join, found)])
    return table(["one change", *STUDIED], rows)


# What benchmarks.render shows between two marks, by kind.
KINDS: dict[str, Callable[[str], str]] = {kind.__name__: kind for kind in (results, differences, each_class, study)}
KINDS["search"] = partial(by_rate, heading="on val, (probe + k-NN) / 2", value=on_val, bold=True)
KINDS["search_stereo"] = partial(by_rate, heading=TASKS["stereo"][1], value=STUDIED["stereo"])  # it chose nothing
