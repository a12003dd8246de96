"""Does the dense term help? Pre-trains every arm on unlabelled photographs, and measures four dense tasks.

    python -m benchmarks transfer --camvid DIR/CamVid --photographs DIR/BSDS500/data/images

A search of the learning rate comes first (val split, a seed of its own), then the runs that are reported, seed by
seed. --study runs what decides the gain instead: the same setting with one choice changed at a time, on val. Every
finished run is a file in --out. The same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from benchmarks.records import write
from benchmarks.transfer import data, records
from benchmarks.transfer.encoder import WIDTHS
from benchmarks.transfer.pretraining import ARMS, DENSE, IMAGE, RANDOM, Setting, pretrain
from benchmarks.transfer.records import TASKS
from benchmarks.transfer.tasks import measure
from benchmarks.transfer.views import Photographs

SEARCH_SEED = 100  # which no reported run has
OPTIONS = {
    "view": "side of a view in pixels",
    "window": "side of the part of a photograph that two views share",
    "batch": "photographs per step",
    "queue": "K, negatives",
    "temperature": "of both terms, in the runs that are reported",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--camvid", type=Path, metavar="DIR", required=True, help="holds train, trainannot, val, ...")
    add("--photographs", type=Path, metavar="DIR", required=True, help="any folder of photographs")
    add("--study", action="store_true", help="one choice changed at a time, on val, instead")
    add("--out", type=Path, default=Path("runs/transfer"), help="records (default: %(default)s)")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--seeds", nargs="*", type=int, default=[0, 1, 2], help="none: the search alone (default: 0 1 2)")
    add("--steps", type=int, default=800, help="default: %(default)s")
    add("--search-steps", type=int, default=400, help="default: %(default)s")
    add("--rates", nargs="+", type=float, default=[0.02, 0.06, 0.18, 0.54], help="searched; one: no search")
    add("--encoder", choices=WIDTHS, default=Setting.encoder, help="default: %(default)s")
    for name, text in OPTIONS.items():
        default = getattr(Setting, name)
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    torch.backends.cudnn.benchmark = True
    runner = Runner(arguments)
    chosen = {name: getattr(arguments, name) for name in ("encoder", "view", "window", "batch", "queue")}
    base = Setting(IMAGE, SEARCH_SEED, arguments.rates[0], arguments.search_steps, **chosen)
    if arguments.study:
        for seed in arguments.seeds:
            for change in study_of(arguments):
                runner.run(replace(base, seed=seed, **change), "study")
        return
    searches = len(arguments.rates) > 1
    for rate in arguments.rates if searches else []:
        for arm in arguments.arms:
            if arm != RANDOM:
                runner.run(replace(base, arm=arm, rate=rate), "search")
    searched = records.load(arguments.out / "search")
    for seed in arguments.seeds:
        for arm in arguments.arms:
            rate = 0.0 if arm == RANDOM else records.chosen_rate(searched, arm) if searches else arguments.rates[0]
            final = replace(base, arm=arm, seed=seed, rate=rate, steps=arguments.steps)
            runner.run(replace(final, temperature=arguments.temperature))


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
        if arm in DENSE or not any(name.startswith("dense") for name in change)
    ]


class Runner:
    """Pre-trains and measures a setting that has no record yet; all data in memory."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.command = arguments.out, arguments.command
        self.environment = environment()  # before hours of work may have changed what is checked out
        self.train, self.val, self.test = (
            data.load_split(arguments.camvid, split) for split in ("train", "val", "test")
        )
        photographs = [*data.load_photographs(arguments.photographs), *self.train.images]
        self.photographs = Photographs(photographs, arguments.device)

    def run(self, setting: Setting, part: str = "") -> None:
        """In the folder `part` of --out; search and study never see the test split."""
        if records.path_of(self.out / part, setting).exists():
            return

        def say(text: str) -> None:
            print(f"{time.strftime('%H:%M:%S')} {part} {setting.name}: {text}", flush=True)

        say("begins")
        network, facts = pretrain(setting, self.photographs, say)
        began = time.perf_counter()
        results = measure(network.eval(), self.train, self.val, None if part else self.test)
        facts["photographs"] = len(self.photographs.images)
        facts["measured_seconds"] = round(time.perf_counter() - began, 1)
        how = {"command": self.command, "environment": self.environment, "pretraining": facts}
        write(records.path_of(self.out / part, setting), {"setting": asdict(setting)} | how | results)
        reported = {task: results[f"{'val' if part else 'test'}.{task}"][key] for task, (key, _) in TASKS.items()}
        say(", ".join(f"{task} {value}" for task, value in reported.items()))
