"""docs/distributed.md and docs/examples/pretrain.py under torchrun; test_pretrain.py compares two ranks with one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for module in ("kornia", "matplotlib", "PIL", "skimage", "tqdm"):
    pytest.importorskip(module)
if not torch.distributed.is_available() or sys.platform == "win32":
    pytest.skip("torchrun and SIGKILL", allow_module_level=True)

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent / "docs" / "examples"))

import pretrain  # noqa: E402

SETTINGS = [
    "--steps",
    "7",
    "--batch-size",
    "4",
    "--lambda-warmup",
    "2",
    "--no-amp",
    "--backbone",
    "small_gn",
    "--save-every",
    "2",
]
STALL_AT = 5  # one step after the checkpoint of step 4
NEVER = 10**6


def torchrun(out: Path, stall_at: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(TESTS / "distributed_pretrain.py"), str(stall_at), *SETTINGS, "--out", str(out), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        stdout=subprocess.DEVNULL,
        stderr=(out / "errors").open("w"),
    )


def finish(out: Path, *arguments: str) -> None:
    process = torchrun(out, NEVER, *arguments)
    try:
        assert process.wait(timeout=240) == 0, (out / "errors").read_text()
    finally:
        kill(process, out)


def kill(launcher: subprocess.Popen, out: Path) -> None:
    """SIGKILL: no rank and no launcher gets to tidy up. A launcher that has ended has seen its ranks end."""
    if launcher.poll() is None:
        for pid in [launcher.pid, *(int(path.read_text()) for path in out.glob("*.pid"))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()
    for path in out.glob("*.pid"):
        path.unlink()


def load(out: Path) -> dict:
    return torch.load(out / "image-and-dense.pt", weights_only=True)


def wait_for_step(step: int, launcher: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + 240
    while not (out / "image-and-dense.pt").exists() or load(out)["step"] < step:
        assert launcher.poll() is None, (out / "errors").read_text()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)


def assert_same_run(seen: dict, expected: dict, atol: float) -> None:
    assert seen["step"] == expected["step"] == 7
    torch.testing.assert_close(seen["history"], expected["history"], rtol=0, atol=10 * atol)
    assert seen["model"].keys() == expected["model"].keys()
    for key, value in expected["model"].items():
        torch.testing.assert_close(seen["model"][key], value, rtol=0, atol=atol, msg=key)


def test_killed_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    """Losses, weights and queues; on the same two processes to the bit, on one process to rounding."""
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    whole.mkdir(), killed.mkdir()
    finish(whole)

    launcher = torchrun(killed, STALL_AT)
    try:
        wait_for_step(4, launcher, killed)
    finally:
        kill(launcher, killed)
    assert load(killed)["step"] == 4
    shutil.copytree(killed, alone)

    finish(killed, "--resume")
    assert_same_run(load(killed), load(whole), atol=0)

    pretrain.main([*SETTINGS, "--out", str(alone), "--resume"])
    assert_same_run(load(alone), load(whole), atol=3e-4)


def test_page_on_several_processes(tmp_path: Path) -> None:
    """The blocks of docs/distributed.md are one script."""
    page = (TESTS.parent / "docs" / "distributed.md").read_text()
    script = tmp_path / "page.py"
    script.write_text("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
