"""The pages of the site that no other test reads: FAQ, API reference, and where links lead."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = (
    "densecl_ops",
    "densecl_ops.functional",
    "densecl_ops.interop",
    "densecl_ops.metrics",
    "densecl_ops.visualize",
)
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def test_faq_runs() -> None:
    space: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "faq.md").read_text(), re.DOTALL):
        exec(block, space)


def test_reference_names_everything_public_once() -> None:
    documented = []
    for page in (DOCS / "api").glob("*.md"):
        module = re.findall(r"currentmodule:: (.+)", page.read_text())
        names = re.findall(r"auto(?:class|function):: (\w+)", page.read_text())
        documented += [f"{module[0]}.{name}" for name in names]
    public = [f"{name}.{thing}" for name in MODULES for thing in importlib.import_module(name).__all__]
    assert sorted(documented) == sorted(set(public) - set(MODULES))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for path in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
        assert ((ROOT / page).parent / path).exists(), path
