"""The recipes under docs/recipes, over their hosts, against the equations; Lightning's has a file of its own."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pages
import pytest
import recipes
import standins
import torch
from helpers import assert_close, flat64
from torch import Tensor, nn

needs_lightly = pytest.mark.skipif(find_spec("lightly") is None, reason="no lightly")
needs_byol = pytest.mark.skipif(find_spec("byol_pytorch") is None, reason="no byol_pytorch")


@pytest.fixture(autouse=True)
def _hosts() -> Iterator[None]:
    with recipes.hosts():
        yield


COMMANDS = {
    command
    for page in pages.RECIPES
    for command in re.findall(
        r"python docs/examples/((?!with_lightning)\w+\.py.*?)(?: *#.*)?$", page.read_text(), re.MULTILINE
    )
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_command_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As the pages show it, but for the number of steps."""
    name, *_ = arguments = command.split()
    for host in ("lightly", "byol_pytorch"):
        if host in name and find_spec(host) is None:
            pytest.skip(f"no {host}")
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "1"])
    runpy.run_path(str(pages.EXAMPLES / name), run_name="__main__")
    assert re.search(r"(image|byol)(_loss)? -?\d+\.\d+, dense(_loss)? \d+\.\d+", capsys.readouterr().out)


# ---- with queues ----------------------------------------------------------------------------------------------------


def with_map(encoder: Any, images: Tensor) -> tuple[Tensor, ...]:
    return (encoder.backbone(images),)


def tokens(encoder: Any, images: Tensor) -> tuple[Tensor, ...]:
    seen = encoder.vit(images)
    return (seen[:, 1:].transpose(1, 2), seen[:, 0])[: 1 + encoder.use_class_token]


def vit(use_class_token: bool) -> Any:
    recipe = recipes.example("with_vit")
    return recipe.DenseCL(recipe.ViT(size=32, width=24), 24, queue_size=10, use_class_token=use_class_token)


def fpn(grid_size: int) -> Any:
    return recipes.example("with_fpn").DenseCL(grid_size, queue_size=10)


