"""What a run writes: checkpoints to go on from, weights to use, and the result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import densecl_ops
from densecl_ops.interop import Checkpoint, write_checkpoint
from pretraining import processes

if TYPE_CHECKING:
    from pretrain import DenseCL

    from pretraining.stereo import Matches, Pair

# What decides the weights: a resumed run must agree with it, and results are stored beside it.
SETTINGS = (
    *("seed", "steps", "batch_size", "accumulate", "lr", "momentum", "lambda_warmup", "matching", "queue_size"),
    *("queue_init", "backbone", "weights", "view", "window", "amp"),
)
# What a resumed run may change, and what follows.
CHANGES = {
    "steps": "the learning rate goes on along the new schedule",
    "lambda_warmup": "the dense term joins in at the new step",
    "accumulate": "batch norms see parts of another size",
    "images": "the order of the images is a new one from here on",
    "weights": "those of the checkpoint are taken",
}


def settings_of(args: argparse.Namespace, lambda_: float) -> dict[str, Any]:
    settings = {"lambda": lambda_, "images": args.images_seen} | {name: getattr(args, name) for name in SETTINGS}
    return settings | {"weights": args.weights and str(args.weights)}  # neither torch.load nor json takes a Path


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_suffix(".previous.pt")


def claim(paths: list[Path], args: argparse.Namespace) -> None:
    """Refuses to write over what another run left, or removes its checkpoints if that is what is wanted.

    A run without the dense term has other checkpoints, but backbone.pth and result.json in common with one that has it.
    """
    every = [paths[0].with_name(name) for name in ("image-term-alone.pt", "image-and-dense.pt")]
    found = [file for path in every for file in (path, previous(path)) if file.exists()]
    goes_on = args.resume and any(path in found or previous(path) in found for path in paths)
    if found and not goes_on and not args.overwrite:
        raise SystemExit(
            f"--out: {found[0]} is of another run; --resume with its --lambda goes on with it, --overwrite removes it"
        )
    for file in found if args.overwrite else ():
        file.unlink()


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **state: object) -> None:
    """Called by all processes, written by rank 0; the checkpoint before this one is kept.

    The model's state holds both encoders and both queues; no other state draws at random after its start.
    """
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def write() -> None:
        if processes.rank() == 0:
            write_whole(path, lambda file: torch.save(state, file), keep=previous(path))

    processes.together(write)


def write_whole(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """By way of a temporary file: neither a crash nor a full disk leaves half a file under this name.

    What stood under the name before is moved to `keep`.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        kept = f"; {path.name} is as it was" if path.exists() else ""
        why = str(error) if isinstance(error, OSError) else "is the disk full?"
        raise SystemExit(f"{path} could not be written ({why}){kept}") from error


