"""docs/recipes/byol-pytorch.md: the dense term beside lucidrains' BYOL."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import recipe_worker as worker
import recipes
import torch
from helpers import assert_close, flat64
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("byol_pytorch") is None, reason="no byol_pytorch")


def test_step() -> None:
    model = worker.dense_byol()
    alone = copy.deepcopy(model.learner)
    heads = copy.deepcopy((model.head.dense_mlp, model.target_head.dense_mlp))
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    maps = []
    for net in copy.deepcopy((model.learner.net, model.learner.target_encoder.net)):
        both = torch.cat([images, worker.flip(images)])
        maps.append(flat64(net.layer4(net.relu(net.bn1(net.conv1(both))))))
    byol_loss, dense_loss = model(images)
    dense_loss.backward()

    query, key = (recipes.perceptron(head, features) for head, features in zip(heads, maps, strict=True))
    prediction = recipes.perceptron(model.predictor, query)
    first, second = slice(6), slice(6, 12)
    expected = 0.5 * sum(
        recipes.dense_direction((maps[0][one], maps[1][two]), prediction[one], key[two])
        for one, two in ((first, second), (second, first))
    )
    assert_close(dense_loss, expected, recipes.TOLERANCE)
    assert_close(byol_loss, alone(images), recipes.TOLERANCE)  # the learner's own loss is as it was
    for part in (model.head.dense_mlp, model.predictor, model.learner.net.layer4):
        assert all(p.grad.abs().max() > 0 for p in part.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in model.learner.target_encoder.parameters())
    assert not model.learner.net.layer4._forward_hooks
    assert not model.learner.target_encoder.net.layer4._forward_hooks

    pairs = ((model.learner.online_encoder, model.learner.target_encoder), (model.head, model.target_head))
    before = [recipes.parameters_of(target) for _, target in pairs]
    model.update_moving_average()
    for pair, start in zip(pairs, before, strict=True):
        recipes.check_momentum(*pair, start)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    worker.check_two_ranks(tmp_path, "byol-pytorch")


def test_views_in_two_calls() -> None:
    """Releases that send each view through the encoders by itself give the same dense term, batch norm aside."""
    model = worker.dense_byol().eval()
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    together = model(images)[1]

    def apart(x: Tensor) -> Tensor:
        for view in (x, worker.flip(x)):
            model.learner.net(view)
            with torch.no_grad():
                model.learner.target_encoder.net(view)
        return torch.zeros(())

    model.learner.forward = apart
    assert_close(model(images)[1], together, recipes.TOLERANCE)


def test_without_momentum() -> None:
    recipe = recipes.example("with_byol_pytorch")
    learner = worker.byol_pytorch().BYOL(recipe.TinyResNet(), 64, projection_hidden_size=32, use_momentum=False)
    with pytest.raises(ValueError, match=r"^learner: got a BYOL without target_encoder, expected one with"):
        recipe.DenseBYOL(learner, in_channels=64)


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    worker.byol_pytorch()
    recipes.check_main(recipes.example("with_byol_pytorch"), capsys)
