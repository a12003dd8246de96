"""What a type checker says of a user's script: every call has a type, none is Any, and mistakes are seen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("typed_script.py")
ROOT = SCRIPT.parents[1]
MISTAKES = [
    'DenseInfoNCELoss(reduction="avg")',
    'MomentumQueue(init="zeros")',
    'DenseCorrespondence(backend="cuda")',
    "match(1, first)",
    "head(first).denze",
    "densecl_ops.metric",
    "criterion.temperature = 'low'",
]


def test_the_script_runs() -> None:
    subprocess.run([sys.executable, SCRIPT], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", ["mypy", "pyright"])
def test_every_call_has_a_type_and_mistakes_are_seen(name: str, tmp_path: Path) -> None:
    """Strict mode and assert_type fail on Any; the mistakes stand on lines of their own after the script."""
    pytest.importorskip(name)
    user = tmp_path / "user.py"
    good = SCRIPT.read_text() + "first = torch.randn(4, 8, 4, 4)\n"
    user.write_text(good + "\n".join(MISTAKES) + "\n")
    options = ["--strict", "--no-incremental", "--config-file=", "--show-absolute-path", str(user)]
    if name == "pyright":  # in its strict mode an unknown or partly unknown type is an error
        (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportPrivateUsage": false}')
        options = ["--pythonpath", sys.executable, "--project", str(tmp_path)]
    paths = {"MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", name, *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | paths)
    seen = {int(line) for line in re.findall(r"user\.py:(\d+):.* error:", result.stdout)}
    lines = range(good.count("\n") + 1, good.count("\n") + 1 + len(MISTAKES))
    assert seen == set(lines), result.stdout + result.stderr
