"""Does the dense term help? Pre-trains every arm on unlabelled photographs, and measures four dense tasks.

    python -m benchmarks transfer --camvid DIR/CamVid --photographs DIR/BSDS500/data/images

Every finished run is a file in --out; the same command goes on where it was cut off. With --part the runs see the val
split alone and lie in a folder of that name. docs/dense-tasks.md has the commands of its tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.measure import environment
from benchmarks.records import write
from benchmarks.transfer.pretraining import ARMS, RANDOM, Setting, pretrain
from benchmarks.transfer.tasks import VOID, Frames, measure

Record = dict[str, Any]
SUFFIXES = {".jpg", ".jpeg", ".png"}
SHORT_SIDE = 360  # pixels; larger photographs are scaled down to it once, smaller ones stay as they are
OPTIONS = [field for field in fields(Setting) if field.name not in ("arm", "seed", "rate")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--camvid", type=Path, metavar="DIR", required=True, help="holds train, trainannot, val, ...")
    add("--photographs", type=Path, metavar="DIR", required=True, help="any folder of photographs")
    add("--part", choices=("search", "study"), default="", help="of the learning rate; of all other choices")
    add("--out", type=Path, default=Path("runs/transfer"), help="records (default: %(default)s)")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--rates", nargs="+", type=float, help="of learning (default: the best of the search, for each arm)")
    for x in OPTIONS:
        add(f"--{x.name.replace('_', '-')}", type=type(x.default), default=x.default, help="default: %(default)s")


def load(folder: Path) -> list[Record]:
    """The records of all runs in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]


def on_val(record: Record) -> float:
    """What the search maximises."""
    return float(record["val.probe"]["miou"] + record["val.knn"]["miou"]) / 2


def chosen_rate(searched: list[Record], arm: str) -> float:
    """The learning rate with the best mean of probe and k-NN on val; arms that were not searched take nearest's."""
    arms = {record["setting"]["arm"] for record in searched}
    own = [record for record in searched if record["setting"]["arm"] == (arm if arm in arms else "nearest")]
    if not own:
        raise SystemExit(f"no search of {arm} and none of nearest: give --rates, or run --part search")
    return float(max(own, key=on_val)["setting"]["rate"])


def load_split(folder: Path, split: str) -> Frames:
    """Reads `folder`/`split` (images) and `folder`/`split`annot (labels)."""
    paths = _images_in(folder / split)
    labels = [folder / f"{split}annot" / f"{path.stem}.png" for path in paths]
    images = torch.stack([_rgb(Image.open(path)) for path in paths])
    truth = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in labels])
    if truth.shape != (len(images), *images.shape[2:]) or int(truth.max()) > VOID:
        raise ValueError(f"{folder}: labels of {split} are {tuple(truth.shape)}, at most {int(truth.max())}")
    return Frames([path.stem for path in paths], images, truth)


def load_photographs(folder: Path) -> list[Tensor]:
    """(3, H, W) uint8 images below `folder`, in the order of their names."""
    images = map(Image.open, _images_in(folder))
    return [_rgb(ImageOps.scale(image, min(1.0, SHORT_SIDE / min(image.size)))) for image in images]


def _images_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder}: no image found; docs/dense-tasks.md says where the data come from")
    return paths


def _rgb(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def main(arguments: argparse.Namespace) -> None:
    """One run per seed, arm and rate; all data in memory."""
    torch.backends.cudnn.benchmark = True
    described = environment()  # before hours of work may have changed what is checked out
    train, val, test = (load_split(arguments.camvid, split) for split in ("train", "val", "test"))
    photographs = [x.to(arguments.device) for x in (*load_photographs(arguments.photographs), *train.images)]
    chosen = {field.name: getattr(arguments, field.name) for field in OPTIONS}
    searched = load(arguments.out / "search")
    for seed, arm in itertools.product(arguments.seeds, arguments.arms):
        rates = [0.0] if arm == RANDOM else arguments.rates or [chosen_rate(searched, arm)]
        for setting in (Setting(arm, seed, rate, **chosen) for rate in rates):
            path = arguments.out / arguments.part / f"{setting.name}.json"
            if not path.exists() and not (arm == RANDOM and arguments.part):  # which has nothing to choose
                print(arguments.part, path.stem, flush=True)
                network, facts = pretrain(setting, photographs)
                results = measure(network.eval(), train, val, None if arguments.part else test)
                facts["photographs"] = len(photographs)
                how = {"command": arguments.command, "environment": described, "pretraining": facts}
                write(path, {"setting": asdict(setting)} | how | results)
