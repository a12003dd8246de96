"""The recipes under docs/recipes, over their hosts: a step is that of plain torch."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import runpy
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pages
import pytest
import recipes
import standins
import torch
import torch.nn.functional as F
from helpers import assert_same
from recipes import assert_close, assert_same_step, encode, encoder_of, example, info_nce, matched, move
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

with contextlib.suppress(ImportError):
    import lightning.pytorch as pl  # before the stand-ins, which torchmetrics would take for torchvision

needs = {
    host: pytest.mark.skipif(find_spec(host) is None, reason=f"no {host}")
    for host in ("lightly", "lightning", "byol_pytorch")
}


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in recipes.stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)


COMMANDS = {
    command: [mark for host, mark in needs.items() if host in command]
    for page in pages.RECIPES
    for command in re.findall(r"python docs/examples/(\w+\.py.*?)(?: *#.*)?$", page.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("command", [pytest.param(command, marks=marks) for command, marks in COMMANDS.items()])
def test_command_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As the pages show it, but for the number of steps."""
    name, *_ = arguments = command.split()
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "1"])
    runpy.run_path(str(pages.EXAMPLES / name), run_name="__main__")
    assert re.search(r"(image|byol)(_loss)? -?\d+\.\d+, dense(_loss)? \d+\.\d+", capsys.readouterr().out)


# ---- with queues ----------------------------------------------------------------------------------------------------


def resnet_map(network: Any, images: Tensor) -> Tensor:
    return network.layer4(network.relu(network.bn1(network.conv1(images))))


def encode_resnet(encoder: Any, images: Tensor) -> tuple[Tensor, Any]:
    features = resnet_map(encoder, images)
    return features, encoder.fc(features)


def encode_tokens(encoder: Any, images: Tensor) -> tuple[Tensor, Any]:
    tokens = encoder.vit(images).transpose(1, 2)
    projection = encoder.head(tokens[:, :, 1:])
    if encoder.use_class_token:
        projection = projection._replace(image=encoder.head.image_mlp(tokens[:, :, 0]))
    return tokens[:, :, 1:], projection


def encode_level(encoder: Any, images: Tensor) -> tuple[Tensor, Any]:
    _, level = encoder.pyramid(images)
    return F.adaptive_avg_pool2d(level, encoder.head.grid_size), encoder.head(level)


def vit(use_class_token: bool) -> Any:
    recipe = example("with_vit")
    return recipe.DenseCL(recipe.ViT(size=32, width=24), 24, queue_size=10, use_class_token=use_class_token)


def lightly_moco() -> Any:
    recipe = example("with_lightly_moco")
    model = recipe.DenseMoCo(recipe.tiny_backbone(), 64, queue_size=10)
    model.step = partial(recipe.training_step, model)
    return model


def encoders_of(model: Any) -> tuple[nn.Module, nn.Module]:
    """The online and the momentum network."""
    if hasattr(model, "encoder_q"):
        return model.encoder_q, model.encoder_k
    momentum = encoder_of(model.backbone_momentum, model.projection_head_momentum)
    return encoder_of(model.backbone, model.projection_head), momentum


MODELS = {
    "plain": (lambda: example("moco_loop").Trainer(13, momentum=0.9), encode, {}, (24, 16)),
    "moco": (recipes.dense_moco, encode_resnet, {}, (24, 16)),
    "vit": (partial(vit, False), encode_tokens, {"momentum": 0.9}, (32, 32)),
    "vit, class token": (partial(vit, True), encode_tokens, {"momentum": 0.9}, (32, 32)),
    "fpn": (lambda: example("with_fpn").DenseCL(8, 10), encode_level, {"momentum": 0.9}, (32, 32)),
    "fpn, pooled": (lambda: example("with_fpn").DenseCL(3, 10), encode_level, {"momentum": 0.9}, (32, 32)),
    "lightly": (lightly_moco, encode, {"momentum": 0.9}, (24, 16)),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs.get(name, ())) for name in MODELS])
