"""The site: its API reference names everything public once, its notebook runs, docstrings need no TeX."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

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


def test_docstrings_hold_no_tex() -> None:
    """help() shows them as they are."""
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            assert not re.search(r"\\[a-z]+|math::", inspect.getdoc(getattr(module, name)) or ""), name


@pytest.mark.slow
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of its ten cells; training raises the share of matches that agree with the place."""
    for module in ("kornia", "matplotlib", "skimage"):
        pytest.importorskip(module)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((API.parent / "notebook.ipynb").read_text())["cells"]
    assert len(cells) == 10
    space: dict[str, float] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    assert space["after"] > 1.2 * space["before"]
