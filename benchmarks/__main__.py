"""Command line of the benchmarks."""

from __future__ import annotations

import argparse

from benchmarks import loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    loss.add_arguments(suites.add_parser("loss", help="the loss, forward and backward, against its rivals"))
    loss.main(parser.parse_args())


if __name__ == "__main__":
    main()
