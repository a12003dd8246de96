"""One rule for README.md and every page under docs/: what it shows is so.

Links and paths lead somewhere; code parses, and runs or is a tested example's; tables and pictures are those of the
committed records; the API reference is complete.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pages import DOCS, EXAMPLES, PAGES, RECIPES, ROOT, blocks, name_of
from torch import nn

from benchmarks import render

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_recipe = pytest.mark.parametrize("page", RECIPES, ids=name_of)


@each_page
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    """Links, and what prose and commands write from the root of the repository; `make docs` sees to the anchors."""
    text = page.read_text()
    for target in re.findall(r"\]\(((?!http|#)[^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"(?<![\w/.])(?:docs|tests|benchmarks|densecl_ops)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path


# ---- code -----------------------------------------------------------------------------------------------------------


def backbone() -> nn.Module:
    """Stands for a ResNet-50 without pooling: (B, 3, 224, 224) -> (B, 2048, 7, 7)."""
    return nn.Sequential(nn.Conv2d(3, 8, 32, 32), nn.Conv2d(8, 2048, 1))


def run_steps(page: Path, directory: Path) -> None:
    """The first block is the MoCo step that the second one replaces; a third one is a BYOL step."""
    view_q, view_k = torch.randn(2, 2, 3, 224, 224)
    space: dict[str, Any] = {"torch": torch, "F": F, "view_q": view_q, "view_k": view_k}
    space |= {"backbone_q": backbone(), "backbone_k": backbone()}
    _, moco, *byol = blocks(page)
    exec(moco, space)
    terms = space["image_loss"].item(), space["dense_loss"].item()
    assert space["loss"].item() == pytest.approx(sum(terms) / 2)
    assert all(p.grad.any() for p in space["head_q"].parameters())
    assert [int(space[queue].position) for queue in ("image_queue", "dense_queue")] == [2, 2]
    if not byol:
        return
    space |= {"online_backbone": backbone(), "target_backbone": backbone(), "target_head": space["head_k"]}
    space |= {"online_head": space["head_q"], "dense_predictor": nn.Conv2d(128, 128, 1)}
    space |= {"view_1": view_q, "view_2": view_k}
    exec(*byol, space)
    space["dense_loss"].backward()
    assert space["dense_predictor"].weight.grad.any()


def run_in_order(*modules: str) -> Callable[[Path, Path], None]:
    """The blocks one after the other; an `assert` in them is the page's own claim."""

    def run(page: Path, directory: Path) -> None:
        for module in modules:
            pytest.importorskip(module)
        space: dict[str, Any] = {}
        for block in blocks(page):
            exec(block, space)
        assert space["loss"].isfinite()

    return run


def run_on_two_processes(page: Path, directory: Path) -> None:
    """The blocks are one script."""
    if not torch.distributed.is_available() or sys.platform == "win32":
        pytest.skip("torchrun")
    (directory / "page.py").write_text("".join(blocks(page)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "page.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


RUNS = {
    "README.md": run_steps,
    "docs/index.md": run_steps,
    "docs/faq.md": run_in_order(),
    "docs/multi-crop.md": run_in_order(),
    "docs/matching.md": run_in_order("kornia"),
    "docs/training.md": run_in_order("matplotlib"),
    "docs/distributed.md": run_on_two_processes,
}
RUN_ELSEWHERE = {
    "docs/pretraining.md": "test_pretrain.py",
    "docs/checkpoints.md": "test_interop.py",  # on checkpoints that only that file can write
    "docs/use-the-weights.md": "test_interop.py",  # where torchvision or timm is installed
}


@each_page
def test_code_parses_and_has_a_test(page: Path) -> None:
    for block in blocks(page):
        ast.parse(textwrap.dedent(block))
    tested = {*RUNS, *RUN_ELSEWHERE, *map(name_of, RECIPES)}
    assert name_of(page) in tested or not blocks(page), "who runs it?"


@pytest.mark.parametrize("name", RUNS)
def test_code_runs(name: str, tmp_path: Path) -> None:
    RUNS[name](ROOT / name, tmp_path)


# ---- recipes --------------------------------------------------------------------------------------------------------

# Lines of a host's own script, made of names that the tests of the recipe call.
HOST_LINES = {
    "from with_moco import DenseMoCo",
    "model = DenseMoCo(",
    "from with_byol_pytorch import DenseBYOL",
    "model = DenseBYOL(learner, in_channels=2048)",
    "from with_solo_learn import DenseMoCoV2Plus",
    'METHODS["mocov2plus"] = DenseMoCoV2Plus',
}
RUN_BY_RECIPE_TESTS = ("moco_head_state", "batch_unshuffle")  # blocks that test_recipes.py runs


def code_lines(text: str) -> list[str]:
    lines = (re.sub(r"(^|\s+)# .*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


@each_recipe
def test_shown_code_is_the_recipes(page: Path) -> None:
    """Blocks as a whole; of diffs the added lines."""
    names = dict.fromkeys(re.findall(r"\(\.\./examples/(\w+\.py)\)", page.read_text()))
    sources = [code_lines((EXAMPLES / name).read_text()) for name in names]
    for block in blocks(page):
        if not any(word in block for word in RUN_BY_RECIPE_TESTS):
            assert any("\n".join(code_lines(block)) in "\n".join(source) for source in sources), block
    for diff in blocks(page, "diff"):
        added = code_lines("\n".join(line[1:] for line in diff.splitlines() if line.startswith("+")))
        assert any(set(added) <= HOST_LINES | set(source) for source in sources), diff


# ---- tables, pictures ------------------------------------------------------------------------------------------------


@each_page
def test_tables_are_those_of_the_records(page: Path) -> None:
    text = page.read_text()
    assert text.count(":begin -->") == text.count(":end -->") == len(render.MARKED.findall(text))
    assert render.rendered(name_of(page)) == text, "run `python -m benchmarks render`"


def test_plots_are_those_of_the_records() -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from benchmarks.plots import digest, plots

    for name, source, _ in plots():
        picture = image.open(ROOT / "docs" / "images" / f"{name}.png")
        assert picture.info["Source"] == digest(source), "run `python -m benchmarks render`"


# ---- the site --------------------------------------------------------------------------------------------------------


def test_api_reference_names_everything_public_once() -> None:
    names = ("functional", "interop", "metrics", "visualize")
    modules = ("densecl_ops", *(f"densecl_ops.{name}" for name in names))
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
    for cell in json.loads((DOCS / "notebook.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    assert space["after"] > 1.2 * space["before"]
