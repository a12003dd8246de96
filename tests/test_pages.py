"""One rule for README.md and every page under docs/: what it shows is so.

Links and paths lead somewhere; code runs or is a tested example's; tables and pictures are those of the records.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import torchrun
from pages import DOCS, EXAMPLES, PAGES, RECIPES, ROOT, blocks, name_of
from torch import nn

from benchmarks import render


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_paths_and_tables(page: Path) -> None:
    """Links, and what prose and commands write from the root of the repository; `make docs` sees to the anchors."""
    text = page.read_text()
    for target in re.findall(r"\]\(((?!http|#)[^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"(?<![\w/.])(?:docs|tests|benchmarks|densecl_ops|findings)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path
    assert text.count(":begin -->") == text.count(":end -->") == len(render.MARKED.findall(text))
    assert render.rendered(name_of(page)) == text, "run `python -m benchmarks render`"


# ---- code -----------------------------------------------------------------------------------------------------------

RUN_ELSEWHERE = (
    *("README.md", "docs/index.md", "docs/distributed.md"),  # below
    "docs/pretraining.md",  # test_pretrain.py
    "docs/checkpoints.md",  # test_interop.py, on checkpoints that only that file can write
    "docs/use-the-weights.md",  # test_interop.py, where torchvision or timm is installed
)
RUN_IN_ORDER = [page for page in PAGES if blocks(page) and page not in RECIPES and name_of(page) not in RUN_ELSEWHERE]


@pytest.mark.parametrize("page", RUN_IN_ORDER, ids=name_of)
def test_blocks_run_in_order(page: Path) -> None:
    """An `assert` in them is the page's own claim."""
    for module in ("kornia", "matplotlib"):
        pytest.importorskip(module)
    space: dict[str, Any] = {}
    for block in blocks(page):
        exec(block, space)
    assert space["loss"].isfinite()


def test_step_of_the_front_pages() -> None:
    """A MoCo step that the second block replaces; docs/index.md shows a BYOL step, too."""
    _, moco, byol = blocks(DOCS / "index.md")
    assert blocks(ROOT / "README.md")[1:] == [moco]
    backbones = ("backbone_q", "backbone_k", "online_backbone", "target_backbone")
    space: dict[str, Any] = {name: nn.Conv2d(3, 2048, 1) for name in backbones} | {"torch": torch}
    space |= dict(zip(("view_q", "view_k", "view_1", "view_2"), torch.randn(4, 2, 3, 7, 7), strict=True))
    exec(moco, space)
    assert space["loss"].item() == pytest.approx((space["image_loss"] + space["dense_loss"]).item() / 2)
    assert all(p.grad.any() for p in space["head_q"].parameters())
    assert [int(space[queue].position) for queue in ("image_queue", "dense_queue")] == [2, 2]
    space |= {"online_head": space["head_q"], "target_head": space["head_k"], "dense_predictor": nn.Conv2d(128, 128, 1)}
    exec(byol, space)
    space["dense_loss"].backward()
    assert space["dense_predictor"].weight.grad.any()


def test_page_on_two_processes(tmp_path: Path) -> None:
    """The blocks are one script."""
    (tmp_path / "page.py").write_text("".join(blocks(DOCS / "distributed.md")))
    torchrun(tmp_path / "page.py")


# ---- recipes --------------------------------------------------------------------------------------------------------

RUN_BY_RECIPE_TESTS = ("moco_head_state", "batch_unshuffle")  # blocks that test_recipes.py runs
OF_A_HOST = re.compile(r"\bDense(MoCo|MoCoV2Plus|BYOL)\b")  # lines of its own script, with names that are tested there


def code_lines(text: str) -> list[str]:
    lines = (re.sub(r"(^|\s+)# .*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("page", RECIPES, ids=name_of)
def test_shown_code_is_the_recipes(page: Path) -> None:
    """Blocks as a whole; of diffs the added lines."""
    names = dict.fromkeys(re.findall(r"\(\.\./examples/(\w+\.py)\)", page.read_text()))
    sources = [code_lines((EXAMPLES / name).read_text()) for name in names]
    for block in blocks(page):
        if not any(word in block for word in RUN_BY_RECIPE_TESTS):
            assert any("\n".join(code_lines(block)) in "\n".join(source) for source in sources), block
    for diff in blocks(page, "diff"):
        added = code_lines("\n".join(re.findall(r"^\+(.*)", diff, re.MULTILINE)))
        assert any(all(line in source or OF_A_HOST.search(line) for line in added) for source in sources), diff


# ---- the site --------------------------------------------------------------------------------------------------------


def test_plots_are_those_of_the_records() -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from benchmarks.plots import PLOTS, digest

    for name, (source, _) in PLOTS.items():
        picture = image.open(ROOT / "docs" / "images" / f"{name}.png")
        assert picture.info["Source"] == digest(source), "run `python -m benchmarks render`"


def test_api_reference_names_everything_public_once() -> None:
    modules = ["densecl_ops", *(f"densecl_ops.{name}" for name in ("functional", "interop", "metrics", "visualize"))]
    documented = []
    for page in (DOCS / "api").glob("*.md"):
        (module,) = re.findall(r"currentmodule:: (.+)", page.read_text())
        documented += [f"{module}.{name}" for name in re.findall(r"auto(?:class|function):: (\w+)", page.read_text())]
    public = {f"{name}.{thing}" for name in modules for thing in importlib.import_module(name).__all__}
    assert sorted(documented) == sorted(public - set(modules))


@pytest.mark.slow
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training raises the share of matches that agree with the place."""
    for module in ("kornia", "matplotlib", "skimage"):
        pytest.importorskip(module)
    monkeypatch.setenv("MPLBACKEND", "agg")
    space: dict[str, float] = {}
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    exec("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), space)
    assert space["after"] > 1.2 * space["before"]
