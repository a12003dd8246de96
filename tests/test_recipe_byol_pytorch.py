"""docs/recipes/byol-pytorch.md: the dense term beside lucidrains' BYOL, over a stand-in of it and over the package."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from unittest import mock

import byol_worker as worker
import pytest
import recipes
import torch
from helpers import assert_close, flat64, run_ranks
from torch import Tensor

HOSTS = recipes.hosts("byol_pytorch")


@pytest.mark.parametrize("host", HOSTS)
def test_step(host: str) -> None:
    model = worker.dense_byol(host)
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


@pytest.mark.parametrize("host", HOSTS)
def test_moving_average(host: str) -> None:
    model = worker.dense_byol(host)
    pairs = ((model.learner.online_encoder, model.learner.target_encoder), (model.head, model.target_head))
    before = [recipes.parameters_of(target) for _, target in pairs]
    model.update_moving_average()
    for pair, start in zip(pairs, before, strict=True):
        recipes.check_momentum(*pair, start)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("host", HOSTS)
def test_two_ranks_equal_one_process(tmp_path: Path, host: str) -> None:
    """DistributedDataParallel, which at step 2 refuses a trained parameter without a gradient, such as fc's."""
    model = worker.dense_byol(host)
    alone, ranks = worker.run(model, model, slice(None)), run_ranks(worker.__file__, 2, tmp_path, host)
    for step, expected in enumerate(alone):
        losses = sum(results[step]["losses"] for results in ranks) / 2
        assert_close(losses, expected["losses"], recipes.TOLERANCE, "losses")
        for results in ranks:
            assert results[step]["grad"].keys() == expected["grad"].keys()
            for name, value in expected["grad"].items():
                assert_close(results[step]["grad"][name], value, recipes.TOLERANCE, name)
            for name, value in expected["state"].items():
                assert_close(results[step]["state"][name], value, recipes.TOLERANCE, name)


def test_views_in_two_calls() -> None:
    """Releases that send each view through the encoders by itself give the same dense term, batch norm aside."""
    model = worker.dense_byol("stand-in").eval()
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
    module = recipes.example("with_byol_pytorch")
    learner = worker.byol_class("stand-in")(module.TinyResNet(), 64, projection_hidden_size=32, use_momentum=False)
    with pytest.raises(ValueError, match=r"^learner: got a BYOL without target_encoder, expected one with"):
        module.DenseBYOL(learner, in_channels=64)


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(sys.modules, {"byol_pytorch": recipes.load(recipes.STANDINS / "byol_learner.py")}):
        recipes.check_main(recipes.example("with_byol_pytorch"), capsys)
