"""README.md and every page under docs/, in pieces."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "docs" / "examples"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RECIPES = [page for page in PAGES if page.parent == DOCS / "recipes"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def block_with(word: str, page: str) -> str:
    return next(block for block in blocks(DOCS / page) if word in block)
