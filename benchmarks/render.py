"""Writes the tables of README.md from the committed result files; a test checks that they still agree."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "materialise": "materialised, as MoCo and DenseCL write it",
    "chunked": "the same in chunks of 256 rows, recomputed in backward",
    "attention": "hand-written around torch's flash attention, K = V = queue",
    "blockwise": "**densecl_ops**",
    "blockwise+rank": "**densecl_ops**, with the rank of every positive",
}


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return record


def cpu_cost() -> str:
    """Loss on the CPU: one table, float32 and bfloat16 side by side."""
    records = [load(f"cpu_loss_{dtype}.json") for dtype in ("float32", "bfloat16")]
    shape, environment = records[0]["shape"], records[0]["environment"]
    lines = [
        f"Loss forward + backward on a CPU ({environment['device']}, torch {environment['torch']}) at "
        f"N = {shape['n']:,} (32 images, 7 x 7), K = {shape['k']:,}, D = {shape['d']}; times relative to the "
        f"materialised form in the same interleaved run ({records[0]['rows']['materialise']['milliseconds'][1]:,.0f} "
        f"and {records[1]['rows']['materialise']['milliseconds'][1]:,.0f} ms):",
        "",
        "| | float32: time | extra memory | bfloat16: time | extra memory |",
        "|---|---|---|---|---|",
    ]
    for key, name in NAMES.items():
        cells = []
        for record in records:
            row = record["rows"][key]
            cells += [f"{row['ratio_to_materialise']:.2f}", f"{row['peak_extra_mib']:,.0f} MiB"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    row, floor = records[0]["rows"]["blockwise"], records[0]["rows"]["floor"]
    times = row["milliseconds"][1] / floor["milliseconds"][1]
    lines += [
        "",
        "The arithmetic alone (both matrix products and one exp, tile by tile) takes "
        f"{floor['ratio_to_materialise']:.2f} in float32, so the loss runs at {times:.2f} times that floor. Its "
        "gradient is off the float64 one by "
        f"{row['error_gradient']:.0e} (relative), the materialised form's by "
        f"{records[0]['rows']['materialise']['error_gradient']:.0e}.",
    ]
    return "\n".join(lines)


def demo() -> str:
    """The paper's claim on measured ground truth, over all committed seeds."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / "demo_cpu").glob("seed*.json"))]
    rows = list(records[0]["rows"])
    lines = [
        f"`make demo` settings with `--compare`, seeds {', '.join(str(r['settings']['seed']) for r in records)}: cells "
        "of a stereo pair matched within 1.5 cells of the measured disparity, and the median error in cells. Mean over "
        "the seeds ± standard deviation; the pair is not trained on.",
        "",
        "| features | within 1.5 cells | median error | per seed |",
        "|---|---|---|---|",
    ]
    for name in rows:
        close = [record["rows"][name]["close"] for record in records]
        median = [record["rows"][name]["median"] for record in records]
        each = ", ".join(f"{value:.3f}" for value in close)
        lines.append(f"| {name} | {_mean(close, 3)} | {_mean(median, 2)} | {each} |")
    return "\n".join(lines)


def _mean(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


SECTIONS: dict[str, Callable[[], str]] = {"cpu-cost": cpu_cost, "demo": demo}


def rendered(text: str) -> str:
    """`text` with every section between its two markers written anew."""
    for name, write in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{write()}\n{end}{after}"
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__


def main(arguments: argparse.Namespace) -> None:
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text()))
