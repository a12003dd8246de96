"""Writes the tables of README.md and docs/performance.md, and the plots, from the committed result files alone."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "materialise": "materialised, as MoCo and DenseCL write it",
    "materialise, autocast": "the same under autocast",
    "torch.compile": "torch.compile of it",
    "torch.compile, auto-chunk": "torch.compile with inductor's auto-chunker",
    "chunked": "in chunks of 256 rows, recomputed in backward",
    "linear_cross_entropy": "`F.linear_cross_entropy`",
    "linear_cross_entropy, chunks": "`F.linear_cross_entropy`, its default chunks",
    "attention, flash": "hand-written around torch's flash attention, K = V = queue",
    "eager": '`backend="eager"`, the textbook formula',
    "densecl_ops": "**densecl_ops**",
    "densecl_ops, with rank": "**densecl_ops**, with the rank of every positive",
}
README_NAMES = ("materialise", "torch.compile", "chunked", "attention, flash", "densecl_ops", "densecl_ops, with rank")


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return record


def loss_case(dtype: str, mode: str) -> dict[str, Any]:
    """The headline case of the CPU record."""
    wanted = {"n": 1568, "k": 65536, "d": 128, "dtype": dtype, "mode": mode, "cache": "warm"}
    found: dict[str, Any] = next(case for case in load("cpu/loss.json")["cases"] if case["shape"] == wanted)
    return found


def table(names: Iterable[str], records: list[dict[str, Any]], header: str) -> list[str]:
    """Time as a multiple of the materialised form's in the same interleaved run, and extra memory."""
    lines = [header, "|---" * (1 + 2 * len(records)) + "|"]
    for key in names:
        cells = []
        for record in records:
            row, base = record["rows"].get(key), record["rows"]["materialise"]["milliseconds"][1]
            if row is None or "failed" in row:
                cells += ["" if row is None else "failed", ""]
            else:
                cells += [f"{row['milliseconds'][1] / base:.2f}", f"{row['peak_extra_mib']:,.0f} MiB"]
        lines.append(f"| {NAMES[key]} | " + " | ".join(cells) + " |")
    return lines


def cpu_cost() -> str:
    """Loss on the CPU: one table, float32 and bfloat16 side by side."""
    cases = [loss_case(dtype, "train") for dtype in ("float32", "bfloat16")]
    environment = load("cpu/loss.json")["runs"][cases[0]["run"]]["environment"]
    first, second = (case["rows"]["materialise"]["milliseconds"][1] for case in cases)
    ours, floor = (cases[0]["rows"][name] for name in ("densecl_ops", "arithmetic"))
    return "\n".join(
        [
            f"Loss forward + backward on a CPU ({environment['device']}, torch {environment['torch']}) at N = 1,568 "
            "(32 images, 7 x 7), K = 65,536, D = 128; times relative to the materialised form in the same interleaved "
            f"run ({first:,.0f} and {second:,.0f} ms):",
            "",
            *table(README_NAMES, cases, "| | float32: time | extra memory | bfloat16: time | extra memory |"),
            "",
            "The arithmetic alone (both matrix products and one exp, tile by tile) takes "
            f"{floor['milliseconds'][1] / first:.2f} in float32, so the loss runs at "
            f"{ours['milliseconds'][1] / floor['milliseconds'][1]:.2f} times that floor. Its gradient is off the "
            f"float64 one by {ours['error_gradient']:.0e} (relative), the materialised form's by "
            f"{cases[0]['rows']['materialise']['error_gradient']:.0e}.",
        ]
    )


def cpu_loss() -> str:
    """All rivals, both modes."""
    lines = []
    for mode, title in (("train", "Forward + backward"), ("forward", "Forward alone, under no_grad")):
        cases = [loss_case(dtype, mode) for dtype in ("float32", "bfloat16")]
        lines += [f"{title}:", ""]
        lines += table(NAMES, cases, "| | float32: time | extra memory | bfloat16: time | extra memory |")
        lines += [""]
    return "\n".join(lines[:-1])


