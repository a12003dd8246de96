"""Result files: one JSON per suite and device, a case added as soon as it is measured, so that a run can be cut off.

{
 "suite": "loss",
 "runs": [
  {"command": ..., "environment": {...}, "rates": {...}}
 ],
 "cases": [
  {"run": 0, "shape": {...}, "clocks": [before, after], "rows": {contestant: {...}}}
 ]
}
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Row, clocks, environment, rates

Shape = dict[str, Any]
OURS = "densecl_ops"
RESULTS = Path(__file__).with_name("results")


class Suite(NamedTuple):
    """One benchmark.

    Attributes:
        name: Of the result file.
        shapes: The cases to measure, most wanted first.
        measure: One case, as a row per contestant.
        show: Prints the rows; may add columns that need the machine's own rates.
        add_options: Options beyond the shared ones.
    """

    name: str
    shapes: Callable[[argparse.Namespace], Iterable[Shape]]
    measure: Callable[[Shape, argparse.Namespace], dict[str, Row]]
    show: Callable[[Shape, dict[str, Row], dict[str, float]], None]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_out(parser)
        parser.add_argument("--toy", action="store_true", help="tiny shapes: does it run at all?")
        parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--seconds", type=float, default=8, help="aimed at per case (default: %(default)s)")
        parser.add_argument("--limit", type=float, default=540, help="start no case after so many seconds")
        parser.add_argument("--again", action="store_true", help="measure cases that the file holds already")
        self.add_options(parser)

    def main(self, arguments: argparse.Namespace) -> None:
        """Measures every shape the file does not hold yet."""
        path = arguments.out / f"{self.name}.json"
        record: dict[str, Any] = {"suite": self.name, "runs": [], "cases": []}
        if path.exists():
            record = json.loads(path.read_text())
        done = [case["shape"] for case in record["cases"]]
        began = time.perf_counter()
        run = {
            "command": arguments.command,
            "environment": environment(),
            "rates": rates(arguments.device, arguments.toy),
        }
        print(", ".join(f"{key} {value}" for key, value in {**run["environment"], **run["rates"]}.items() if value))
        left = 0
        for shape in self.shapes(arguments):
            if shape in done and not arguments.again:
                continue
            if time.perf_counter() - began > arguments.limit:
                left += 1
                continue
            before = clocks(arguments.device)
            rows = self.measure(shape, arguments)
            add_ratios(rows)
            if run not in record["runs"]:
                record["runs"].append(run)
            record["cases"] = [case for case in record["cases"] if case["shape"] != shape]
            case = {"run": record["runs"].index(run), "shape": shape, "clocks": [before, clocks(arguments.device)]}
            record["cases"].append(case | {"rows": rows})
            self.show(shape, rows, run["rates"])
            write(path, record)
        if left:
            print(f"{left} cases left by --limit; the same command goes on with them")
        print(f"{path.name}: {time.perf_counter() - began:.0f} s")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")


def dumps(record: Any, level: int = 0) -> str:
    """JSON with one line per case: a list of objects has one line for each, an object one per key down to level 2."""
    if isinstance(record, dict) and level < 2:
        brackets, lines = "{}", [f"{json.dumps(key)}: {dumps(value, level + 1)}" for key, value in record.items()]
    elif isinstance(record, list) and any(isinstance(item, dict) for item in record):
        brackets, lines = "[]", [json.dumps(item) for item in record]
    else:
        return json.dumps(record)
    margin = "\n" + " " * level
    return f"{brackets[0]}{margin} {f',{margin} '.join(lines)}{margin}{brackets[1]}"


def write(path: Path, record: Any) -> None:
    """In one step, so that whoever is cut off leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(dumps(record) + "\n")
    part.replace(path)


def add_ratios(rows: dict[str, Row]) -> None:
    """How many times our time a contestant takes, in this interleaved run."""
    if "milliseconds" in rows.get(OURS, {}):
        ours = rows[OURS]["milliseconds"][1]
        for row in rows.values():
            if "milliseconds" in row:
                row["ratio"] = round(row["milliseconds"][1] / ours, 3)


def validate(record: dict[str, Any]) -> None:
    """Raises ValueError at the first thing that a reader of the file would stumble over."""

    def need(holds: bool, message: object) -> None:
        if not holds:
            raise ValueError(message)

    need(record.keys() == {"suite", "runs", "cases"}, sorted(record))
    for run in record["runs"]:
        need(run.keys() == {"command", "environment", "rates"}, sorted(run))
        named = [key for key in ("device", "python", "torch", "commit", "system") if not run["environment"].get(key)]
        need(not named, f"environment: {named} not filled")
    shapes = [case["shape"] for case in record["cases"]]
    for index, case in enumerate(record["cases"]):
        need(0 <= case["run"] < len(record["runs"]), f"run: got {case['run']} of {len(record['runs'])}")
        need(case["shape"] not in shapes[:index], f"shape: {case['shape']} twice")
        for name, row in case["rows"].items():
            where = f"{case['shape']}, {name}"
            if "failed" in row:
                need(row["failed"] != "", f"{where}: failed without a reason")
                continue
            low, middle, high = row["milliseconds"]
            need(0 < low <= middle <= high, f"{where}: milliseconds {row['milliseconds']}")
            need(row["rounds"] >= 3 or (row["rounds"] == 1 and low == high), f"{where}: {row['rounds']} rounds")
            errors = [value for key, value in row.items() if key.startswith("error_")]
            need(all(0 <= error < 1 for error in errors), f"{where}: errors {errors}")


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    heads = list(heads)
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def print_rows(title: str, rows: dict[str, Row], columns: dict[str, str]) -> None:
    """One table: time, ratio, memory, then `columns` (key of a row: heading)."""
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, row["failed"]])
            continue
        low, middle, high = row["milliseconds"]
        times = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{row.get('ratio', float('nan')):.2f}"]
        peak = "?" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:,.1f}"
        lines.append([name, *times, peak, *(f"{row[key]:.3g}" if key in row else "" for key in columns)])
    print(f"\n{title}\n{table(['', 'ms', 'quartiles', 'ratio', 'peak MiB', *columns.values()], lines)}")