def test_step_with_queues(name: str) -> None:
    make, encode, options, size = MODELS[name]
    model, views = make().double(), recipes.views(4, *size)
    recipes.disturb(encoders_of(model)[0])
    twin = copy.deepcopy(model)
    image, dense, *rank = getattr(model, "step", model)(*views, **options)
    move(*encoders_of(twin))
    queues, temperature = (twin.image_queue, twin.dense_queue), 0.5 if name == "lightly" else 0.2
    expected = recipes.moco_terms(*encoders_of(twin), queues, views, encode, temperature)
    assert_close((image, dense, *rank), expected[: 2 + len(rank)])
    (0.3 * image + 0.7 * dense).backward()
    (0.3 * expected[0] + 0.7 * expected[1]).backward()
    assert_same_step(model, twin)


def test_what_moco_scripts_read() -> None:
    """What main_moco.py passes by position, what main_lincls.py reads."""
    module = example("with_moco")
    model = module.DenseMoCo(module.TinyResNet, 5, 10, 0.9, 0.07, False)
    assert (model.m, model.criterion.temperature, model.image_queue.size, model.dense_queue.size) == (0.9, 0.07, 10, 10)
    kept = {name for name in model.state_dict() if name.startswith("encoder_q.") and ".fc." not in name}
    assert kept == {f"encoder_q.{name}" for name in module.TinyResNet(7).state_dict() if not name.startswith("fc.")}
    assert_same(model.encoder_k.state_dict(), model.encoder_q.state_dict())
    with pytest.raises(ValueError, match=r"^base_encoder: got Sequential without avgpool, expected a torchvision"):
        module.backbone_map(nn.Sequential(nn.Identity()), torch.randn(1, 3, 8, 8))


def test_solo_learn() -> None:
    """A symmetric step with two small crops, an optimizer step, and what the host moves then."""
    settings = SimpleNamespace(proj_hidden_dim=16, proj_output_dim=8, temperature=0.1, queue_size=12)
    settings.get = lambda name, default: default
    config = SimpleNamespace(method_kwargs=settings, backbone=example("with_byol_pytorch").TinyResNet)
    model = example("with_solo_learn").DenseMoCoV2Plus(config).double()
    recipes.disturb(model.backbone, model.head)
    twin = copy.deepcopy(model)
    batch = [torch.arange(6), [*recipes.views(6, 64, 64), *recipes.views(6)], torch.arange(6)]
    loss = model.training_step(batch, 0)

    maps_q, maps_k = ([resnet_map(x, crop) for crop in batch[1][:2]] for x in (twin.backbone, twin.momentum_backbone))
    keys = [twin.head_k(features) for features in maps_k]
    dense = 0
    for map_q, map_k, key, queue in zip(maps_q, maps_k[::-1], keys[::-1], twin.dense_queues[::-1], strict=True):
        query, positive = twin.head(map_q).dense.flatten(2), matched(map_q, map_k, key.dense)
        dense = dense + 0.5 * info_nce(query, positive, queue.rows, temperature=0.1)[0]
    assert_close(model.logged["train_dense_loss"], dense)
    expected = 0.5 * standins.MoCoV2Plus.training_step(twin, batch, 0) + 0.5 * dense
    assert_close(loss, expected)
    assert not model.backbone.layer4._forward_hooks

    loss.backward()
    expected.backward()
    model.on_after_backward()
    for queue, key in zip(twin.dense_queues, keys, strict=True):
        recipes.enqueue(queue, key.pooled)
    assert_same_step(model, twin)
    torch.optim.SGD(model.learnable_params, lr=0.1).step()
    torch.optim.SGD((p for p in twin.parameters() if p.requires_grad), lr=0.1).step()
    for pair in model.momentum_pairs:
        move(*pair)
    move(twin.backbone, twin.momentum_backbone)
    move(twin.head, twin.head_k)
    assert_same_step(model, twin)


# ---- lightly ---------------------------------------------------------------------------------------------------------


