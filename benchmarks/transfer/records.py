"""One JSON file per finished run; a run whose file is there is never run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def load(folder: Path) -> list[Record]:
    """The records of all runs in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]


def on_val(record: Record) -> float:
    """What the search maximises."""
    return float(record["val.probe"]["miou"] + record["val.knn"]["miou"]) / 2


def chosen_rate(searched: list[Record], arm: str) -> float:
    """The learning rate with the best mean of probe and k-NN on val; arms that were not searched take nearest's."""
    arms = {record["setting"]["arm"] for record in searched}
    own = [record for record in searched if record["setting"]["arm"] == (arm if arm in arms else "nearest")]
    if not own:
        raise SystemExit(f"no search of {arm} and none of nearest: give --rates, or run --part search")
    return float(max(own, key=on_val)["setting"]["rate"])