GRID_NAMES = {
    "materialise": "materialised",
    "materialise, autocast": "autocast",
    "torch.compile": "compiled",
    "torch.compile, auto-chunk": "auto-chunk",
    "chunked": "chunks",
    "linear_cross_entropy": "linear CE",
    "linear_cross_entropy, chunks": "linear CE, chunks",
    "attention, flash": "flash",
    "attention, flex": "flex",
    "eager": "eager",
}


def cpu_grid() -> str:
    """Every case of the loss suite: ours in milliseconds, all others as multiples of it."""
    record = load("cpu/loss.json")
    lines = []
    for mode, title in (("train", "Forward + backward"), ("forward", "Forward alone, under no_grad")):
        lines += [f"{title}:", "", "| N, K, D, dtype | ours | extra memory | " + " | ".join(GRID_NAMES.values()) + " |"]
        lines += ["|---" * (len(GRID_NAMES) + 3) + "|"]
        cases = [case for case in record["cases"] if case["shape"]["mode"] == mode]
        for case in sorted(cases, key=lambda c: [c["shape"][key] for key in ("dtype", "d", "k", "n")]):
            rows = case["rows"]
            ours = rows["densecl_ops"]
            cells = [_multiple(rows.get(name)) for name in GRID_NAMES]
            start = "{n:,}, {k:,}, {d}, {dtype}".format(**case["shape"])
            time, memory = f"{ours['milliseconds'][1]:,.1f} ms", f"{ours['peak_extra_mib']:,.0f} MiB"
            lines.append(f"| {start} | {time} | {memory} | " + " | ".join(cells) + " |")
        lines += [""]
    return "\n".join(lines[:-1])


def _multiple(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "ratio" in row:
        return f"{row['ratio']:.2f}"
    reason = str(row.get("failed", "")).lower()
    return "no memory" if "memory" in reason or "gib" in reason else "cannot"


def cpu_others() -> str:
    """Matching, queue and step: medians as multiples of ours."""
    lines = []
    for suite, title in (
        ("matching", "{b} x {c} x {grid} x {grid}, {dtype}, {layout}"),
        ("queue", "{n:,} keys into {k:,} x {d}"),
        ("step", "{backbone}'s encoder, batch {batch}, {pixels} px, K = {k:,}"),
    ):
        cases = load(f"cpu/{suite}.json")["cases"]
        names = [name for name in cases[0]["rows"] if name != "densecl_ops"]
        lines += [f"| {suite}: ms, then times ours | densecl_ops | " + " | ".join(names) + " |"]
        lines += ["|---" * (len(names) + 2) + "|"]
        for case in cases:
            rows = case["rows"]
            cells = [f"{rows[name]['ratio']:.2f}" if "ratio" in rows[name] else "failed" for name in names]
            ours = f"{rows['densecl_ops']['milliseconds'][1]:,.2f} ms"
            lines.append(f"| {title.format(**case['shape'])} | {ours} | " + " | ".join(cells) + " |")
        lines += [""]
    return "\n".join(lines[:-1])


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


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"cpu-cost": cpu_cost, "demo": demo},
    "docs/performance.md": {"cpu-loss": cpu_loss, "cpu-grid": cpu_grid, "cpu-others": cpu_others},
}


def rendered(page: str) -> str:
    """The page with every section between its two markers written anew."""
    text = (ROOT / page).read_text()
    for name, write in SECTIONS[page].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{write()}\n{end}{after}"
    return text


def plots() -> Iterator[tuple[Path, Path, str]]:
    """Result file, picture and dtype of every plot there should be."""
    for source in sorted(RESULTS.glob("*/loss.json")):
        dtypes = {case["shape"]["dtype"] for case in json.loads(source.read_text())["cases"]}
        for dtype in sorted(dtypes):
            yield source, ROOT / "docs" / "images" / f"loss-{source.parent.name}-{dtype}.png", dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__


def main(arguments: argparse.Namespace) -> None:
    for page in SECTIONS:
        (ROOT / page).write_text(rendered(page))
    from benchmarks.plots import draw, save  # the other suites do without matplotlib

    for source, target, dtype in plots():
        save(draw(json.loads(source.read_text()), dtype), source, target)
