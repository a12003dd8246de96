"""What a run writes: checkpoints to go on from, weights to use, and the result."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kornia
import skimage
import torch
from torch import Tensor, nn

import densecl_ops
from densecl_ops.interop import Checkpoint, write_checkpoint

if TYPE_CHECKING:
    from pretrain import DenseCL

    from pretraining.stereo import Matches

# What decides the weights: a resumed run must agree with it, and results are stored beside it.
SETTINGS = (
    *("seed", "steps", "batch_size", "accumulate", "lr", "momentum", "lambda_warmup", "matching", "queue_size"),
    *("queue_init", "backbone", "view", "window", "amp"),
)


def settings_of(args: argparse.Namespace, lambda_: float) -> dict[str, Any]:
    return {"lambda": lambda_, "images": args.images_seen} | {name: getattr(args, name) for name in SETTINGS}


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **state: object) -> None:
    """The model's state holds both encoders and both queues; no other state draws at random after its start."""
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)  # an interruption leaves the last whole checkpoint


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> tuple[int, Tensor, dict[str, str]]:
    """Puts everything back as `save` found it; returns the next step, the history and the files skipped so far."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        differ = {key for key in settings | state["settings"] if settings.get(key) != state["settings"].get(key)}
        told = ", ".join(f"{key} {state['settings'].get(key)}, not {settings.get(key)}" for key in sorted(differ))
        raise SystemExit(f"--resume: {path} was made with {told}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["history"], state["skipped"]


def export(model: DenseCL, folder: Path, densecl: bool) -> None:
    """The backbone in plain ResNet names; and, if asked for, everything in the official DenseCL code's names."""
    encoders = {"q": model.encoder_q, "k": model.encoder_k}
    parts: dict[str, Any] = {f"backbone_{side}": encoder.backbone for side, encoder in encoders.items()}
    parts |= {f"head_{side}": encoder.head for side, encoder in encoders.items()}
    checkpoint = Checkpoint.from_modules(**parts, image_queue=model.image_queue, dense_queue=model.dense_queue)
    write_checkpoint(checkpoint, folder / "backbone.pth", format="backbone")
    if densecl:
        write_checkpoint(checkpoint, folder / "densecl.pth", format="densecl")


def report(
    args: argparse.Namespace, matches: dict[str, Matches], seconds: dict[str, float], skipped: dict[str, str]
) -> None:
    """Prints the table and writes it as JSON."""
    print(f"\n{'matches on the stereo pair':28}{'within 1.5 cells':>18}{'median error':>16}{'training':>12}")
    for name, row in matches.items():
        time_taken = f"{seconds[name]:.0f} s" if name in seconds else ""
        print(f"{name:28}{row.close:18.3f}{row.median:10.2f} cells{time_taken:>12}")
    margin = matches["image and dense"].close - matches["random weights"].close
    print(f"trained over random: {margin:+.3f}")
    rows = {name: {"close": round(row.close, 4), "median": round(row.median, 4)} for name, row in matches.items()}
    path = args.json or args.out / "result.json"
    settings = settings_of(args, args.lambda_)
    write_result(path, {"settings": settings, "skipped": len(skipped), "rows": rows})
    if skipped:
        print(f"files skipped: {len(skipped)}, named above or in earlier parts of the run")
    print(f"written: {path}, and in {args.out}: matches.png, backbone.pth")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """As JSON, beside what it was made with; without times, so that equal runs give equal files."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    result |= {
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (densecl_ops, torch, kornia, skimage)}
        | {"python": platform.python_version()},
        "commit": "",
    }
    if shutil.which("git"):
        result["commit"] = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
