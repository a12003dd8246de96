"""docs/recipes/byol-pytorch.md: the dense term beside lucidrains' BYOL, over a stand-in of it and over the package."""

from __future__ import annotations

import copy
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import recipes
import torch
from helpers import assert_close, flat64
from torch import Tensor, nn

HOSTS = recipes.hosts("byol_pytorch")


def byol_class(host: str) -> Any:
    if host == "stand-in":
        return recipes.load(recipes.STANDINS / "byol_learner.py").BYOL
    modules: dict[str, Any] = {}
    if find_spec("torchvision") is None:  # only its default augmentation, not used here, needs it
        torchvision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
        flips_and_crops = ("RandomHorizontalFlip", "RandomResizedCrop")
        for name in ("ColorJitter", "GaussianBlur", "Normalize", "RandomGrayscale", *flips_and_crops):
            setattr(transforms, name, nn.Identity)
        torchvision.transforms = transforms
        modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}
    if find_spec("accelerate") is None or find_spec("beartype") is None:
        trainer = ModuleType("byol_pytorch.trainer")  # the package's own loop
        trainer.BYOLTrainer = trainer.MockDataset = None
        modules["byol_pytorch.trainer"] = trainer
    with mock.patch.dict(sys.modules, modules):
        return importlib.import_module("byol_pytorch").BYOL


def flip(images: Tensor) -> Tensor:
    return images.flip(3)


def dense_byol(host: str) -> Any:
    module = recipes.example("with_byol_pytorch")
    options = {"augment_fn": nn.Identity(), "augment_fn2": flip, "projection_hidden_size": 32}
    learner = byol_class(host)(module.TinyResNet(), 64, hidden_layer="avgpool", moving_average_decay=0.9, **options)
    model = module.DenseBYOL(learner, in_channels=64, hidden_channels=16, out_channels=8)
    recipes.disturb(learner.target_encoder, model.target_head)
    return model.double()


@pytest.mark.parametrize("host", HOSTS)
def test_step(host: str) -> None:
    model = dense_byol(host)
    alone = copy.deepcopy(model.learner)
    heads = copy.deepcopy((model.head.dense_mlp, model.target_head.dense_mlp))
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    maps = []
    for net in copy.deepcopy((model.learner.net, model.learner.target_encoder.net)):
        both = torch.cat([images, flip(images)])
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
    model = dense_byol(host)
    pairs = ((model.learner.online_encoder, model.learner.target_encoder), (model.head, model.target_head))
    before = [recipes.parameters_of(target) for _, target in pairs]
    model.update_moving_average()
    for pair, start in zip(pairs, before, strict=True):
        recipes.check_momentum(*pair, start)


def test_views_in_two_calls() -> None:
    """Releases that send each view through the encoders by itself give the same dense term, batch norm aside."""
    model = dense_byol("stand-in").eval()
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    together = model(images)[1]

    def apart(x: Tensor) -> Tensor:
        for view in (x, flip(x)):
            model.learner.net(view)
            with torch.no_grad():
                model.learner.target_encoder.net(view)
        return torch.zeros(())

    model.learner.forward = apart
    assert_close(model(images)[1], together, recipes.TOLERANCE)


def test_without_momentum() -> None:
    module = recipes.example("with_byol_pytorch")
    learner = byol_class("stand-in")(module.TinyResNet(), 64, projection_hidden_size=32, use_momentum=False)
    with pytest.raises(ValueError, match=r"^learner: got a BYOL without target_encoder, expected one with"):
        module.DenseBYOL(learner, in_channels=64)


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(sys.modules, {"byol_pytorch": recipes.load(recipes.STANDINS / "byol_learner.py")}):
        recipes.check_main(recipes.example("with_byol_pytorch"), capsys)
