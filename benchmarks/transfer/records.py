"""One JSON file per finished run; a run whose file is there is never run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.transfer.pretraining import Setting

TASKS = {  # of the test split: key, value in the record, heading
    "probe": ("miou", "linear probe, mIoU"),
    "knn": ("miou", "k-NN, mIoU"),
    "propagation": ("miou", "label propagation, mIoU"),
    "stereo": ("close", "stereo, within 1.5 cells"),
}
Record = dict[str, Any]


def path_of(folder: Path, setting: Setting) -> Path:
    return folder / f"{setting.name}.json"


def load(folder: Path) -> list[Record]:
    """The records of all runs in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]


def chosen_rate(searched: list[Record], arm: str) -> float:
    """The learning rate with the best mean of probe and k-NN on val; arms that were not searched take nearest's."""
    arms = {record["setting"]["arm"] for record in searched}
    own = [record for record in searched if record["setting"]["arm"] == (arm if arm in arms else "nearest")]
    best = max(own, key=on_val)
    return float(best["setting"]["rate"])


def on_val(record: Record) -> float:
    """What the search maximises."""
    return float(record["val.probe"]["miou"] + record["val.knn"]["miou"]) / 2
