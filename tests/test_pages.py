"""One rule for README.md and every page under docs/: what it shows is so.

Links and paths lead somewhere; code parses, and runs or stands in a tested example; a diff is that of the example;
tables, pictures and figures are those of the committed records.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pages import EXAMPLES, PAGES, RECIPES, ROOT, blocks, name_of
from recipes import PRINTED
from torch import Tensor, nn

from benchmarks import render

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_recipe = pytest.mark.parametrize("page", RECIPES, ids=name_of)

# ---- links and paths ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_paths_exist(page: Path) -> None:
    """In prose and in commands, written from the root of the repository."""
    for path in re.findall(r"(?<![\w/.])(?:docs|tests|benchmarks|densecl_ops)/[\w./-]+\.\w+", page.read_text()):
        assert (ROOT / path).exists(), path


# ---- code -----------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Stands for a ResNet-50 without pooling: (B, 3, 224, 224) -> (B, 2048, 7, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 32, 32), nn.Conv2d(8, 2048, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def run_steps(page: Path, directory: Path) -> None:
    """The first block is the MoCo step that the second one replaces; a third one is a BYOL step."""
    view_q, view_k = torch.randn(2, 2, 3, 224, 224)
    space: dict[str, Any] = {"torch": torch, "F": F, "view_q": view_q, "view_k": view_k}
    space |= {"backbone_q": Backbone(), "backbone_k": Backbone()}
    _, moco, *byol = blocks(page)
    exec(moco, space)
    terms = space["image_loss"].item(), space["dense_loss"].item()
    assert space["loss"].item() == pytest.approx(sum(terms) / 2)
    assert all(p.grad.any() for p in space["head_q"].parameters())
    assert [int(space[queue].position) for queue in ("image_queue", "dense_queue")] == [2, 2]
    if not byol:
        return
    space |= {"online_backbone": Backbone(), "target_backbone": Backbone(), "target_head": space["head_k"]}
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
    "docs/matching.md": run_in_order("kornia"),
    "docs/training.md": run_in_order("matplotlib"),
    "docs/distributed.md": run_on_two_processes,
}
RUN_ELSEWHERE = {
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

FILES = sorted([*EXAMPLES.glob("with_*.py"), *EXAMPLES.glob("*_loop.py")])
COMMANDS = [
    command.split()
    for page in RECIPES
    for command in re.findall(r"^ +python docs/examples/(.*?)(?: *#.*)?$", page.read_text(), re.MULTILINE)
]
# Lines of a host's own script, made of names that the tests of the recipe call.
HOST_LINES = {
    "from with_moco import DenseMoCo",
    "model = DenseMoCo(",
    "from with_byol_pytorch import DenseBYOL",
    "model = DenseBYOL(learner, in_channels=2048)",
    "from with_solo_learn import DenseMoCoV2Plus",
    'METHODS["mocov2plus"] = DenseMoCoV2Plus',
}
RUN_BY_RECIPE_TESTS = ("moco_head_state", "batch_unshuffle")  # blocks that test_recipe_lightly.py runs


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_can_be_copied_alone(file: Path) -> None:
    assert not imported(file) & {"", *(other.stem for other in EXAMPLES.glob("*.py"))}
    assert [page for page in RECIPES if f"(../examples/{file.name})" in page.read_text()]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_runs(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = command
    file = EXAMPLES / name
    needed = imported(file)
    needed |= {"torchvision"} if needed & {"lightly", "byol_pytorch"} else set()  # without it they cannot be imported
    missing = [module for module in needed - {"densecl_ops"} if find_spec(module) is None]
    if missing:
        pytest.skip(f"no {missing}")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(file), run_name="__main__")
    assert re.search(PRINTED, capsys.readouterr().out)


def code_lines(text: str) -> list[str]:
    lines = (re.sub(r"(^|\s+)# .*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def sources(page: Path) -> list[list[str]]:
    """Lines of the recipe's files."""
    names = dict.fromkeys(re.findall(r"\(\.\./examples/(\w+\.py)\)", page.read_text()))
    return [code_lines((EXAMPLES / name).read_text()) for name in names]