@needs["lightly"]
def test_image_term_is_lightlys() -> None:
    """With the defaults of lightly's example, the temperature among them."""
    from lightly.loss import NTXentLoss

    model, images = lightly_moco().double(), recipes.views()
    criterion = NTXentLoss(memory_bank_size=(10, 128))
    criterion.memory_bank.bank = model.image_queue.rows.clone()
    expected = criterion(model(images[0])[1].image, model.forward_momentum(images[1])[1].image)
    assert_close(model.step(*images, momentum=1.0)[0], expected)


@needs["lightly"]
def test_blocks_of_lightlys_page() -> None:
    """The one that loads a MoCoProjectionHead, and the one that shuffles: keys in the order of the queries."""
    from lightly.models.modules import MoCoProjectionHead

    model = lightly_moco().double()
    theirs, features = MoCoProjectionHead(64, 64, 128).double(), torch.randn(3, 64, 5, 4, dtype=torch.float64)
    exec(pages.block_with("image_mlp", "recipes/lightly.md"), {"model": model, "moco_head_state": theirs.state_dict()})
    assert_close(model.projection_head(features).image, theirs(features.mean((2, 3))))
    space: dict[str, Any] = {"torch": torch}
    exec(pages.block_with("batch_unshuffle", "recipes/lightly.md"), space)
    images, _ = recipes.views()
    assert_close(space["forward_momentum"](model, images), model.forward_momentum(images))


# ---- BYOL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loop", "loop, cosine", pytest.param("lightly", marks=needs["lightly"])])
def test_byol_step(name: str) -> None:
    if name == "lightly":
        recipe = example("with_lightly_byol")
        model = recipe.DenseBYOL(recipe.tiny_backbone(), 64).double()
    else:
        model = example("byol_loop").Trainer(momentum=0.9, contrastive=name == "loop").double()
    recipes.disturb(model)
    twin, views = copy.deepcopy(model), recipes.views(6, 24, 16)
    if name == "lightly":
        image_loss, dense_loss = recipe.training_step(model, *views, momentum=0.9)
        (online, target), predictors = encoders_of(twin), (twin.prediction_head, twin.dense_prediction_head)
        move(online, target)
    else:
        image_loss, dense_loss = model(*views)
        online, target, predictors = twin.online, twin.target, (twin.predictor, twin.dense_predictor)

    cosine = dense = 0
    for first, second in (views, views[::-1]):
        (map_q, query), (map_k, key) = encode(online, first), encode(target, second)
        cosine = cosine + 0.5 * F.cosine_similarity(predictors[0](query.image), key.image).mean()
        prediction, positive = predictors[1](query.dense).flatten(2), matched(map_q, map_k, key.dense)
        if name == "loop, cosine":
            dense = dense + 1 - F.cosine_similarity(prediction, positive).mean()
        else:
            dense = dense + 0.5 * info_nce(prediction, positive, F.normalize(key.pooled), exclude_own=True)[0]
    image = -cosine if name == "lightly" else 2 - 2 * cosine
    assert_close((image_loss, dense_loss), (image, dense))
    (image_loss + dense_loss).backward()
    (image + dense).backward()
    if name != "lightly":
        model.update_target()
        move(online, target)
    assert_same_step(model, twin)


