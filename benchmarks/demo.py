"""The table of README.md: the demo with and without the dense term, over several seeds."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.curves import TRAINER
from benchmarks.measure import commit
from benchmarks.records import add_out, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: 0 to 4")
    parser.add_argument("--options", default="", help="of the trainer, for all runs: '--steps 2'")


def main(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch, "result.json")
            command = [sys.executable, str(TRAINER), "--compare", "--out", scratch, "--json", str(result)]
            subprocess.run([*command, "--seed", str(seed), *arguments.options.split()], check=True)
            found = json.loads(result.read_text())
        write(arguments.out / "demo_cpu" / f"seed{seed}.json", found | {"commit": commit()})
