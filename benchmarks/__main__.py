"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import shlex
import sys

from benchmarks import kernels, loss, matching, queue, render, step, tune
from benchmarks.transfer import suite as transfer

SUITES = {
    "loss": (loss, "the loss against its rivals: time, memory, error"),
    "matching": (matching, "feature matching against its rivals"),
    "queue": (queue, "enqueueing against slice and clone"),
    "step": (step, "a whole MoCo-v2 step, without and with the dense term"),
    "transfer": (transfer, "does the dense term help? pre-training, then four dense tasks"),
    "kernels": (kernels, "compile every Triton kernel for GPUs that are not here"),
    "tune": (tune, "time other tile shapes for a Triton kernel on this GPU"),
    "render": (render, "write the tables of README.md and docs/performance.md from the result files"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    for name, (module, text) in SUITES.items():
        module.add_arguments(suites.add_parser(name, help=text))
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["python", "-m", "benchmarks", *argv])
    SUITES[arguments.suite][0].main(arguments)


if __name__ == "__main__":
    main()
