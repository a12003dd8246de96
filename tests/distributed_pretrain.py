"""docs/examples/pretrain.py for test_torchrun.py: distributed_pretrain.py STALL_AT ARGUMENT...

Writes its process id beside the checkpoint. At step STALL_AT the last rank makes a file "waiting", and waits for "go".
A "{rank}" in the arguments is filled in. At the end, no thread may be left of a group, a loader or a bar.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import pretrain
import torch
from pretraining import stereo

schedule = pretrain.lambda_at


@cache
def small_pair(stride: int, device: torch.device) -> stereo.Pair:
    """Part of the stereo pair: of a run of a few steps, most of the time would go into the matches of the whole."""
    pair = stereo.load_pair(stride, device)
    left, right, disparity = (x[..., 96:256, 160:416] for x in pair[:3])
    return pair._replace(left=left, right=right, disparity=disparity)


def stalling(step: int, value: float, warmup: int) -> float:
    if step == int(sys.argv[1]) and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        (out / "waiting").touch()
        while not (out / "go").exists():
            time.sleep(0.1)
    return schedule(step, value, warmup)


if __name__ == "__main__":
    arguments = [argument.replace("{rank}", os.environ["RANK"]) for argument in sys.argv[2:]]
    out = Path(arguments[arguments.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    pretrain.lambda_at, pretrain.load_pair = stalling, small_pair
    pretrain.main(arguments)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name], names
    assert threading.enumerate() == [threading.main_thread()]
