"""Writes the tables of README.md and docs/, and the plots, from the committed result files alone.

A table stands between `<!-- FOLDER-KIND:begin -->` and `<!-- FOLDER-KIND:end -->`: which results, and how they are
shown. So the records of another machine are shown by two marks and nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import matching, queue, step
from benchmarks.curves import RUNS
from benchmarks.loss import HEADLINE, HEADLINE_CPU, PLAIN
from benchmarks.records import OURS, RESULTS, spread, table
from benchmarks.transfer import page as transfer

ROOT = Path(__file__).parent.parent
NAMES = {  # contestant: (in a row of its own, at the head of a column)
    "materialise": ("materialised, as MoCo and DenseCL write it", "materialised"),
    "materialise, autocast": ("the same under autocast", "autocast"),
    "torch.compile": ("torch.compile of it", "compiled"),
    "torch.compile, auto-chunk": ("torch.compile with inductor's auto-chunker", "auto-chunk"),
    "chunked": ("in chunks of 256 rows, recomputed in backward", "chunks"),
    "linear_cross_entropy": ("`F.linear_cross_entropy`", "linear CE"),
    "linear_cross_entropy, chunks": ("`F.linear_cross_entropy`, its default chunks", "linear CE, chunks"),
    "attention, flash": ("hand-written around torch's flash attention, K = V = queue", "flash"),
    "attention, cuDNN": ("the same around cuDNN's attention", "cuDNN"),
    "attention, flex": ("the same around flex attention", "flex"),
    "eager": ('`backend="eager"`, the textbook formula', "eager"),
    "blockwise": ('`backend="blockwise"`, without a kernel', "blockwise"),
    OURS: ("**densecl_ops**", ""),
    PLAIN: ("**densecl_ops**, with negatives in a plain tensor", "plain tensor"),
    f"{OURS}, with rank": ("**densecl_ops**, with the rank of every positive", "with rank"),
}
README_NAMES = ("materialise", "torch.compile", "chunked", "attention, flash", OURS, f"{OURS}, with rank")
MODES = {"train": "Forward + backward", "forward": "Forward alone, under no_grad"}


Case = dict[str, Any]


def load(folder: str, suite: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / folder / f"{suite}.json").read_text()))


def median(case: Case, name: str) -> float:
    return float(case["rows"][name]["milliseconds"][1])


def headline(folder: str, mode: str) -> list[Case]:
    """The cases that the loss suite measures first, in float32 and bfloat16."""
    record = load(folder, "loss")
    shape = HEADLINE_CPU if record["runs"][0]["environment"]["gpu"] is None else HEADLINE
    wanted = [{**shape, "dtype": dtype, "mode": mode, "cache": "warm"} for dtype in ("float32", "bfloat16")]
    return [next(case for case in record["cases"] if case["shape"] == one) for one in wanted]


def served(cases: Iterable[Case]) -> list[str]:
    """The contestants that could serve one of the cases."""
    return [name for name in NAMES if any("ratio" in case["rows"].get(name, {}) for case in cases)]


def loss_table(names: Iterable[str], cases: list[Case]) -> str:
    """Time as a multiple of the materialised form's in the same interleaved run, and extra memory."""

    def cells(case: Case, name: str) -> list[str]:
        row = case["rows"].get(name)
        if row is None or "failed" in row:
            return ["" if row is None else "failed", ""]
        return [f"{median(case, name) / median(case, 'materialise'):.2f}", f"{row['peak_extra_mib']:,.0f} MiB"]

    lines = [[NAMES[name][0], *(cell for case in cases for cell in cells(case, name))] for name in names]
    return table(["", "float32: time", "extra memory", "bfloat16: time", "extra memory"], lines)


def cost(folder: str) -> str:
    """The loss in training: one table, float32 and bfloat16 side by side."""
    cases = headline(folder, "train")
    environment = load(folder, "loss")["runs"][cases[0]["run"]]["environment"]
    machine = f"a GPU ({environment['gpu']}" if environment["gpu"] else f"a CPU ({environment['device']}"
    shape, rows = cases[0]["shape"], cases[0]["rows"]
    times = [median(case, "materialise") for case in cases]
    text = (
        f"Loss forward + backward on {machine}, torch {environment['torch']}) at N = {shape['n']:,} "
        f"({shape['n'] // 49} images, 7 x 7), K = {shape['k']:,}, D = {shape['d']}; times relative to the materialised "
        f"form in the same interleaved run ({' and '.join(map(_ms, times))}):\n\n{loss_table(README_NAMES, cases)}\n\n"
        f"In float32 the gradient is off the float64 one by {rows[OURS]['error_gradient']:.0e} (relative), the "
        f"materialised form's by {rows['materialise']['error_gradient']:.0e}."
    )
    if "arithmetic" in rows:
        floor = median(cases[0], "arithmetic")
        text += (
            f" The arithmetic alone (both products and one exponential, all rows at once, in torch operations) takes "
            f"{floor / times[0]:.2f}; the loss takes {median(cases[0], OURS) / floor:.2f} times as long."
        )
    return text


