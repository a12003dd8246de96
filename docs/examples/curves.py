"""The curves of docs/training.md: trains the example in several ways, healthy and broken, and draws what it recorded.

    python docs/examples/curves.py --train            # all runs, about 10 minutes on 2 cores, then picture and table
    python docs/examples/curves.py --train same-view  # one of them
    python docs/examples/curves.py                    # picture and table alone, from the committed records

A run changes nothing in pretrain.py: the extra numbers come from two forward hooks.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import kornia
import matplotlib as mpl
import numpy as np
import pretrain
import skimage
import torch
from backbone import STRIDE
from matplotlib.figure import Figure
from PIL import Image
from stereo import evaluate, load_pair
from torch import Tensor
from views import TwoViews, load_photographs

import densecl_ops
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "curves_cpu"
PICTURE = ROOT / "docs" / "images" / "curves.png"
PAGE = ROOT / "docs" / "training.md"
MARKS = ("<!-- curves:begin -->", "<!-- curves:end -->")
LAST = 20  # steps that the table's "end" is the mean of


class EnqueuesFirst(pretrain.DenseCL):
    """Broken: a batch's keys go into the queues before the loss, so that each positive is a negative too."""

    def forward(self, images_q: Tensor, images_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features_q, query = self.encoder_q(images_q)
        with torch.no_grad():
            self.encoder_k.update_parameters(self.encoder_q)
            features_k, key = self.encoder_k(images_k)
        self.image_queue.enqueue(key.image)
        self.dense_queue.enqueue(key.pooled)
        image_loss = self.criterion(query.image, key.image, self.image_queue)
        match = self.match(features_q, features_k)
        dense_loss, rank = self.criterion(query.dense, key.dense, self.dense_queue, match, return_rank=True)
        return image_loss, dense_loss, contrastive_accuracy(rank)


class OneView(TwoViews):
    """Broken: both encoders see the same view."""

    def draw(self, batch: int, share: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        first, _ = super().draw(batch, share, device)
        return first, first


class Run(NamedTuple):
    """Options of pretrain.py, and what is broken beyond them."""

    label: str
    options: str = ""
    model: type[pretrain.DenseCL] = pretrain.DenseCL
    views: type[TwoViews] = TwoViews


HEALTHY = {
    "random": Run("random queue, warm-up"),
    "random-no-warmup": Run("random queue, no warm-up", "--lambda-warmup 0"),
    "empty": Run("empty queue, warm-up", "--queue-init empty"),
    "empty-no-warmup": Run("empty queue, no warm-up", "--queue-init empty --lambda-warmup 0"),
}
BROKEN = {
    "enqueue-first": Run("enqueue before the loss", "--steps 150", model=EnqueuesFirst),
    "same-view": Run("the same view twice", "--steps 150", views=OneView),
    "high-lr": Run("learning rate 50 times too high", "--steps 150 --lr 1"),
}


def watch(model: pretrain.DenseCL) -> dict[str, list[Tensor]]:
    """Collects, at every step, what the trainer does not record itself."""
    log: dict[str, list[Tensor]] = defaultdict(list)

    def on_match(_: object, maps: tuple[Tensor, Tensor], match: densecl_ops.Correspondence) -> None:
        log["match_score"].append(match_score(match))
        log["mutual_share"].append(mutual_share(*maps))

    def on_loss(_: object, arguments: object, result: Any) -> None:
        if isinstance(result, tuple):  # the dense term, which returns ranks as well
            log["top5"].append(contrastive_accuracy(result[1], top_k=5))

    model.match.register_forward_hook(on_match)
    model.criterion.register_forward_hook(on_loss)
    return log


def record(name: str) -> None:
    """Trains one run with seed 0 and writes its record."""
    run = (HEALTHY | BROKEN)[name]
    args = pretrain.parse_arguments(run.options.split())
    photographs = load_photographs(None)
    args.images_seen = f"scikit-image, {len(photographs)}"
    torch.manual_seed(args.seed)
    model = run.model(queue_init=args.queue_init)
    log = watch(model)
    views = run.views(photographs, torch.Generator().manual_seed(args.seed))
    with tempfile.TemporaryDirectory() as folder:
        history = pretrain.train(model, views, args.lambda_, Path(folder) / "checkpoint.pt", args)
    matches = evaluate(model.encoder_q.backbone, load_pair(STRIDE, torch.device("cpu")))
    columns = dict(zip(("image_loss", "dense_loss", "top1"), history.unbind(1), strict=True))
    columns |= {key: torch.stack(values) for key, values in log.items()}
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    result = {
        "name": name,
        "label": run.label,
        "settings": {"queue_init": args.queue_init, "queue_size": model.image_queue.rows.shape[0]}
        | pretrain.settings_of(args, args.lambda_),
        "matches": {"close": round(matches.close, 4), "median": round(matches.median, 4)},
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (densecl_ops, torch, kornia, skimage)}
        | {"python": platform.python_version()},
        "commit": subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip(),
        "history": "@",
    }
    lines = [f'    "{key}": {[round(x, 4) for x in values.tolist()]}' for key, values in columns.items()]
    RECORDS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2).replace('"@"', "{\n" + ",\n".join(lines) + "\n  }")
    (RECORDS / f"{name}.json").write_text(text + "\n")


