"""What a run writes: checkpoints to go on from, weights to use, and the result."""

from __future__ import annotations

import argparse
import json
import platform
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


def export(model: DenseCL, folder: Path, densecl: bool) -> list[Path]:
    """The backbone in plain ResNet names; and, if asked for, everything in the official DenseCL code's names."""
    encoders = {"q": model.encoder_q, "k": model.encoder_k}
    parts: dict[str, Any] = {f"backbone_{side}": encoder.backbone for side, encoder in encoders.items()}
    parts |= {f"head_{side}": encoder.head for side, encoder in encoders.items()}
    checkpoint = Checkpoint.from_modules(**parts, image_queue=model.image_queue, dense_queue=model.dense_queue)
    paths = [folder / "backbone.pth"]
    write_checkpoint(checkpoint, paths[0], format="backbone")
    if densecl:
        paths.append(folder / "densecl.pth")
        write_checkpoint(checkpoint, paths[1], format="densecl")
    return paths


def write_result(path: Path, result: dict[str, Any]) -> None:
    """As JSON, beside what it was made with; without times, so that equal runs give equal files."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    result |= {
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (densecl_ops, torch, kornia, skimage)}
        | {"python": platform.python_version()},
        "commit": subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
