"""docs/examples/pretrain.py on every process that torchrun starts, for test_pretrain.py: runs below a DIRECTORY."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import pretrain
import pytest
import torch
from helpers import gloo_threads
from PIL import Image
from pretraining import stereo

TINY = ["--steps", "4", "--batch-size", "4", "--lambda-warmup", "2", "--no-amp", "--backbone", "small_gn"]


@cache
def small_pair(stride: int, device: torch.device) -> stereo.Pair:
    """Part of the stereo pair: of a run of a few steps, most of the time would go into the matches of the whole."""
    pair = stereo.load_pair(stride, device)
    return stereo.Pair(*(x[..., 96:256, 160:416] for x in pair[:3]), stride)


pretrain.load_pair = small_pair


def run(out: Path, *arguments: object, **options: object) -> None:
    pretrain.main([*TINY, "--out", str(out), *map(str, arguments)], **options)


def run_until_sigterm(*arguments: object, **options: object) -> None:
    """In the middle of the second step, at one rank and its workers."""

    def lambda_at(step: int, value: float, warmup: int) -> float:
        if step == 1 and os.environ.get("RANK") != "0":
            for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
                os.kill(pid, signal.SIGTERM)
        return schedule(step, value, warmup)

    schedule = pretrain.lambda_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "lambda_at", lambda_at)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            run(*arguments, **options)


if __name__ == "__main__":
    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    node = root / f"node{rank}"  # the ranks have no disk in common
    run_until_sigterm(node, "--workers", 1)
    if rank == 0:
        shutil.copytree(node, root / "alone")
    run(node, "--resume")
    run(root / "whole")
    Image.new("RGB", (40, 40)).save(node / ("other.png" if rank else "matches.png"))
    with pytest.raises(SystemExit, match="processes differ in names of images: rank 0: "):
        run(root / "other", "--images", node)
    assert gloo_threads() == []
    assert threading.enumerate() == [threading.main_thread()]