def loss(folder: str) -> str:
    """The headline case: all rivals, both modes."""
    both = {title: headline(folder, mode) for mode, title in MODES.items()}
    return "\n\n".join(f"{title}:\n\n{loss_table(served(cases), cases)}" for title, cases in both.items())


def grid(folder: str) -> str:
    """Every case of the loss suite."""
    every, parts = load(folder, "loss")["cases"], []
    names = [name for name in served(every) if not name.startswith(OURS)]
    for mode, title in MODES.items():
        cases = [case for case in every if case["shape"]["mode"] == mode]
        cases.sort(key=lambda case: [case["shape"][key] for key in ("dtype", "d", "k", "n", "cache")])
        heads = ["N, K, D, dtype", "ours", "extra memory", *(NAMES[name][1] for name in names)]
        lines = multiples(cases, "{n:,}, {k:,}, {d}, {dtype}", names)
        for line, case in zip(lines, cases, strict=True):
            line.insert(2, f"{case['rows'][OURS]['peak_extra_mib']:,.0f} MiB")
        parts.append(f"{title}:\n\n{table(heads, lines)}")
    return "\n\n".join(parts)


def quiet(folder: str, suite: str = "regions", cell: str = "{ms}") -> str:
    """Loss and matching on a CPU in milliseconds, then the cells where another form is faster."""
    record = load(folder, suite)
    environment = record["runs"][0]["environment"]
    parts = [
        f"{environment['device']}, instructions {' '.join(environment['instructions'])}, torch {environment['torch']}, "
        f"commit {environment['commit']}, load {environment['load']} before it began:"
    ]
    faster = []
    for operation, commas in ("loss, N x K, forward and backward", 1), ("matching", 3):
        lines = []
        for case in record["cases"]:
            size, dtype = case["shape"]["size"], case["shape"]["dtype"]
            if size.count(",") == commas:
                title = " x ".join(f"{int(number):,}" for number in size.split(",")) + f", {dtype}"
                cells = [cell.format(ms=_ms(row["milliseconds"][1]), **row) for row in case["rows"].values()]
                lines.append([title, *cells])
                rivals = {name: row["ratio"] for name, row in case["rows"].items() if not name.startswith(OURS)}
                faster += [f"{title}: {name} ({ratio:.2f})" for name, ratio in rivals.items() if ratio < 0.995]
                heads = [operation, *case["rows"]]
        parts.append(table(heads, lines))
    parts.append(f"Faster than ours, and its share of our time: {'; '.join(faster) or 'none'}.")
    return "\n\n".join(parts)


def others(folder: str) -> str:
    """Matching, queue and step."""
    parts = []
    for suite in (matching.SUITE, queue.SUITE, step.SUITE):
        cases = load(folder, suite.name)["cases"]
        names = [name for name in cases[0]["rows"] if name != OURS]
        parts.append(table([f"{suite.name}: ms, then times ours", OURS, *names], multiples(cases, suite.title, names)))
    return "\n\n".join(parts)


def exactness(folder: str) -> str:
    """Matching of bfloat16 maps: positions whose key scores lower than float64's, and the largest score lost."""
    cases = [case for case in load(folder, "matching")["cases"] if case["shape"]["dtype"] == "bfloat16"]
    lines = []
    for case in cases:
        title = "{maps}, {b} x {c} x {grid} x {grid}".format(**case["shape"])
        errors = ((row["error_index"], row["error_score"]) for row in case["rows"].values())
        lines.append([title, *(f"{index:.2%}, {score:.4f}" if index else "none" for index, score in errors)])
    return table(["bfloat16 maps of", *cases[0]["rows"]], lines)


def multiples(cases: list[Case], title: str, names: list[str]) -> list[list[str]]:
    """A row per case: ours in milliseconds, all others as multiples of it."""
    lines = []
    for case in cases:
        rows = [case["rows"].get(name, {}) for name in names]
        others = [f"{row['ratio']:.2f}" if "ratio" in row else "cannot" if row else "" for row in rows]
        cold = ", cold cache" if case["shape"].get("cache") == "cold" else ""
        lines.append([title.format(**case["shape"]) + cold, _ms(median(case, OURS)), *others])
    return lines


def _ms(value: float) -> str:
    """To three digits."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def demo(folder: str) -> str:
    """The paper's claim on measured ground truth, over all committed seeds."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("seed*.json"))]
    seeds = ", ".join(str(record["settings"]["seed"]) for record in records)
    lines = []
    for name in records[0]["rows"]:
        close, median = ([record["rows"][name][key] for record in records] for key in ("close", "median"))
        lines.append([name, spread(close, 3), spread(median, 2), ", ".join(f"{value:.3f}" for value in close)])
    return (
        f"`make demo` settings with `--compare`, seeds {seeds}: cells of a stereo pair matched within 1.5 cells of the "
        "measured disparity, and the median error in cells. Mean over the seeds ± standard deviation; the pair is not "
        f"trained on.\n\n{table(['features', 'within 1.5 cells', 'median error', 'per seed'], lines)}"
    )


