"""The command line of docs/examples/pretrain.py."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from pathlib import Path

import torch


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, but neither None nor the False of a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains DenseCL and measures dense matches on a stereo pair.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("images").add_argument
    add("--images", type=Path, metavar="DIR", help="train on the images below DIR (default: scikit-image's own)")
    add("--view", type=int, default=64, metavar="PIXELS", help="side of a view")
    add("--window", type=int, default=96, metavar="PIXELS", help="side of the part of an image, scaled to a shorter "
        "side of at most 384, that both views are cut from; 0: the whole image, as in the paper")  # fmt: skip
    add("--workers", type=int, metavar="N", help="processes that decode (default: 0 without --images, else up to 8)")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="small", help="small, small_gn (group norm), or a ResNet's name in torchvision or timm")
    add("--matching", choices=("nearest", "mutual", "place"), default="nearest",
        help="a position's match: nearest feature, only mutually nearest ones, or nearest place")  # fmt: skip
    add("--lambda", dest="lambda_", type=float, default=0.5, help="weight of the dense term, 0 to 1")
    add("--lambda-warmup", type=int, default=50, help="first steps, with lambda 0")
    add("--momentum", type=float, default=0.99, help="of the key encoder")
    add("--queue-size", type=int, default=1024, help="K, negatives of each term")
    add("--queue-init", choices=("random", "empty"), default="random", help="the queues' start")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=250, help="of the optimizer")
    add("--epochs", type=float, help="instead of --steps: how often each image is seen")
    add("--batch-size", type=int, default=32, help="images per step, over all processes")
    add("--accumulate", type=int, default=1, metavar="N", help="forward and backward in N parts, one after the other")
    add("--lr", type=float, default=0.02, help="peak learning rate")
    add("--seed", type=int, default=0, help="of weights, order and views")
    add("--compare", action="store_true", help="also train with lambda 0, the image term alone")
    add("--amp", action=argparse.BooleanOptionalAction, default=bfloat16_is_fast(), help="bfloat16 autocast")
    add("--channels-last", action="store_true", help="memory format of images and convolutions")
    add("--compile", action="store_true", help="torch.compile the model")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="for checkpoints, weights, picture, result.json")
    add("--json", type=Path, metavar="FILE", help="where the result goes instead of OUT/result.json")
    add("--save-every", type=int, default=100, metavar="STEPS", help="between checkpoints; SIGTERM saves one, too")
    add("--resume", action="store_true", help="go on from the checkpoints in OUT, if there are any")
    add("--densecl", action="store_true", help="also write OUT/densecl.pth, a checkpoint of the official DenseCL code")
    add("--tensorboard", action="store_true", help="curves and pictures of matches in OUT")
    args = parser.parse_args(arguments)

    least_of = dict.fromkeys(("steps", "batch_size", "accumulate", "queue_size", "view", "save_every"), 1)
    least_of |= dict.fromkeys(("lambda_", "momentum", "lambda_warmup", "window", "workers"), 0)
    for name, least in least_of.items():
        value, most = getattr(args, name), 1 if name in ("lambda_", "momentum") else math.inf
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.strip('_').replace('_', '-')}: got {value}, expected {least} to {most}")
    if args.epochs is not None and args.epochs <= 0:
        parser.error(f"--epochs: got {args.epochs}, expected more than 0")
    parts = args.accumulate * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % parts:
        parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of {parts} (processes x accumulate)")
    if args.images is not None and not args.images.is_dir():
        parser.error(f"--images: {args.images} is not a folder")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard: needs pip install tensorboard")
    if args.workers is None:
        args.workers = 0 if args.images is None else min(8, os.cpu_count() or 1)
    return args


def bfloat16_is_fast() -> bool:
    """On CPUs with bfloat16 instructions a step takes 0.6 of its float32 time; elsewhere they would be emulated."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
