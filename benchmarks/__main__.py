"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks import curves, host, kernels, loss, matching, queue, regions, render, step
from benchmarks.transfer import suite as transfer

# A module has a SUITE, or it measures or writes something of its own kind: add_arguments(parser), main(arguments).
MODULES: tuple[Any, ...] = (loss, matching, queue, step, host, regions, kernels, transfer, curves, render)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(required=True)
    for module in MODULES:
        name, text = module.__name__.split(".")[1], module.__doc__.split("\n\n")[0]
        command = module if hasattr(module, "main") else module.SUITE
        own = names.add_parser(name, help=text, description=module.__doc__, allow_abbrev=False)
        own.formatter_class = argparse.RawDescriptionHelpFormatter
        own.set_defaults(run=command.main)
        command.add_arguments(own)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    # A record says how it was made, but not where: no path of the machine.
    words = [word for before, word in zip(["", *argv], argv, strict=False) if "--out" not in (before, word)]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    arguments.command = shlex.join(["python", "-m", "benchmarks", *words])
    arguments.run(arguments)


if __name__ == "__main__":
    main()
