"""The site: its API reference names everything public once."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

API = Path(__file__).parents[1] / "docs" / "api"
MODULES = ("densecl_ops", *(f"densecl_ops.{name}" for name in ("functional", "interop", "metrics", "visualize")))


def test_reference_names_everything_public_once() -> None:
    documented = []
    for page in API.glob("*.md"):
        (module,) = re.findall(r"currentmodule:: (.+)", page.read_text())
        names = re.findall(r"auto(?:class|function):: (\w+)", page.read_text())
        documented += [f"{module}.{name}" for name in names]
    public = {f"{name}.{thing}" for name in MODULES for thing in importlib.import_module(name).__all__}
    assert sorted(documented) == sorted(public - set(MODULES))
