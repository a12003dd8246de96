"""Does the dense term help? Pre-trains every arm on unlabelled photographs, and measures four dense tasks.

    python -m benchmarks transfer --camvid DIR/CamVid --photographs DIR/BSDS500/data/images

A search of the learning rate comes first (val split, a seed of its own), then the runs that are reported, seed by
seed. --study runs what decides the gain instead: the same setting with one choice changed at a time, on val. Every
finished run is a file in --out. The same command goes on where it was cut off, and started twice, at the same time, it
shares the work.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from benchmarks.transfer import data, records
from benchmarks.transfer.encoder import PLANS, at_stride
from benchmarks.transfer.pretraining import ARMS, IMAGE, NO_DENSE, RANDOM, Setting, pretrain
from benchmarks.transfer.tasks import STRIDE, measure
from benchmarks.transfer.views import Photographs


class Data:
    """Everything in memory; read when a run first needs it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.train, self.val, self.test = (
            data.load_split(arguments.camvid, split) for split in ("train", "val", "test")
        )
        photographs = [*data.load_photographs(arguments.photographs), *self.train.images]
        self.photographs = Photographs(photographs, arguments.device)
        self.picture = data.richest(self.test)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--camvid", type=Path, metavar="DIR", help="holds train, trainannot, val, valannot, ...")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="any folder of photographs")
    parser.add_argument("--pack", type=Path, metavar="ZIP", help="only write both data sets into this file")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures of docs/dense-tasks.md")
    parser.add_argument(
        "--study", action="store_true", help="one choice changed at a time, on val, instead of all this"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="records (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0, 1, 2], help="none: the search alone (default: 0 1 2)"
    )
    parser.add_argument("--steps", type=int, default=800, help="default: %(default)s")
    parser.add_argument("--search-arms", nargs="*", choices=ARMS, help="default: those of --arms that learn")
    parser.add_argument("--search-seed", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--search-steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[0.02, 0.06, 0.18, 0.54], help="searched; one: no search"
    )
    parser.add_argument("--encoder", choices=PLANS, default=Setting.encoder, help="default: %(default)s")
    for name, text in (
        ("view", "side of a view in pixels"),
        ("window", "side of the part of a photograph that two views share"),
        ("batch", "photographs per step"),
        ("queue", "K, negatives"),
        ("temperature", "of both terms, in the runs that are reported"),
    ):
        default = getattr(Setting, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    if arguments.draw:
        return draw(arguments.camvid)
    if arguments.camvid is None or arguments.photographs is None:
        raise SystemExit("expected --camvid and --photographs; docs/dense-tasks.md says where the data come from")
    if arguments.pack:
        return data.pack(arguments.camvid, arguments.photographs, arguments.pack)
    torch.backends.cudnn.benchmark = True
    where = environment()  # before hours of work may have changed what is checked out
    sources = Data(arguments)
    given = ("encoder", "view", "window", "batch", "queue")
    chosen = {name: getattr(arguments, name) for name in given}
    base = Setting(IMAGE, arguments.search_seed, 0.0, arguments.search_steps, **chosen)
    if arguments.study:
        study = [replace(base, seed=seed, **change) for seed in arguments.seeds for change in study_of(arguments)]
        return walk(study, arguments.out / "study", sources, where, arguments)
    searched = arguments.out / "search"
    if len(arguments.rates) > 1:
        searchers = [arm for arm in arguments.search_arms or arguments.arms if arm != RANDOM]
        search = [replace(base, arm=arm, rate=rate) for rate in arguments.rates for arm in searchers]
        walk(search, searched, sources, where, arguments)
    final = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            rate = arguments.rates[0]
            if arm == RANDOM:
                rate = 0.0
            elif len(arguments.rates) > 1:
                rate = records.chosen_rate(records.load(searched), arm)
            final.append(
                replace(base, arm=arm, seed=seed, rate=rate, steps=arguments.steps, temperature=arguments.temperature)
            )
    walk(final, arguments.out, sources, where, arguments)
    return None


def draw(camvid: Path | None) -> None:
    """The plot of the committed runs; the picture of segmentations only if CamVid is there."""
    from benchmarks.transfer import page, pictures  # the runs do without matplotlib

    reported, images = records.load(page.RESULTS / "transfer_cpu"), page.ROOT / "docs" / "images"
    pictures.save(pictures.draw_runs(reported), images / "transfer-runs.png")
    if camvid is not None:
        test = data.load_split(camvid, "test")
        figure = pictures.draw_segmentations(reported, test, data.richest(test))
        pictures.save(figure, images / "transfer-segmentations.png")


def study_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The setting of --steps and the first of --rates, then one change at a time, each for every arm it can change."""
    base = {"rate": arguments.rates[0], "steps": arguments.steps}
    changes = [
        {},
        {"steps": 3 * arguments.steps},
        {"view": arguments.view * 3 // 2, "window": arguments.window * 10 // 7},
        {"temperature": 0.1},
        {"dense_weight": 0.25},
        {"dense_weight": 0.75},
        {"temperature": 0.4},
        {"norm": "group"},
        {"dense_from": 0.0},
        {"dense_from": 0.3},
    ]
    return [
        {**base, "arm": arm, **change}
        for change in changes
        for arm in arguments.arms
        if arm not in NO_DENSE or not any(name.startswith("dense") for name in change)
    ]


def walk(
    settings: list[Setting], folder: Path, sources: Data, where: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """Runs what has no record yet; leaves what another process is at, and waits for it at the end."""
    for wait in (False, True):
        for setting in settings:
            scratch = arguments.out / "scratch"
            with records.claim(scratch / f"{folder.name}-{setting.name}.lock", wait) as mine:
                if mine and not records.path_of(folder, setting).exists():
                    run(setting, folder, scratch / f"{folder.name}-{setting.name}.pt", sources, where, arguments)


def run(
    setting: Setting,
    folder: Path,
    checkpoint: Path,
    sources: Data,
    where: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {folder.name} {setting.name}: {text}", flush=True)

    searching = folder.name in ("search", "study")
    say("begins")
    network, facts = pretrain(setting, sources.photographs, checkpoint, say)
    began = time.perf_counter()
    test = None if searching else sources.test
    frozen = at_stride(network, PLANS[setting.encoder], STRIDE)
    results = measure(frozen, sources.train, sources.val, test, sources.picture)
    facts["photographs"] = len(sources.photographs)
    facts["measured_seconds"] = round(time.perf_counter() - began, 1)
    command = {"command": arguments.command, "environment": where}
    records.write(folder, setting, command | {"pretraining": facts} | results)
    split = "val" if searching else "test"
    say(", ".join(f"{task} {next(iter(result.values()))}" for task, result in results[split].items()))