def in_order(lines: list[str], source: list[str]) -> bool:
    rest = iter(source)
    return all(line in rest for line in lines)


@each_recipe
def test_shown_code_is_the_recipes(page: Path) -> None:
    texts = ["\n".join(source) for source in sources(page)]
    assert texts
    for block in blocks(page):
        if not any(word in block for word in RUN_BY_RECIPE_TESTS):
            assert any("\n".join(code_lines(block)) in text for text in texts), block


@each_recipe
def test_diff_is_the_recipes(page: Path) -> None:
    """Added lines and what stays between them are the file's, in its order; removed ones are not in it.

    In a diff of the host's own script, which we do not have, the lines that stay are the host's.
    """
    diffs = blocks(page, "diff")
    assert diffs
    for diff in diffs:
        lines = {sign: [line[1:] for line in diff.splitlines() if line[:1] in sign] for sign in ("+", "-", "+ ")}
        added, removed, kept = ([x for x in code_lines("\n".join(lines[s])) if x not in HOST_LINES] for s in lines)
        own = not set(code_lines("\n".join(lines["+"]))) & HOST_LINES
        shown = kept if own else added
        source = next((source for source in sources(page) if in_order(shown, source)), None)
        assert source is not None, diff
        assert [line for line in removed if line in source] == []
        assert lines["+"]


