"""The command line of docs/examples/pretrain.py."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from pathlib import Path

import torch

from pretraining import processes


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
    add("--shards", type=Path, nargs="+", metavar="TAR", help="train on the images in these tar files (webdataset)")
    add("--view", type=int, default=64, metavar="PIXELS", help="side of a view")
    add("--window", type=int, default=96, metavar="PIXELS", help="side of the part of an image, scaled to a shorter "
        "side of at most 384, that both views are cut from; 0: the whole image, as in the paper")  # fmt: skip
    add("--workers", type=int, metavar="N", help="processes that decode (default: up to 8 for --images and --shards, "
        "else 0)")  # fmt: skip

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="small", help="small, small_gn (group norm), or a ResNet's name in torchvision or timm; "
        "a name of timm with a tag, as resnet50.a1_in1k, means those weights")  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="start the backbone from them: a state dict or any checkpoint")
    add("--matching", choices=("nearest", "mutual", "place"), default="nearest",
        help="a position's match: nearest feature, only mutually nearest ones, or nearest place")  # fmt: skip
    add("--lambda", dest="lambda_", type=float, default=0.5, help="weight of the dense term, 0 to 1")
    add("--lambda-warmup", type=float, default=0.2, metavar="STEPS", help="first steps, with lambda 0; below 1: as a "
        "share of all")  # fmt: skip
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
    add("--overwrite", action="store_true", help="remove the checkpoints of another run in OUT")
    add("--densecl", action="store_true", help="also write OUT/densecl.pth, a checkpoint of the official DenseCL code")
    add("--tensorboard", action="store_true", help="curves and pictures of matches in OUT")
    args = parser.parse_args(arguments)
    processes.read_launcher()

    least_of = dict.fromkeys(("steps", "batch_size", "accumulate", "queue_size", "view", "save_every"), 1)
    least_of |= dict.fromkeys(("lambda_", "momentum", "lambda_warmup", "window", "workers", "seed"), 0)
    for name, least in least_of.items():
        value, most = getattr(args, name), 1 if name in ("lambda_", "momentum") else math.inf
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.strip('_').replace('_', '-')}: got {value}, expected {least} to {most}")
    for name in ("epochs", "lr"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name}: got {getattr(args, name)}, expected more than 0")
    if args.resume and args.overwrite:
        parser.error("--overwrite: removes the checkpoints that --resume needs")
    if args.images is not None and args.shards is not None:
        parser.error("--shards: expected either these or --images")
    if args.epochs is not None and args.shards is not None:
        parser.error("--epochs: the number of images in shards is not known; use --steps")
    for name in ("weights", "shards"):
        for path in [getattr(args, name)] if name == "weights" else getattr(args, name) or ():
            if path is not None and not path.is_file():
                parser.error(f"--{name}: {path} is not a file")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is not a folder")
    if args.json is not None and args.json.is_dir():
        parser.error(f"--json: {args.json} is a folder, expected a file")
    parts = args.accumulate * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % parts:
        parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of {parts} (processes x accumulate)")
    if args.images is not None and not args.images.is_dir():
        parser.error(f"--images: {args.images} is not a folder")
    for module, needed in {"skimage": True, "tensorboard": args.tensorboard}.items():
        if needed and importlib.util.find_spec(module) is None:
            parser.error(f'{module} is missing: pip install "densecl-ops[demo]"')
    if args.workers is None:
        most = os.cpu_count() or 1
        if args.shards is not None:
            most = min(most, len(args.shards) // int(os.environ.get("WORLD_SIZE", 1)))
        args.workers = 0 if args.images is None and args.shards is None else min(8, most)
    return args


def settle(args: argparse.Namespace, images: int) -> None:
    """Turns shares of a run into steps, and refuses what could not end well: before the first step, not after the last.

    Args:
        images: In an epoch; 0 if that is not known.
    """
    if args.epochs is not None:
        if images == 0:
            raise SystemExit("--epochs: the number of images is not known; use --steps")
        args.steps = math.ceil(args.epochs * images / args.batch_size)
    share = args.lambda_warmup < 1
    args.lambda_warmup = int(args.lambda_warmup * (args.steps if share else 1))
    if args.lambda_ > 0 and args.lambda_warmup >= args.steps:
        raise SystemExit(
            f"--lambda-warmup: got {args.lambda_warmup} of {args.steps} steps, expected fewer: the dense term would "
            "never train"
        )
    if args.densecl and args.queue_init == "empty" and args.steps * args.batch_size < args.queue_size:
        raise SystemExit(
            f"--densecl: {args.steps} steps of {args.batch_size} images leave a queue of {args.queue_size} partly "
            "empty, which that format cannot say; use --queue-init random or a smaller --queue-size"
        )


def bfloat16_is_fast() -> bool:
    """On CPUs with bfloat16 instructions a step takes 0.6 of its float32 time; elsewhere they would be emulated."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