@needs["byol_pytorch"]
def test_byol_pytorch() -> None:
    model = recipes.dense_byol()
    twin, images = copy.deepcopy(model), torch.randn(6, 3, 64, 64, dtype=torch.float64)
    byol_loss, dense_loss = model(images)
    alone = twin.learner(images)
    assert_close(byol_loss, alone)  # the learner's own loss is as it was
    assert not model.learner.net.layer4._forward_hooks

    both = torch.cat([images, images.flip(3)])
    map_q, map_k = (resnet_map(net, both) for net in (twin.learner.net, twin.learner.target_encoder.net))
    prediction, key = twin.predictor(twin.head(map_q).dense).flatten(2), twin.target_head(map_k)
    swapped = (x.roll(6, 0) for x in (map_k, key.dense, F.normalize(key.pooled)))  # view 1 asks view 2, and 2 asks 1
    dense = 0
    for queries, at, features, values, pooled in zip(*(x.split(6) for x in (prediction, map_q, *swapped)), strict=True):
        dense = dense + 0.5 * info_nce(queries, matched(at, features, values), pooled, exclude_own=True)[0]
    assert_close(dense_loss, dense)
    (byol_loss + dense_loss).backward()
    (alone + dense).backward()
    model.update_moving_average()
    move(twin.learner.online_encoder, twin.learner.target_encoder)
    move(twin.head, twin.target_head)
    assert_same_step(model, twin)

    model.learner.target_encoder = None
    with pytest.raises(ValueError, match=r"^learner: got a BYOL without target_encoder, expected one with"):
        example("with_byol_pytorch").DenseBYOL(model.learner, in_channels=64)


# ---- Lightning -------------------------------------------------------------------------------------------------------


def lightning_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return example("with_lightning").DenseCL(momentum=0.9, queue_size=10)


def batches() -> torch.utils.data.DataLoader:
    """Two, the same in every epoch."""
    return torch.utils.data.DataLoader(example("with_lightning").RandomViews(8), batch_size=4)


def fit(model: Any, start: Path | None = None, **options: Any) -> Any:
    """Lightning's own Trainer after the run."""
    options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(enable_model_summary=False, accelerator="cpu", devices=1, **options)
    trainer.fit(model, batches(), ckpt_path=start)
    return trainer


@needs["lightning"]
@pytest.mark.parametrize(("parts", "checkpointed"), [(1, False), (1, True), (2, False)])
def test_lightning_step(parts: int, checkpointed: bool) -> None:
    """Of one batch or of two that are accumulated: every batch enters the queues, and the key networks move once."""
    model = lightning_model().double()
    recipes.disturb(model.backbone, model.head)
    twin = copy.deepcopy(model)
    if checkpointed:
        model.criterion.forward = partial(checkpoint, model.criterion.forward, use_reentrant=False)
    trainer = fit(model, max_steps=1, precision="64-true", accumulate_grad_batches=parts)

    online, momentum = encoder_of(twin.backbone, twin.head), encoder_of(twin.backbone_k, twin.head_k)
    for views in itertools.islice(batches(), parts):
        views, queues = [x.double() for x in views], (twin.image_queue, twin.dense_queue)
        image, dense, _ = recipes.moco_terms(online, momentum, queues, views)
        ((0.5 * image + 0.5 * dense) / parts).backward()
    torch.optim.SGD(online.parameters(), 0.03, momentum=0.9, weight_decay=1e-4).step()
    move(online, momentum)
    assert_same_step(model, twin)
    for name, term in (("image_loss", image), ("dense_loss", dense)):
        assert float(trainer.callback_metrics[name]) == pytest.approx(term.item(), rel=1e-6)  # metrics are float32


@needs["lightning"]
def test_averaging_weights_leaves_the_queues() -> None:
    """The run ends with the averaged weights, and with the queues of the last update."""
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.75, update_every_n_steps=1, use_buffers=False)
    plain, model = lightning_model().double(), lightning_model().double()
    fit(plain, max_epochs=2, precision="64-true")
    fit(model, max_epochs=2, precision="64-true", callbacks=[averaging])
    assert not torch.equal(model.head.dense_mlp[0].weight, plain.head.dense_mlp[0].weight)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


@needs["lightning"]
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_resumes_bit_for_bit(tmp_path: Path, precision: str) -> None:
    whole, half, resumed = (lightning_model(seed) for seed in (0, 0, 1))
    fit(whole, max_epochs=2, precision=precision)
    fit(half, max_epochs=1, precision=precision).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path / "half.ckpt", max_epochs=2, precision=precision)
    assert_same(resumed.state_dict(), whole.state_dict())