def load_records() -> dict[str, dict[str, Any]]:
    return {name: json.loads((RECORDS / f"{name}.json").read_text()) for name in HEALTHY | BROKEN}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One row per run: first step, extreme and end of what it recorded, and matches on the stereo pair."""
    lines = [
        "| run | image term: start, end | dense term: start, peak (step), end | top-1: start, end | top-5: end "
        "| match score: start, end | mutual share: start, low (step), end | stereo |",
        "|---" * 8 + "|",
    ]
    for run in runs.values():
        history = {key: np.array(values) for key, values in run["history"].items()}
        start = {key: values[0] for key, values in history.items()}
        end = {key: values[-LAST:].mean() for key, values in history.items()}
        peak, low = history["dense_loss"].argmax(), history["mutual_share"].argmin()
        cells = (
            run["label"],
            f"{start['image_loss']:.2f}, {end['image_loss']:.2f}",
            f"{start['dense_loss']:.2f}, {history['dense_loss'][peak]:.2f} ({peak + 1}), {end['dense_loss']:.2f}",
            f"{start['top1']:.2f}, {end['top1']:.2f}",
            f"{end['top5']:.2f}",
            f"{start['match_score']:.2f}, {end['match_score']:.2f}",
            f"{start['mutual_share']:.2f}, {history['mutual_share'][low]:.2f} ({low + 1}), {end['mutual_share']:.2f}",
            f"{run['matches']['close']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def smooth(values: list[float]) -> list[float]:
    """Step n as the mean over n/20 steps either side: nothing is lost at the start, where the axis is wide."""
    return [float(np.mean(values[max(0, i - (i + 1) // 20) : i + (i + 1) // 20 + 1])) for i in range(len(values))]


def draw(runs: dict[str, dict[str, Any]]) -> None:
    """Six panels of healthy runs, three of broken ones, the step on a log scale."""
    blue, orange, green, purple, grey = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
    healthy = dict(zip(HEALTHY, ((blue, "-"), (blue, "--"), (orange, "-"), (orange, "--")), strict=True))
    broken = {"random": (grey, "-")} | dict(zip(BROKEN, ((green, "--"), (purple, "-."), ("black", ":")), strict=True))
    panels = {
        "image_loss": "image term",
        "dense_loss": "dense term",
        "top1": "top-1 accuracy",
        "top5": "top-5 accuracy",
        "match_score": "match score",
        "mutual_share": "mutual share",
    }
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 9.5), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2, 1.05]).ravel()
        rows = ((upper, healthy, panels, (2, 3)), (lower, broken, dict(list(panels.items())[:3]), (1, 3)))
        for part, styles, titles, shape in rows:
            axes = part.subplots(*shape).ravel()
            for axis, (key, title) in zip(axes, titles.items(), strict=True):
                for name, (colour, style) in styles.items():
                    values = smooth(runs[name]["history"][key])
                    steps = np.arange(1, len(values) + 1)
                    label = "healthy (random queue, warm-up)" if styles is broken and name == "random" else None
                    axis.plot(steps, values, style, color=colour, linewidth=1.4, label=label or runs[name]["label"])
                axis.set_xscale("log")
                axis.set_xticks([1, 10, 32, 50, 150, 400], ["1", "10", "32", "50", "150", "400"])
                axis.minorticks_off()
                axis.set_title(title, fontsize=11)
                axis.grid(alpha=0.25, linewidth=0.6)
            handles, labels = axes[0].get_legend_handles_labels()
            part.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        upper.suptitle("Healthy runs: 1,024 negatives are full after 32 steps, lambda warms up for 50", fontsize=12)
        lower.suptitle("Broken runs, 150 steps", fontsize=12)
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, dpi=90)
    with Image.open(PICTURE) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(PICTURE, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws the curves of docs/training.md; --train records them first.")
    names = list(HEALTHY | BROKEN)
    parser.add_argument("--train", nargs="*", choices=names, metavar="RUN", help=f"all, or some of {', '.join(names)}")
    parser.add_argument("--record-only", action="store_true", help="leave picture and table as they are")
    args = parser.parse_args(arguments)
    if args.train is not None:
        for name in args.train or names:
            record(name)
    if not args.record_only:
        runs = load_records()
        draw(runs)
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}\n{table(runs)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