@each_recipe
def test_hunks_are_whole(page: Path) -> None:
    """As long as their headers say, before and after."""
    for diff in blocks(page, "diff"):
        _, *parts = re.split(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@.*\n", diff, flags=re.MULTILINE)
        for before, after, hunk in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            signs = [line[:1] for line in hunk.splitlines()]
            assert [signs.count("-") + signs.count(" "), signs.count("+") + signs.count(" ")] == [
                int(before),
                int(after),
            ]


# ---- tables, pictures, figures --------------------------------------------------------------------------------------


@each_page
def test_tables_are_those_of_the_records(page: Path) -> None:
    text = page.read_text()
    assert text.count(":begin -->") == text.count(":end -->") == len(render.MARKED.findall(text))
    assert render.rendered(name_of(page)) == text, "run `python -m benchmarks render`"


def test_plots_are_those_of_the_records() -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from benchmarks.plots import digest

    drawn = list(render.plots())
    assert drawn
    for source, target, _ in drawn:
        assert image.open(target).info["Source"] == digest(source), "run `python -m benchmarks render`"


TRAINING = ROOT / "docs" / "training.md"
RECORDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results/curves_cpu").glob("*.json")}
LIMIT = math.log(1 + RECORDS["random"]["settings"]["queue_size"])


def test_records_are_whole() -> None:
    for name, run in RECORDS.items():
        assert run["name"] == name
        assert run["commit"]
        columns = {"image_loss", "dense_loss", "top1", "top5", "match_score", "mutual_share"}
        assert run["history"].keys() == columns
        assert {len(values) for values in run["history"].values()} == {run["settings"]["steps"]}
        assert all(a <= b for a, b in zip(run["history"]["top1"], run["history"]["top5"], strict=True))


def said() -> list[str]:
    """Every phrase of docs/training.md that holds a decimal fraction, made from the records."""
    runs = {name: run["history"] for name, run in RECORDS.items()}
    random, broken, same, fast = (runs[name] for name in ("random", "enqueue-first", "same-view", "high-lr"))
    late, sooner = (runs[f"{start}-no-warmup"]["dense_loss"] for start in ("random", "empty"))
    low, lower = min(runs["random-no-warmup"]["mutual_share"]), min(random["mutual_share"])
    untrained = json.loads((ROOT / "benchmarks/results/demo_cpu/seed0.json").read_text())["rows"]["random weights"]
    scores = f"match score rises to {max(fast['match_score']):.2f} while the mutual share falls to"
    falls = min(fast["dense_loss"][50:])
    return [
        "temperature 0.2",
        "within 1.5 cells",
        f"Random weights reach {untrained['close']:.2f}.",
        f"(top-1 is {random['top1'][0]:.2f} at the first step)",
        f"({random['top1'][1]:.2f} at the second step)",
        f"log(1 + K), here {LIMIT:.2f}.",
        f"log(1 + 32) = {math.log(33):.2f}",
        f"(peak {max(sooner):.2f} at step {top(sooner)}, not {max(late):.2f} at step {top(late)})",
        f"(peak {max(random['dense_loss']):.2f})",
        f"the run with the same view twice has {np.mean(same['top1'][-20:]):.2f}",
        f"Random weights start at {random['mutual_share'][0]:.2f} here",
        f"to {lower:.2f} with the warm-up and to {low:.2f} without",
        f"Top-1 at the *first* step is {broken['top1'][0]:.2f} instead of {random['top1'][0]:.2f}",
        f"At the first step match score and mutual share are {same['mutual_share'][0]:.2f}",
        f"Top-1 is {same['top1'][1]:.2f} at the second step",
        f"{scores} {min(fast['mutual_share']):.2f}",
        f"log(1 + K) = {LIMIT:.2f}",
        f"falls to {falls:.2f} at step {fast['dense_loss'].index(falls) + 1}",
    ]


def top(values: list[float]) -> int:
    """The step of the largest."""
    return values.index(max(values)) + 1


def test_figures_in_prose_are_those_of_the_records() -> None:
    prose = re.sub(r"```.*?```|<!-- curves:begin -->.*?<!-- curves:end -->", "", TRAINING.read_text(), flags=re.DOTALL)
    prose = " ".join(prose.split())
    for phrase in said():
        assert phrase in prose, phrase
        prose = prose.replace(phrase, "")
    assert not re.findall(r"\d+\.\d+", prose)


def test_prose_claims_that_are_not_numbers() -> None:
    runs = {name: {key: np.array(v) for key, v in run["history"].items()} for name, run in RECORDS.items()}
    healthy = [runs[name] for name in ("random", "empty", "random-no-warmup", "empty-no-warmup")]
    for run in healthy:  # the image term has a low and rises again
        smooth = np.convolve(run["image_loss"], np.ones(10) / 10, "valid")[20:]
        assert 30 < smooth.argmin() + 26 < 80
        assert run["image_loss"][-20:].mean() > smooth.min() + 0.3
    assert runs["empty"]["image_loss"][0] == runs["empty"]["dense_loss"][0] == 0
    for start in ("random", "empty"):  # about log(1 + K) during the warm-up only
        assert runs[start]["dense_loss"].max() == pytest.approx(LIMIT, abs=0.1)
        assert runs[start]["dense_loss"].argmax() + 1 in range(28, 37)  # the queue is full after 32 steps
        assert runs[f"{start}-no-warmup"]["dense_loss"].max() < LIMIT - 1
        assert runs[f"{start}-no-warmup"]["dense_loss"].argmax() + 1 < 16
        for key in ("top1", "match_score", "mutual_share"):
            assert runs[f"{start}-no-warmup"][key][-20:].mean() > runs[start][key][-20:].mean()
    at_150 = slice(130, 150)
    broken, sound = runs["enqueue-first"], runs["random"]
    assert broken["dense_loss"][at_150].mean() > sound["dense_loss"][at_150].mean()
    assert broken["top1"][at_150].mean() < sound["top1"][at_150].mean()
    same = runs["same-view"]
    assert same["mutual_share"][0] == 1
    assert same["dense_loss"][at_150].mean() < sound["dense_loss"][at_150].mean()
    collapsed = runs["high-lr"]
    assert collapsed["image_loss"][-20:].mean() > collapsed["image_loss"][80:100].mean()
    assert collapsed["dense_loss"][-20:].mean() > collapsed["dense_loss"][80:100].mean()
