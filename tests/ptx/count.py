"""What the kernels of one call cost, counted as the executor runs them: the tables of docs/kernels.md.

PTX_TARGET=90 PYTHONPATH=.:tests python -m ptx.count loss

N = 392 (8 images of 7 x 7), K = 4,096, D = 128. One line per launch goes to benchmarks/results/counts/; then
`python -m benchmarks render` writes the tables.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from ptx import executor
from torch.nn.functional import normalize

from benchmarks.records import RESULTS, table, write
from densecl_ops.functional import dense_correspondence, dense_info_nce

Calls = Iterator[tuple[str, Callable[[], object]]]
FORMS = {  # dtype, layout, whether the rows are known to be unit rows (no shift), whether a rank is asked for
    "bfloat16, no shift": (torch.bfloat16, torch.contiguous_format, True, False),
    "bfloat16, no shift, rank": (torch.bfloat16, torch.contiguous_format, True, True),
    "bfloat16, shift": (torch.bfloat16, torch.contiguous_format, False, False),
    "bfloat16, shift, rank": (torch.bfloat16, torch.contiguous_format, False, True),
    "bfloat16, channels_last": (torch.bfloat16, torch.channels_last, True, False),
    "float32, no shift": (torch.float32, torch.contiguous_format, True, False),
    "bfloat16, no shift, exclude": (torch.bfloat16, torch.contiguous_format, True, False),
    "bfloat16, shift, rank, exclude": (torch.bfloat16, torch.contiguous_format, False, True),
    "bfloat16, K = 65,536": (torch.bfloat16, torch.contiguous_format, True, False),
}


def loss() -> Calls:
    for name, (dtype, layout, unit, rank) in FORMS.items():
        torch.manual_seed(0)
        query, key = (torch.randn(8, 128, 7, 7).to(dtype, memory_format=layout) for _ in range(2))
        rows = normalize(torch.randn(65536 if "K" in name else 4096, 128), dim=1).to(dtype)
        queue = SimpleNamespace(rows=rows, count=torch.tensor(len(rows)), unit_rows=True) if unit else rows
        index = torch.randint(49, (8, 49))
        arguments = (query.requires_grad_(), key, queue, index)
        options = {"return_rank": rank, "exclude": torch.arange(8) if "exclude" in name else None}
        yield name, lambda a=arguments, o=options: dense_info_nce(*a, **o, backend="triton")


def matching() -> Calls:
    """One image; 2,048 channels as a ResNet-50 has, 512 for the larger maps."""
    for dtype in (torch.bfloat16, torch.float32):
        for side, channels in ((7, 2048), (8, 2048), (14, 512)):
            for layout in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(0)
                maps = torch.randn(2, 1, channels, side, side).to(dtype)
                maps = [x.contiguous(memory_format=layout) for x in maps]
                name = f"{side}x{side} {str(layout)[6:]} {str(dtype)[6:]}"
                yield name, lambda m=maps: dense_correspondence(*m, mutual=True, backend="triton")


SUITES = {"loss": loss, "matching": matching}


def machine_loop(sass: str) -> int:
    """Instructions of the first loop of the machine code that has the most products; 0 without products."""
    bodies = [found[2] for found in re.finditer(r"^(?=(\w+):\n(.*?BRA \1;))", sass, re.M | re.S)]
    return max(["", *bodies], key=lambda body: len(re.findall(r"HG?MMA", body))).count(";")


def counts(launch: executor.Launch) -> dict[str, Any]:
    """Of one launch; bytes are those of the sectors that the instructions touch, before any cache."""

    def total(column: str, *starts: str) -> int:
        rows = [i for i, name in enumerate(launch.program.names) if name.startswith(starts)]
        return int(launch.stats[rows, executor.STATS.index(column)].sum())

    read = ("ld.global", "cp.async.c")
    return {
        "kernel": launch.name,
        "warps": launch.warps * launch.grid[0] * launch.grid[1] * launch.grid[2],
        "instructions": total("count", ""),
        "products": total("count", "mma.", "wgmma.mma"),
        "barriers": total("count", "bar.sync"),
        "bytes read": 32 * total("sectors", *read),
        "bytes asked for": total("bytes", *read),
        "wavefronts": total("waves", ""),
        "without conflicts": total("ideal", ""),
        "machine loop": machine_loop(launch.compiled.asm["sass"]),
    }


def count(suite: str, only: str = "") -> list[dict[str, Any]]:
    """A row per launch of the cases with `only` in their name."""
    rows = []
    for name, call in SUITES[suite]():
        if only in name:
            executor.LAUNCHES.clear()
            call()
            rows += [{"case": name, **counts(x)} for x in executor.LAUNCHES]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", default="", help="print the cases with this in their name; writes nothing")
    arguments = parser.parse_args()
    with executor.installed():
        rows = count(arguments.suite, arguments.only)
    print(table(tuple(rows[0]), [[str(x) for x in row.values()] for row in rows]))
    if not arguments.only:
        write(RESULTS / "counts" / f"{arguments.suite}_sm_{executor.TARGET}.json", rows)


if __name__ == "__main__":
    main()
