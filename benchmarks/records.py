"""Result files: one JSON per suite and device, a case added as soon as it is measured, so that a run can be cut off.

{"suite": "loss", "runs": [{"command": ..., "environment": {...}}],
 "cases": [{"run": 0, "shape": {...}, "rows": {contestant: {...}}}]}
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Row, environment

Shape = dict[str, Any]
OURS = "densecl_ops"
RESULTS = Path(__file__).with_name("results")


class Suite(NamedTuple):
    """One benchmark."""

    name: str  # of the result file
    title: str  # of a case, a format of its shape's keys
    shapes: Callable[[argparse.Namespace], Iterable[Shape]]  # the cases to measure, most wanted first
    measure: Callable[[Shape, argparse.Namespace], dict[str, Row]]  # one case, as a row per contestant
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None  # beyond the shared ones

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")
        parser.add_argument("--toy", action="store_true", help="tiny shapes: does it run at all?")
        parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--seconds", type=float, default=8, help="aimed at per case (default: %(default)s)")
        parser.add_argument("--limit", type=float, default=540, help="start no case after so many seconds")
        parser.add_argument("--again", action="store_true", help="measure cases that the file holds already")
        parser.add_argument("--busy", type=int, default=0, metavar="N", help="beside N processes that compute")
        self.add_options(parser)

    def main(self, arguments: argparse.Namespace) -> None:
        """Measures every shape the file does not hold yet."""
        path = arguments.out / f"{self.name}{f'-busy{arguments.busy}' if arguments.busy else ''}.json"
        record: dict[str, Any] = {"suite": self.name, "runs": [], "cases": []}
        if path.exists():
            record = json.loads(path.read_text())
        done = [] if arguments.again else [case["shape"] for case in record["cases"]]
        began = time.perf_counter()
        run = {"command": arguments.command, "environment": environment()}
        print(", ".join(f"{key} {value}" for key, value in run["environment"].items() if value))
        with busy(arguments.busy):
            for shape in self.shapes(arguments):
                if shape in done:
                    continue
                if time.perf_counter() - began > arguments.limit:
                    print("--limit: the same command goes on with the cases that are left")
                    break
                rows = self.measure(shape, arguments)
                for row in rows.values():
                    if "milliseconds" in row and "milliseconds" in rows.get(OURS, {}):
                        row["ratio"] = round(row["milliseconds"][1] / rows[OURS]["milliseconds"][1], 3)
                print_rows(self.title.format(**shape), rows)
                if run not in record["runs"]:
                    record["runs"].append(run)
                case = {"run": record["runs"].index(run), "shape": shape, "rows": rows}
                record["cases"] = [old for old in record["cases"] if old["shape"] != shape] + [case]
                write(path, record)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute, as data loaders do beside a training."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


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


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    heads = list(heads)
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def print_rows(title: str, rows: dict[str, Row]) -> None:
    """All that was measured, a contestant per row."""
    heads = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [[name, *(str(row.get(key, "")) for key in heads)] for name, row in rows.items()]
    print(f"\n{title}\n{table(['', *heads], lines)}")