def curves(folder: str, last: int = 20) -> str:
    """One row per run: first step, extreme and end (mean of the `last` steps), and matches on the stereo pair."""
    heads = ["run", "image term: start, end", "dense term: start, peak (step), end", "top-1: start, end", "top-5: end"]
    heads += ["match score: start, end", "mutual share: start, low (step), end", "stereo"]
    lines = []
    for name in RUNS:
        run = load(folder, name)
        history = run["history"]
        start = {key: f"{values[0]:.2f}" for key, values in history.items()}
        end = {key: f"{statistics.fmean(values[-last:]):.2f}" for key, values in history.items()}
        peak, low = max(history["dense_loss"]), min(history["mutual_share"])
        at_peak, at_low = history["dense_loss"].index(peak) + 1, history["mutual_share"].index(low) + 1
        image, top1, score = (f"{start[key]}, {end[key]}" for key in ("image_loss", "top1", "match_score"))
        dense = f"{start['dense_loss']}, {peak:.2f} ({at_peak}), {end['dense_loss']}"
        mutual = f"{start['mutual_share']}, {low:.2f} ({at_low}), {end['mutual_share']}"
        stereo = f"{run['matches']['close']:.2f}"
        lines.append([run["label"], image, dense, top1, end["top5"], score, mutual, stereo])
    return table(heads, lines)


def versions(folder: str) -> str:
    """What each version of Triton makes of the same kernels; targets of which it makes the same share a row."""
    records = {path.stem.removeprefix("triton_"): json.loads(path.read_text()) for path in (RESULTS / folder).iterdir()}
    made: dict[tuple[str, str], dict[str, str]] = {}
    for version in sorted(records):
        for row in records[version]:
            kernel = f"{row['kernel'].removesuffix('_kernel')}, {row['dtype']}, {row['variant']}"
            spilled = f" ({row['spills']} spilled)" if row["spills"] else ""
            cell = f"{row['registers']}{spilled}, {row['shared'] / 1024:.0f} KiB, {row['instructions']:,}"
            made.setdefault((kernel, row["target"]), {})[version] = cell
    lines: dict[tuple[str, ...], list[str]] = {}
    for (kernel, target), cells in made.items():
        lines.setdefault((kernel, *(cells.get(version, "") for version in sorted(records))), []).append(target)
    rows = sorted([kernel, ", ".join(targets), *cells] for (kernel, *cells), targets in lines.items())
    return table(["kernel", "target", *sorted(records)], rows)


def counts(suite: str) -> str:
    """What tests/ptx/count.py counted: now, and before where a record of that lies beside it and differs."""

    def read(when: str, target: str) -> dict[tuple[str, str], dict[str, Any]]:
        path = RESULTS / "counts" / f"{suite}{when}_{target}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        return {(row["case"], row["kernel"].removesuffix("_kernel")): row for row in rows}

    def megabytes(row: dict[str, Any]) -> str:
        return f"{row['bytes read'] / 1e6:.2f} MB, {row['bytes asked for'] / row['bytes read']:.0%}"

    def loop(row: dict[str, Any]) -> str:  # float32 has a loop over channels in it
        return f"{row['machine loop']:,}" if row.get("machine loop") and row["case"].startswith("bfloat16") else ""

    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "instructions, sm_80": lambda row: f"{row['instructions']:,}",
        "instructions, sm_90": lambda row: f"{row['instructions']:,}",
        "read, sm_90": megabytes,
        "wavefronts, sm_90": lambda row: f"x{row['wavefronts'] / max(1, row['without conflicts']):.2f}",
        "machine loop, sm_80": loop,
        "machine loop, sm_90": loop,
    }
    records = {head: (read("", head[-5:]), read("_before", head[-5:]), form) for head, form in shown.items()}
    lines = []
    for case, kernel in read("", "sm_90"):
        cells = []
        for now, before, form in records.values():
            row = now[case, kernel]
            cells.append(" → ".join(filter(None, dict.fromkeys((form(before.get((case, kernel), row)), form(row))))))
        lines.append([kernel, case, *cells])
    return table(["kernel", "case", *shown], lines)


OWN = (cost, loss, grid, quiet, others, exactness, demo, curves, versions, counts)
KINDS: dict[str, Callable[[str], str]] = {kind.__name__: kind for kind in OWN} | transfer.KINDS
# Beside two processes that compute, with the number of times that all threads are waited for.
KINDS["busy"] = partial(quiet, suite="regions-busy2", cell="{ms}, {regions}")
MARKED = re.compile(r"(<!-- ([\w-]+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def rendered(page: str) -> str:
    """The page with everything between two marks written anew."""

    def write(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        folder, _, kind = name.rpartition("-")
        return f"{begin}{KINDS[kind](folder or f'{kind}_cpu')}\n{end}"

    return MARKED.sub(write, (ROOT / page).read_text())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(arguments: argparse.Namespace) -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:  # of which some have marks
        path.write_text(rendered(path.relative_to(ROOT).as_posix()))
    from benchmarks.plots import save_all  # which needs matplotlib

    save_all(ROOT / "docs" / "images")
