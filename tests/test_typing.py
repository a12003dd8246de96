"""What a type checker says of a user's script: every call has a type, none is Any, and mistakes are seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("typed_script.py")
ROOT = SCRIPT.parents[1]
MISTAKES = {
    'DenseInfoNCELoss(reduction="avg")': "reduction",
    'MomentumQueue(init="zeros")': "init",
    'DenseCorrespondence(backend="cuda")': "backend",
    "match(1, first)": "query_features",
    "head(first).denze": "denze",
    "densecl_ops.metric": "metric",
    "criterion.temperature = 'low'": "str",
}


def checker(name: str, path: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip(name)
    options = {
        "mypy": ["--strict", "--no-incremental", "--config-file=", "--show-absolute-path"],
        "pyright": ["--pythonpath", sys.executable],
    }
    if name == "pyright":  # pyright's strict mode, in which an unknown or partly unknown type is an error
        (path.parent / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportPrivateUsage": false}')
        options["pyright"] += ["--project", str(path.parent)]
    command = [sys.executable, "-m", name, *options[name], *([str(path)] if name == "mypy" else [])]
    paths = {"MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent, env=os.environ | paths)


def test_the_script_runs() -> None:
    subprocess.run([sys.executable, SCRIPT], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", ["mypy", "pyright"])
def test_every_call_has_a_type(name: str, tmp_path: Path) -> None:
    """assert_type in the script fails on Any, and so does strict mode."""
    (tmp_path / "user.py").write_text(SCRIPT.read_text())
    result = checker(name, tmp_path / "user.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["mypy", "pyright"])
def test_mistakes_are_seen(name: str, tmp_path: Path) -> None:
    """Each on a line of its own, after the imports and objects of the script."""
    start = SCRIPT.read_text().split("def step")[0] + "first = torch.randn(4, 8, 4, 4)\n"
    (tmp_path / "user.py").write_text(start + "\n".join(MISTAKES) + "\n")
    result = checker(name, tmp_path / "user.py")
    lines = range(start.count("\n") + 1, start.count("\n") + 1 + len(MISTAKES))
    unseen = [mistake for line, mistake in zip(lines, MISTAKES, strict=True) if f"user.py:{line}:" not in result.stdout]
    assert unseen == [], result.stdout + result.stderr
