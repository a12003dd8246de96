"""Command line of the benchmarks."""

from __future__ import annotations

import argparse

from benchmarks import kernels, loss, render


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    loss.add_arguments(suites.add_parser("loss", help="the loss, forward and backward, against its rivals"))
    kernels.add_arguments(suites.add_parser("kernels", help="compile every Triton kernel for GPUs that are not here"))
    render.add_arguments(suites.add_parser("render", help="write the tables of README.md from the result files"))
    arguments = parser.parse_args()
    {"loss": loss.main, "kernels": kernels.main, "render": render.main}[arguments.suite](arguments)


if __name__ == "__main__":
    main()
