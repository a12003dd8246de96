"""Writes the tables of docs/dense-tasks.md from the committed records alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.transfer.data import CLASSES
from benchmarks.transfer.pretraining import ARMS, IMAGE
from benchmarks.transfer.records import TASKS, Record, chosen_rate, load, on_val

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "random": "random weights",
    "image": "image term alone (MoCo-v2)",
    "nearest": "image + dense, nearest (DenseCL)",
    "mutual": "image + dense, mutual nearest",
    "place": "image + dense, same place",
}
# 0.975 quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def value(record: Record, task: str) -> float:
    return float(record[f"test.{task}"][TASKS[task][0]])


def by_seed(records: Iterable[Record], arm: str) -> dict[int, Record]:
    return {record["setting"]["seed"]: record for record in records if record["setting"]["arm"] == arm}


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def results(folder: str) -> str:
    """Mean over the seeds and standard deviation, an arm per row."""
    records = load(RESULTS / folder)
    lines = ["| | seeds | " + " | ".join(heading for _, heading in TASKS.values()) + " |"]
    lines += ["|---" * (len(TASKS) + 2) + "|"]
    for arm in ARMS:
        runs = by_seed(records, arm).values()
        if runs:
            cells = [spread([value(run, task) for run in runs]) for task in TASKS]
            lines.append(f"| {NAMES[arm]} | {len(runs)} | " + " | ".join(cells) + " |")
    unmoved = f"{records[0]['test.unmoved']['miou']:.3f}"
    lines.append("| no features: labels left where they were | | | | " + unmoved + " | |")
    return "\n".join(lines)


def differences(folder: str) -> str:
    """Each arm minus the image term of the same seed."""
    records = load(RESULTS / folder)
    base = by_seed(records, IMAGE)
    lines = ["| minus the image term of the same seed | " + " | ".join(heading for _, heading in TASKS.values()) + " |"]
    lines += ["|---" * (len(TASKS) + 1) + "|"]
    for arm in ARMS:
        runs = by_seed(records, arm)
        seeds = sorted(runs.keys() & base.keys())
        if arm == IMAGE or not seeds:
            continue
        cells = [paired([value(runs[s], task) - value(base[s], task) for s in seeds]) for task in TASKS]
        lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(values: list[float]) -> str:
    """Mean, 95 % interval by Student's t, and on how many seeds it is above 0."""
    mean, up = statistics.mean(values), sum(value > 0 for value in values)
    signs = f"{up} of {len(values)} up"
    if len(values) == 1:
        return f"{mean:+.3f}, {signs}"
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}, {signs}"


def each_run(folder: str) -> str:
    """Every run that is reported."""
    lines = ["| seed | arm | rate | " + " | ".join(heading for _, heading in TASKS.values()) + " |"]
    lines += ["|---" * (len(TASKS) + 3) + "|"]
    records = load(RESULTS / folder)
    for record in sorted(records, key=lambda r: (r["setting"]["seed"], ARMS.index(r["setting"]["arm"]))):
        setting = record["setting"]
        cells = [f"{value(record, task):.3f}" for task in TASKS]
        lines.append(f"| {setting['seed']} | {setting['arm']} | {setting['rate']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def each_class(folder: str) -> str:
    """IoU of k-NN retrieval per class, mean over the seeds."""
    records = load(RESULTS / folder)
    lines = ["| k-NN, IoU | " + " | ".join(CLASSES) + " |", "|---" * (len(CLASSES) + 1) + "|"]
    for arm in ARMS:
        runs = [record["test.knn"]["classes"] for record in by_seed(records, arm).values()]
        if runs:
            cells = [f"{statistics.mean(column):.2f}" for column in zip(*runs, strict=True)]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def search(folder: str) -> str:
    """Mean of probe and k-NN on val for every rate that was tried; the taken one in bold."""
    records = load(RESULTS / folder / "search")
    rates = sorted({record["setting"]["rate"] for record in records})
    lines = ["| on val, (probe + k-NN) / 2 | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |"]
    lines += ["|---" * (len(rates) + 1) + "|"]
    for arm in ARMS:
        found = {record["setting"]["rate"]: on_val(record) for record in records if record["setting"]["arm"] == arm}
        if found:
            taken = chosen_rate(records, arm)
            cells = [f"**{found[rate]:.3f}**" if rate == taken else f"{found[rate]:.3f}" for rate in rates]
            lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_rate(folder: str) -> str:
    """Stereo, which the search does not look at, at every rate that it tried."""
    runs = json.loads((RESULTS / folder / "by_rate.json").read_text())["runs"]
    rates = sorted({run["rate"] for run in runs})
    lines = ["| stereo, within 1.5 cells | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |"]
    lines += ["|---" * (len(rates) + 1) + "|"]
    for arm in ARMS:
        found = {run["rate"]: run["stereo"]["close"] for run in runs if run["arm"] == arm}
        if found:
            lines.append(f"| {NAMES[arm]} | " + " | ".join(f"{found[rate]:.3f}" for rate in rates) + " |")
    return "\n".join(lines)


# What benchmarks.render shows between two marks, by kind.
KINDS: dict[str, Callable[[str], str]] = {
    "results": results,
    "differences": differences,
    "each_run": each_run,
    "each_class": each_class,
    "search": search,
    "by_rate": by_rate,
}