def read(path: Path) -> dict[str, Any] | None:
    """The last checkpoint if it is whole, else the one before it; None where there is neither."""
    found = [file for file in (path, previous(path)) if file.exists()]
    for file in found:
        try:
            with zipfile.ZipFile(file) as parts:
                if parts.testzip() is not None:  # torch writes the checksums and never reads them
                    raise zipfile.BadZipFile
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            if {"model", "optimizer", "step", "settings"} <= state.keys():
                return state
            print(f"{file}: no checkpoint of this program", file=sys.stderr)
        except Exception as error:  # of half a dozen types, in torch, for a file that is cut short
            print(f"{file}: damaged ({type(error).__name__})", file=sys.stderr)
    if found:
        names = " and ".join(map(str, found))
        raise SystemExit(f"--resume: {names} cannot be read; put a copy there, or start anew with --overwrite")
    return None


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Puts everything back as `save` found it, from the files that rank 0 sees; None where there are none."""
    state = processes.from_rank_0(lambda: read(path))
    if state is None:
        return None
    before = state["settings"]
    differ = {name for name in settings | before if settings.get(name) != before.get(name)}
    refused = [f"{name} {before.get(name)}, not {settings.get(name)}" for name in sorted(differ - CHANGES.keys())]
    if refused:
        raise SystemExit(f"--resume: {path} was made with {', '.join(refused)}")
    if state["step"] > settings.get("steps", state["step"]):
        raise SystemExit(f"--resume: {path} is of step {state['step']}, after the last one (--steps)")
    for name in sorted(differ) if processes.rank() == 0 else ():
        change = f"{name} {before.get(name)}, now {settings.get(name)}"
        print(f"resumed at step {state['step']} with {change}: {CHANGES[name]}", file=sys.stderr)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def require_finite(history: Tensor, model: nn.Module | None, path: Path) -> None:
    """Stops a run that has become NaN or infinite before it can be saved; every process sees the same numbers."""
    finite = bool(history.isfinite().all())
    if finite and model is not None:
        finite = bool(torch.stack([x.isfinite().all() for x in model.state_dict().values()]).all())
    if finite:
        return
    rows = history.isfinite().all(1).tolist()
    where = f"the loss of step {rows.index(False) + 1}" if False in rows else "a weight"
    kept = f"{path.name} holds the last good state" if path.exists() else "nothing was saved before"
    raise SystemExit(f"{where} is not finite: stopped, and {kept}. A lower --lr or --no-amp may help")


def export(model: DenseCL, folder: Path, densecl: bool) -> list[Path]:
    """The backbone in plain ResNet names; and, if asked for, everything in the official DenseCL code's names."""
    encoders = {"q": model.encoder_q, "k": model.encoder_k}
    parts: dict[str, Any] = {f"backbone_{side}": encoder.backbone for side, encoder in encoders.items()}
    parts |= {f"head_{side}": encoder.head for side, encoder in encoders.items()}
    checkpoint = Checkpoint.from_modules(**parts, image_queue=model.image_queue, dense_queue=model.dense_queue)
    formats = {folder / "backbone.pth": "backbone"} | ({folder / "densecl.pth": "densecl"} if densecl else {})
    for path, name in formats.items():
        write_whole(path, lambda file, name=name: write_checkpoint(checkpoint, file, format=name))  # type: ignore[misc]
    return list(formats)


def report(
    args: argparse.Namespace,
    matches: dict[str, Matches],
    pair: Pair,
    seconds: dict[str, float],
    skipped: dict[str, str],
    written: list[Path],
) -> None:
    """Prints the table, writes it as JSON, and names all files."""
    print(f"\n{'matches on the stereo pair':28}{'within 1.5 cells':>18}{'median error':>16}{'training':>12}")
    for name, row in matches.items():
        time_taken = f"{seconds[name]:.0f} s" if name in seconds else ""
        print(f"{name:28}{row.close:18.3f}{row.median:10.2f} cells{time_taken:>12}")
    first, *_, last = matches
    print(f"{last} over {first}: {matches[last].close - matches[first].close:+.3f}")
    if pair.stride > 8:
        typical = float(pair.disparity[pair.disparity.isfinite()].median())
        print(
            f"This says little of weights with cells of {pair.stride} pixels: half of the pair's disparities are below "
            f"{typical:.0f}, so random weights may match as well as trained ones. Judge these on a task of yours."
        )
    rows = {name: {"close": round(row.close, 4), "median": round(row.median, 4)} for name, row in matches.items()}
    path = args.json or args.out / "result.json"
    write_result(path, {"settings": settings_of(args, args.lambda_), "skipped": len(skipped), "rows": rows})
    if skipped:
        print(f"files skipped: {len(skipped)}, named above or in earlier parts of the run")
    print("written:", *[path, *written], sep="\n  ")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """As JSON, beside what it was made with; without times, so that equal runs give equal files."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    versions = {"densecl_ops": densecl_ops.__version__, "torch": torch.__version__}
    versions |= {"kornia": version("kornia"), "skimage": version("scikit-image"), "python": platform.python_version()}
    result |= {"threads": torch.get_num_threads(), "versions": versions, "commit": ""}
    if shutil.which("git"):
        result["commit"] = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write_text(json.dumps(result, indent=2) + "\n"))
