"""What the README says: its code runs, and its figures are those of the committed result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Backbone(nn.Module):
    """Stands for a ResNet-50 without pooling: (B, 3, 224, 224) -> (B, 2048, 7, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 32, 32), nn.Conv2d(8, 2048, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def names() -> dict[str, object]:
    view_q, view_k = torch.randn(2, 2, 3, 224, 224)
    return {
        "torch": torch,
        "F": F,
        "backbone_q": Backbone(),
        "backbone_k": Backbone(),
        "view_q": view_q,
        "view_k": view_k,
    }


def test_moco_step() -> None:
    space = names()
    exec(BLOCKS[1], space)
    assert space["loss"].item() > 0
    assert all(p.grad is not None for p in space["head_q"].parameters())
    assert int(space["dense_queue"].position) == 2


def test_byol_step() -> None:
    space = names()
    exec(BLOCKS[1], space)
    space |= {"online_backbone": Backbone(), "target_backbone": Backbone(), "target_head": space["head_k"]}
    space |= {"online_head": space["head_q"], "dense_predictor": nn.Conv2d(128, 128, 1)}
    space |= {"view_1": space["view_q"], "view_2": space["view_k"]}
    exec(BLOCKS[2], space)
    space["dense_loss"].backward()
    assert space["dense_predictor"].weight.grad.any()


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_figures_come_from_the_result_files(page: str) -> None:
    from benchmarks.render import rendered

    assert rendered(page) == (ROOT / page).read_text(), "run `python -m benchmarks render`"


def test_plots_are_those_of_the_result_files() -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from benchmarks.plots import digest
    from benchmarks.render import plots

    drawn = list(plots())
    assert drawn
    for source, target, _ in drawn:
        assert image.open(target).info["Source"] == digest(source), "run `python -m benchmarks render`"


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
