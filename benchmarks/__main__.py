"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks import curves, host, kernels, loss, matching, queue, regions, render, step, tune
from benchmarks.transfer import suite as transfer

# Suites, and modules that measure or write something of their own kind: add_arguments(parser), main(arguments).
COMMANDS: dict[str, tuple[Any, str]] = {
    "loss": (loss.SUITE, "the loss against its rivals: time, memory, error"),
    "matching": (matching.SUITE, "feature matching against its rivals"),
    "queue": (queue.SUITE, "enqueueing against slice and clone"),
    "step": (step.SUITE, "a whole MoCo-v2 step, without and with the dense term"),
    "host": (host.SUITE, "host time and Python frames of small calls"),
    "regions": (regions, "how often a call on a CPU waits for all threads"),
    "tune": (tune.SUITE, "time other tile shapes for a Triton kernel on this GPU"),
    "kernels": (kernels, "compile every Triton kernel for GPUs that are not here"),
    "transfer": (transfer, "does the dense term help? pre-training, then four dense tasks"),
    "curves": (curves, "train the demo, healthy and broken, and record every step"),
    "render": (render, "write the tables of README.md and docs/, and the plots, from the result files"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name, (command, text) in COMMANDS.items():
        command.add_arguments(names.add_parser(name, help=text, description=text, allow_abbrev=False))
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    # A record says how it was made, but not where: no path of the machine.
    words = [word for before, word in zip(["", *argv], argv, strict=False) if "--out" not in (before, word)]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    arguments.command = shlex.join(["python", "-m", "benchmarks", *words])
    COMMANDS[arguments.name][0].main(arguments)


if __name__ == "__main__":
    main()
