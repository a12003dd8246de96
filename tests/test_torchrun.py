"""docs/examples/pretrain.py under torchrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
from PIL import Image  # noqa: E402

SETTINGS = "--steps 7 --batch-size 4 --lambda-warmup 2 --no-amp --backbone small_gn --save-every 2"
STALL_AT = 5  # one step after the checkpoint of step 4
NEVER = 10**6


@contextlib.contextmanager
def torchrun(out: Path, stall_at: int, *arguments: str) -> Iterator[subprocess.Popen]:
    """Ends by SIGKILL: no rank and no launcher gets to tidy up. A launcher that has ended has seen its ranks end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "distributed_pretrain.py"), str(stall_at), *SETTINGS.split(), "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    options = {"stdout": subprocess.DEVNULL, "stderr": (out / "errors").open("w"), "start_new_session": True}
    launcher = subprocess.Popen(command, env=environment, **options)
    try:
        yield launcher
    finally:
        pids = {path: int(path.read_text()) for path in out.glob("*.pid")}
        if launcher.poll() is None:
            for pid in (launcher.pid, *pids.values()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()
        for path in pids:
            path.unlink()


def finish(out: Path, *arguments: str, status: int = 0) -> None:
    with torchrun(out, NEVER, *arguments) as launcher:
        assert launcher.wait(timeout=240) == status, (out / "errors").read_text()


def load(out: Path) -> dict:
    return torch.load(out / "image-and-dense.pt", weights_only=True)


def wait_until(reached: Callable[[], bool], launcher: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert launcher.poll() is None, (out / "errors").read_text()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def assert_same_run(seen: Path, expected: Path, atol: float = 0) -> None:
    one, other = load(seen), load(expected)
    assert one["step"] == other["step"] == 7
    torch.testing.assert_close(one["history"], other["history"], rtol=0, atol=10 * atol)
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=atol)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    finish(out)
    assert "warn" not in (out / "errors").read_text().lower()
    return out


def test_killed_run_resumes_to_the_same_end(whole: Path, tmp_path: Path) -> None:
    """On the same two processes to the bit, on one, in two parts, to rounding.

    The ranks have no disk in common: rank 0's checkpoint is the one that all go on from.
    """
    killed, alone, apart = tmp_path / "node0", tmp_path / "alone", ["--out", str(tmp_path / "node{rank}")]
    with torchrun(tmp_path, STALL_AT, *apart) as launcher:  # the last --out counts
        wait_until(lambda: (killed / "image-and-dense.pt").exists() and load(killed)["step"] == 4, launcher, tmp_path)
    shutil.copytree(killed, alone)

    finish(tmp_path, *apart, "--resume")
    assert_same_run(killed, whole)

    pretrain.main([*SETTINGS.split(), "--out", str(alone), "--resume", "--accumulate", "2"])
    assert_same_run(alone, whole, atol=3e-4)


def test_sigterm_on_one_rank_stops_all_after_the_same_step(whole: Path, tmp_path: Path) -> None:
    """Signalled are one rank and its workers, while the rank is in the middle of a step."""
    with torchrun(tmp_path, STALL_AT, "--workers", "1") as launcher:
        wait_until((tmp_path / "waiting").exists, launcher, tmp_path)
        os.killpg(os.getpgid(int((tmp_path / "1.pid").read_text())), signal.SIGTERM)
        (tmp_path / "go").touch()
        assert launcher.wait(timeout=120) != 0
    assert "stopped by SIGTERM after step 6" in (tmp_path / "errors").read_text()
    assert load(tmp_path)["step"] == 6

    finish(tmp_path, "--resume")
    assert_same_run(tmp_path, whole)


def test_ranks_that_see_other_images_all_stop(tmp_path: Path) -> None:
    """In the same words."""
    for rank, names in enumerate(("ab", "ac")):
        (tmp_path / f"images{rank}").mkdir()
        for name in names:
            Image.new("RGB", (40, 40)).save(tmp_path / f"images{rank}" / f"{name}.png")
    finish(tmp_path, "--images", str(tmp_path / "images{rank}"), status=1)
    assert (tmp_path / "errors").read_text().count("processes differ in names of images: rank 0: ") == 2