def moco() -> Any:
    model = recipes.dense_moco()
    for encoder in (model.encoder_q, model.encoder_k):
        encoder.__dict__ |= {"head": encoder.fc, "backbone": nn.Sequential(*list(encoder)[:4])}
    return model


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., tuple[Tensor, ...]], tuple[int, ...]]] = {
    "plain": (lambda: recipes.example("moco_loop").Trainer(queue_size=13, momentum=0.9), with_map, (4, 64, 3, 2)),
    "moco": (moco, with_map, (4, 8, 3, 2)),
    "vit": (partial(vit, False), tokens, (4, 24, 16, 1)),
    "vit, class token": (partial(vit, True), tokens, (4, 24, 16, 1)),
    "fpn": (partial(fpn, 8), lambda encoder, images: encoder.pyramid(images)[1:], (4, 64, 8, 8)),
    "fpn, pooled": (partial(fpn, 3), lambda encoder, images: encoder.pyramid(images)[1:], (4, 64, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_step_with_queues(name: str) -> None:
    make, maps, shape = MODELS[name]
    model = make().double()
    step = model if name in ("plain", "moco") else partial(model, momentum=0.9)
    networks = [recipes.Network(x, x.head, partial(maps, x)) for x in (model.encoder_q, model.encoder_k)]
    images = recipes.views(4, *((32, 32) if shape[2] > 3 else (24, 16)))
    grid = getattr(model.encoder_q.head, "grid_size", None)
    assert recipes.check_moco_step(model, step, *networks, grid, images) == shape


def test_what_moco_scripts_read() -> None:
    """What main_moco.py passes by position, what main_lincls.py reads."""
    module = recipes.example("with_moco")
    model = module.DenseMoCo(standins.TinyResNet, 5, 10, 0.9, 0.07, False)
    assert (model.m, model.criterion.temperature, model.image_queue.size, model.dense_queue.size) == (0.9, 0.07, 10, 10)
    kept = {name for name in model.state_dict() if name.startswith("encoder_q.") and ".fc." not in name}
    assert kept == {f"encoder_q.{name}" for name in standins.TinyResNet(7).state_dict() if not name.startswith("fc.")}
    for query, key in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(query, key)
    with pytest.raises(ValueError, match=r"^base_encoder: got Sequential without avgpool, expected a torchvision"):
        module.backbone_map(nn.Sequential(nn.Identity()), torch.randn(1, 3, 8, 8))


class Settings(dict):
    __getattr__ = dict.__getitem__


def test_solo_learn() -> None:
    """A symmetric step with two small crops, an optimizer step, and the host's end of a batch."""
    settings = Settings(proj_hidden_dim=16, proj_output_dim=8, temperature=0.1, queue_size=12)
    model = recipes.example("with_solo_learn").DenseMoCoV2Plus(SimpleNamespace(method_kwargs=settings)).double()
    recipes.disturb(model.backbone, model.head)
    truths = [recipes.truth_of(queue) for queue in model.dense_queues]
    batch = [torch.arange(6), [*recipes.views(6, 64, 64), *recipes.views(6)], torch.arange(6)]
    with (
        recipes.inputs_of(model.backbone.avgpool) as maps_q,
        recipes.inputs_of(model.momentum_backbone.avgpool) as maps_k,
    ):
        loss = model.training_step(batch, 0)

    weights = recipes.parameters_of(model.head), recipes.parameters_of(model.head_k)
    queries, keys = ([oracle.head(w, m) for m in maps[:2]] for w, maps in zip(weights, (maps_q, maps_k), strict=True))
    dense = []
    for query, key, truth in zip(queries, keys[::-1], truths[::-1], strict=True):
        index = oracle.match(query.grid, key.grid).index
        dense.append(recipes.info_nce(query.dense, key.dense, truth, index=index, temperature=0.1).loss)
    assert_close(model.logged["train_dense_loss"], np.mean(dense), recipes.TOLERANCE, "dense term")
    host_loss = standins.MoCoV2Plus.training_step(model, batch, 0)
    assert_close(loss, 0.5 * host_loss.item() + 0.5 * np.mean(dense), recipes.TOLERANCE, "loss")

    optimizer = torch.optim.SGD(model.learnable_params, lr=0.1)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    loss.backward()
    model.on_after_backward()
    for view in (0, 1):
        recipes.check_queue(model.dense_queues[view], truths[view], keys[view].pooled)
    recipes.check_all_trained(model, model.head)
    optimizer.step()
    before, model.trainer.global_step = recipes.parameters_of(model.head_k), 1
    model.on_train_batch_end(loss, [], 0)
    recipes.check_momentum(model.head, model.head_k, before)
    assert not model.backbone.layer4._forward_hooks


# ---- lightly ---------------------------------------------------------------------------------------------------------


def lightly_moco(**options: float) -> tuple[Any, Any]:
    recipe = recipes.example("with_lightly_moco")
    model = recipe.DenseMoCo(recipe.tiny_backbone(), 64, queue_size=10, **options).double()
    return model, partial(recipe.training_step, model)


@needs_lightly
def test_lightly_moco() -> None:
    model, step = lightly_moco(temperature=0.2)
    online = recipes.Network.of(model.backbone, model.projection_head)
    momentum = recipes.Network.of(model.backbone_momentum, model.projection_head_momentum)
    recipes.check_moco_step(model, partial(step, momentum=0.9), online, momentum)


@needs_lightly
def test_image_term_is_lightlys() -> None:
    """With the defaults of lightly's example, the temperature among them."""
    from lightly.loss import NTXentLoss

    model, step = lightly_moco()
    recipes.disturb(model.backbone, model.projection_head)
    criterion = NTXentLoss(memory_bank_size=(10, 128))
    criterion.memory_bank.bank = model.image_queue.rows.clone()
    images = recipes.views()
    expected = criterion(model(images[0])[1].image, model.forward_momentum(images[1])[1].image)
    assert_close(step(*images, momentum=1.0)[0], expected, recipes.TOLERANCE)


@needs_lightly
def test_blocks_of_lightlys_page() -> None:
    """The one that loads a MoCoProjectionHead, and the one that shuffles: keys in the order of the queries."""
    from lightly.models.modules import MoCoProjectionHead

    model, _ = lightly_moco()
    theirs, features = MoCoProjectionHead(64, 64, 128).double(), torch.randn(3, 64, 5, 4, dtype=torch.float64)
    exec(pages.block_with("image_mlp", "recipes/lightly.md"), {"model": model, "moco_head_state": theirs.state_dict()})
    torch.testing.assert_close(model.projection_head(features).image, theirs(features.mean((2, 3))))
    space: dict[str, Any] = {"torch": torch}
    exec(pages.block_with("batch_unshuffle", "recipes/lightly.md"), space)
    images, _ = recipes.views()
    torch.testing.assert_close(space["forward_momentum"](model, images), model.forward_momentum(images))


# ---- BYOL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loop", "loop, cosine", pytest.param("lightly", marks=needs_lightly)])
def test_byol_step(name: str) -> None:
    if name == "lightly":
        recipe = recipes.example("with_lightly_byol")
        model = recipe.DenseBYOL(recipe.tiny_backbone(), 64).double()
        pairs = (model.backbone, model.backbone_momentum), (model.projection_head, model.projection_head_momentum)
        predictors = model.prediction_head, model.dense_prediction_head
        step = partial(recipe.training_step, model, momentum=0.9)
    else:
        model = recipes.example("byol_loop").Trainer(momentum=0.9, contrastive=name == "loop").double()
        pairs = (model.online.backbone, model.target.backbone), (model.online.head, model.target.head)
        predictors, step = (model.predictor, model.dense_predictor), model
    recipes.disturb(model)
    views, before = recipes.views(6, 24, 16), [recipes.parameters_of(target) for _, target in pairs]
    image_loss, dense_loss = step(*views)
    terms = []
    for directed in (views, views[::-1]):
        maps = [backbone(images) for backbone, images in zip(pairs[0], directed, strict=True)]
        terms.append(recipes.byol_terms(maps, pairs[1], predictors, name != "loop, cosine"))
    cosine, dense = np.transpose(terms)
    expected = -cosine.mean() if name == "lightly" else (1 - cosine).sum()
    assert_close(image_loss, expected, recipes.TOLERANCE, "image term")
    assert_close(dense_loss, dense.mean(), recipes.TOLERANCE, "dense term")
    (image_loss + dense_loss).backward()
    recipes.check_all_trained(model, pairs[1][0], *predictors)
    if name != "lightly":
        model.update_target()
    for (online, target), start in zip(pairs, before, strict=True):
        recipes.check_momentum(online, target, start)


@needs_byol
def test_byol_pytorch() -> None:
    model = recipes.dense_byol()
    alone, images = copy.deepcopy(model.learner), torch.randn(6, 3, 64, 64, dtype=torch.float64)
    nets = copy.deepcopy((model.learner.net, model.learner.target_encoder.net))
    query, key = (nn.Sequential(*list(net)[:4])(torch.cat([images, images.flip(3)])) for net in nets)
    byol_loss, dense_loss = model(images)
    dense_loss.backward()

    # Batch norm sees both views at once, so the oracle gets the layers' outputs, of which each direction takes half.
    prediction, dense_key = model.predictor(model.head(query).dense), model.target_head(key).dense
    swapped = (x.roll(6, 0) for x in (key, dense_key))  # view 1 asks view 2, and 2 asks 1
    parts = (map(flat64, x.detach().split(6)) for x in (query, *swapped, prediction))
    expected = []
    for map_q, map_k, keys, predicted in zip(*parts, strict=True):
        options = {"index": oracle.match(map_q, map_k).index, "exclude": np.arange(6)}
        expected.append(recipes.info_nce(predicted, keys, oracle.unit(keys.mean(2), 1)[0], **options).loss)
    assert_close(dense_loss, np.mean(expected), recipes.TOLERANCE)
    assert_close(byol_loss, alone(images), recipes.TOLERANCE)  # the learner's own loss is as it was
    for part in (model.head.dense_mlp, model.predictor, model.learner.net.layer4):
        assert all(p.grad.abs().max() > 0 for p in part.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in model.learner.target_encoder.parameters())
    assert not model.learner.net.layer4._forward_hooks

    pairs = ((model.learner.online_encoder, model.learner.target_encoder), (model.head, model.target_head))
    before = [recipes.parameters_of(target) for _, target in pairs]
    model.update_moving_average()
    for pair, start in zip(pairs, before, strict=True):
        recipes.check_momentum(*pair, start)
    model.learner.target_encoder = None
    with pytest.raises(ValueError, match=r"^learner: got a BYOL without target_encoder, expected one with"):
        recipes.example("with_byol_pytorch").DenseBYOL(model.learner, in_channels=64)
