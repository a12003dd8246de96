"""Writes the tables of docs/dense-tasks.md from the committed records alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from benchmarks.records import RESULTS, table
from benchmarks.transfer.data import CLASSES
from benchmarks.transfer.pretraining import ARMS, BYOL, IMAGE
from benchmarks.transfer.records import TASKS, Record, chosen_rate, load, on_val

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


def value(record: Record, task: str) -> float:
    return float(record[f"test.{task}"][TASKS[task][0]])


def by_seed(records: Iterable[Record], arm: str) -> dict[int, Record]:
    return {record["setting"]["seed"]: record for record in records if record["setting"]["arm"] == arm}


def arms_of(records: Iterable[Record]) -> list[str]:
    found = {record["setting"]["arm"] for record in records}
    return [arm for arm in ARMS if arm in found]


def results(folder: str) -> str:
    """Mean over the seeds and standard deviation, an arm per row."""
    records, rows = load(RESULTS / folder), []
    for arm in arms_of(records):
        runs = by_seed(records, arm).values()
        each = [[value(run, task) for run in runs] for task in TASKS]
        cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in each]
        rows.append([NAMES[arm], str(len(runs)), *cells])
    unmoved = f"{records[0]['test.unmoved']['miou']:.3f}"
    rows.append(["no features: labels left where they were", "", "", "", unmoved, ""])
    return table(["", "seeds", *HEADINGS], rows)


def differences(folder: str) -> str:
    """Each arm minus the image term of the same seed and host."""
    records, rows = load(RESULTS / folder), []
    for arm in arms_of(records):
        if arm in (IMAGE, BYOL):
            continue
        base, runs = by_seed(records, BYOL if arm.startswith(BYOL) else IMAGE), by_seed(records, arm).items()
        cells = [paired([value(run, task) - value(base[seed], task) for seed, run in runs]) for task in TASKS]
        rows.append([NAMES[arm], *cells])
    return table(["minus the image term of the same seed", *HEADINGS], rows)


def paired(values: list[float]) -> str:
    """Mean, 95 % interval by Student's t, and on how many seeds it is above 0."""
    mean, up = statistics.mean(values), sum(value > 0 for value in values)
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}, {up} of {len(values)} up"


def each_run(folder: str) -> str:
    """Every run that is reported."""
    rows = []
    for record in sorted(load(RESULTS / folder), key=lambda r: (r["setting"]["seed"], ARMS.index(r["setting"]["arm"]))):
        setting = record["setting"]
        cells = [f"{value(record, task):.3f}" for task in TASKS]
        rows.append([str(setting["seed"]), setting["arm"], f"{setting['rate']:g}", *cells])
    return table(["seed", "arm", "rate", *HEADINGS], rows)


def each_class(folder: str) -> str:
    """IoU of k-NN retrieval per class, mean over the seeds."""
    records, rows = load(RESULTS / folder), []
    for arm in arms_of(records):
        runs = [record["test.knn"]["classes"] for record in by_seed(records, arm).values()]
        rows.append([arm, *(f"{statistics.mean(column):.2f}" for column in zip(*runs, strict=True))])
    return table(["k-NN, IoU", *CLASSES], rows)


def search(folder: str) -> str:
    """Mean of probe and k-NN on val for every rate that was tried; the taken one in bold."""
    return _by_rate(folder, "on val, (probe + k-NN) / 2", on_val, bold=True)


def search_stereo(folder: str) -> str:
    """Stereo of the same runs, by which nothing was chosen."""
    return _by_rate(folder, TASKS["stereo"][1], STUDIED["stereo"], bold=False)


def _by_rate(folder: str, heading: str, value: Callable[[Record], float], bold: bool) -> str:
    records, rows = load(RESULTS / folder / "search"), []
    rates = sorted({record["setting"]["rate"] for record in records})
    for arm in arms_of(records):
        found = {record["setting"]["rate"]: value(record) for record in records if record["setting"]["arm"] == arm}
        cells = {rate: f"{found[rate]:.3f}" if rate in found else "" for rate in rates}
        if bold:
            taken = chosen_rate(records, arm)
            cells[taken] = f"**{cells[taken]}**"
        rows.append([NAMES[arm], *cells.values()])
    return table([heading, *(f"rate {rate:g}" for rate in rates)], rows)


STUDIED: dict[str, Callable[[Record], float]] = {
    "(probe + k-NN) / 2": on_val,
    "label propagation": lambda record: float(record["val.propagation"]["miou"]),
    "stereo": lambda record: float(record["val.stereo"]["close"]),
}
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
        runs.setdefault(", ".join(changed), {})[setting["arm"]] = record
    rows = []
    for change in sorted(runs):
        cells = []
        for value in STUDIED.values():
            found = {arm: f"{value(record):.3f}" for arm, record in runs[change].items()}
            cells.append(" / ".join(found.get(arm, "") for arm in ("image", "nearest", "place")))
        rows.append([change or "none", *cells])
    return table(["one change", *STUDIED], rows)


# What benchmarks.render shows between two marks, by kind.
KINDS: dict[str, Callable[[str], str]] = {
    "results": results,
    "differences": differences,
    "each_run": each_run,
    "each_class": each_class,
    "search": search,
    "search_stereo": search_stereo,
    "study": study,
}
