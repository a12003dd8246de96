"""docs/recipes/lightly.md: MoCo and BYOL of lightly's examples, over lightly itself."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pages
import pytest
import recipes
import torch
from helpers import assert_close
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(find_spec("lightly") is None, reason="no lightly")


@pytest.fixture(autouse=True)
def _torchvision() -> Iterator[None]:
    """lightly asks for it again when it is used."""
    with recipes.imported(**recipes.torchvision()):
        yield


def moco(**options: float) -> tuple[ModuleType, Any]:
    recipe = recipes.example("with_lightly_moco")
    return recipe, recipe.DenseMoCo(recipe.tiny_backbone(), 64, queue_size=10, **options).double()


def test_moco_step() -> None:
    recipe, model = moco(temperature=0.2)
    recipes.check_moco_step(
        model,
        lambda *images: recipe.training_step(model, *images, momentum=0.9),
        recipes.Network.of(model.backbone, model.projection_head),
        recipes.Network.of(model.backbone_momentum, model.projection_head_momentum),
    )


def test_image_term_is_lightlys() -> None:
    """With the defaults of lightly's example, the temperature among them."""
    from lightly.loss import NTXentLoss

    recipe, model = moco()
    recipes.disturb(model.backbone, model.projection_head)
    criterion = NTXentLoss(memory_bank_size=(10, 128))
    criterion.memory_bank.bank = model.image_queue.rows.clone()
    images = recipes.views()
    expected = criterion(model(images[0])[1].image, model.forward_momentum(images[1])[1].image)
    image_loss, _ = recipe.training_step(model, *images, momentum=1.0)
    assert_close(image_loss, expected, recipes.TOLERANCE)


def test_image_branch_is_lightlys_projection_head() -> None:
    """The page's block that loads a MoCoProjectionHead."""
    from lightly.models.modules import MoCoProjectionHead

    model = recipes.example("with_lightly_moco").DenseMoCo(nn.Identity(), 24)
    theirs = MoCoProjectionHead(24, 24, 128)
    exec(pages.block_with("image_mlp", "recipes/lightly.md"), {"model": model, "moco_head_state": theirs.state_dict()})
    features = torch.randn(3, 24, 5, 4)
    torch.testing.assert_close(model.projection_head(features).image, theirs(features.mean((2, 3))))


def test_shuffle() -> None:
    """The page's forward_momentum with a shuffle gives the keys in the order of the queries."""
    _, model = moco()
    space: dict[str, Any] = {"torch": torch}
    exec(pages.block_with("batch_unshuffle", "recipes/lightly.md"), space)
    images, _ = recipes.views()

    def flatten(output: tuple[Tensor, Any]) -> tuple[Tensor, ...]:
        return (output[0], *output[1])

    shuffled, plain = space["forward_momentum"](model, images), model.forward_momentum(images)
    for pair in zip(flatten(shuffled), flatten(plain), strict=True):
        torch.testing.assert_close(*pair)


def test_byol_step() -> None:
    recipe = recipes.example("with_lightly_byol")
    model = recipe.DenseBYOL(recipe.tiny_backbone(), 64).double()
    recipes.disturb(model)
    images = recipes.views()
    pairs = ((model.backbone, model.backbone_momentum), (model.projection_head, model.projection_head_momentum))
    before = [recipes.parameters_of(momentum) for _, momentum in pairs]
    heads = pairs[1]
    with recipes.inputs_of(heads[0]) as maps_q, recipes.inputs_of(heads[1]) as maps_k:
        image_loss, dense_loss = recipe.training_step(model, *images, momentum=0.9)
    recipes.check_maps(maps_q, tuple(map(model.backbone, images)))
    recipes.check_maps(maps_k, tuple(map(model.backbone_momentum, images[::-1])))
    for pair, start in zip(pairs, before, strict=True):
        recipes.check_momentum(*pair, start)

    predictors = model.prediction_head.layers, model.dense_prediction_head
    both = [recipes.byol_terms(maps, heads, predictors) for maps in zip(maps_q, maps_k, strict=True)]
    cosine, dense = np.transpose(both)
    assert_close(image_loss, -cosine.mean(), recipes.TOLERANCE, "image term")
    assert_close(dense_loss, dense.mean(), recipes.TOLERANCE, "dense term")
    (0.5 * image_loss + 0.5 * dense_loss).backward()
    recipes.check_all_trained(model, model.projection_head, model.prediction_head, model.dense_prediction_head)


@pytest.mark.parametrize("name", ["with_lightly_moco", "with_lightly_byol"])
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipes.check_main(recipes.example(name), capsys)
