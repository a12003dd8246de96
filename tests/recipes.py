"""The recipes for lightly, solo-learn, Lightning, a ViT and an FPN level: first steps from the equations, and pages."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, flat64, numpy64
from standins import lightly_modules, solo_methods
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
EXAMPLES, RECIPES = ROOT / "docs" / "examples", ROOT / "docs" / "recipes"
PAGES = {
    "lightly": ("with_lightly_moco", "with_lightly_byol"),
    "solo-learn": ("with_solo_learn",),
    "lightning": ("with_lightning",),
    "vit": ("with_vit",),
    "fpn": ("with_fpn",),
}
TOLERANCE = 1e-9
needs_lightly = pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="no lightly")


def stand_in(monkeypatch: pytest.MonkeyPatch, names: dict[str, ModuleType]) -> None:
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["stand-in", pytest.param("lightly", marks=needs_lightly)])
def lightly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes `lightly` importable: the stand-in, or itself, where need be with a torchvision that does nothing."""
    if request.param == "stand-in":
        parts = ("lightly", "lightly.models", "lightly.loss", "lightly.models.modules", "lightly.models.utils")
        stand_in(monkeypatch, dict.fromkeys(parts, lightly_modules))
    elif importlib.util.find_spec("torchvision") is None:
        ops = ModuleType("torchvision.ops")
        ops.StochasticDepth = ops.roi_align = None
        torchvision = ModuleType("torchvision")
        torchvision.ops = ops
        stand_in(monkeypatch, {"torchvision": torchvision, "torchvision.ops": ops})
    return request.param


@pytest.fixture
def solo(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, dict.fromkeys(("solo", "solo.methods", "solo.methods.mocov2plus"), solo_methods))


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def views(batch: int = 4, size: int = 32) -> tuple[Tensor, Tensor]:
    first, second = torch.rand(2, batch, 3, size, size, dtype=torch.float64)
    return first, second


def parameters_of(module: nn.Module) -> oracle.Params:
    return {name: numpy64(value).copy() for name, value in module.named_parameters()}


def disturb(*modules: nn.Module) -> None:
    """Online networks that differ from the momentum networks, as in the middle of a training."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[np.ndarray]]:
    """What the module is given while the block runs: (B, C, H, W) float64, tokens as (B, C, P, 1)."""
    inputs: list[np.ndarray] = []

    def keep(_module: nn.Module, given: tuple[Tensor]) -> None:
        shape = (*given[0].shape, 1, 1)[:4]
        inputs.append(numpy64(given[0]).reshape(shape))

    hook = module.register_forward_pre_hook(keep)
    yield inputs
    hook.remove()


def info_nce(query: np.ndarray, key: np.ndarray, negatives: np.ndarray, **options: Any) -> float:
    query, key = (x if x.ndim == 3 else x[:, :, None] for x in (query, key))
    return float(oracle.info_nce(query, key, negatives, **({"temperature": 0.2} | options)).loss)


def flat(features: np.ndarray) -> np.ndarray:
    return features.reshape(*features.shape[:2], -1)


def expected_moco(
    head_q: oracle.Params,
    head_k: oracle.Params,
    maps: tuple[np.ndarray, np.ndarray],
    rows: tuple[np.ndarray, np.ndarray],
    grid: tuple[int, int] | None = None,
) -> tuple[float, float, oracle.HeadResult]:
    """Image term, dense term and key projections, from the maps, the head weights and both queues before the step."""
    query, key = oracle.head(head_q, maps[0], grid), oracle.head(head_k, maps[1], grid)
    index = oracle.match(query.grid, key.grid).index
    return info_nce(query.image, key.image, rows[0]), info_nce(query.dense, key.dense, rows[1], index=index), key


def check_maps(seen: list[np.ndarray], wish: tuple[Tensor, ...]) -> None:
    assert len(seen) == len(wish)
    for actual, expected in zip(seen, wish, strict=True):
        assert_close(actual, expected, TOLERANCE, "input of the head")


def check_queue(queue: nn.Module, before: np.ndarray, keys: np.ndarray) -> None:
    """One row per image, over the oldest."""
    truth = oracle.Queue(len(before), before)
    truth.enqueue(keys)
    assert int(queue.position) == truth.position == len(keys) % len(before)
    assert_close(queue.rows, truth.rows(), TOLERANCE, "queue")


def check_momentum(online: nn.Module, momentum: nn.Module, before: oracle.Params, m: float) -> None:
    for name, theirs in parameters_of(online).items():
        wish = m * before[name] + (1 - m) * theirs
        assert_close(parameters_of(momentum)[name], wish, TOLERANCE, name)


def check_moco_step(
    model: Any,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    online: dict[str, nn.Module],
    momentum: dict[str, nn.Module],
    grid: tuple[int, int] | None = None,
    heads: Callable[[Any], tuple[Tensor, ...]] = lambda features: (features,),
) -> tuple[list[np.ndarray], list[np.ndarray], Any]:
    """One step of a recipe with both terms of MoCo, whose key networks move (0.9) before they are used.

    `heads` gives what the head must be called on, from what the backbone returns.
    """
    images = views()
    disturb(*online.values())
    before = {name: parameters_of(module) for name, module in momentum.items()}
    rows = numpy64(model.image_queue.rows).copy(), numpy64(model.dense_queue.rows).copy()
    with inputs_of(online["head"]) as maps_q, inputs_of(momentum["head"]) as maps_k:
        image_loss, dense_loss = step(*images)
    for name in online:
        check_momentum(online[name], momentum[name], before[name], 0.9)
    for networks, seen, view in ((online, maps_q, images[0]), (momentum, maps_k, images[1])):
        check_maps(seen, heads(networks["backbone"](view)))
    weights = parameters_of(online["head"]), parameters_of(momentum["head"])
    image, dense, key = expected_moco(*weights, (maps_q[0], maps_k[0]), rows, grid)
    if len(maps_q) == 1:
        assert_close(image_loss, image, TOLERANCE, "image term")
        check_queue(model.image_queue, rows[0], key.image)
    assert_close(dense_loss, dense, TOLERANCE, "dense term")
    check_queue(model.dense_queue, rows[1], key.pooled)
    (0.5 * image_loss + 0.5 * dense_loss).backward()
    assert all(p.grad is not None and p.grad.any() for p in online["head"].parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "a parameter goes unused"
    assert all(p.grad is None for module in momentum.values() for p in module.parameters())
    return maps_q, maps_k, (image_loss, rows[0], weights)


# ---- lightly -------------------------------------------------------------------------------------------------------


def test_lightly_moco(lightly: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = example("with_lightly_moco", monkeypatch)
    model = recipe.DenseMoCo(recipe.tiny_backbone(), 64, queue_size=10).double()
    check_moco_step(
        model,
        lambda *images: recipe.training_step(model, *images, momentum=0.9),
        {"backbone": model.backbone, "head": model.projection_head},
        {"backbone": model.backbone_momentum, "head": model.projection_head_momentum},
    )


def test_image_branch_is_lightlys_projection_head(lightly: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's block that loads a MoCoProjectionHead."""
    from lightly.models.modules import MoCoProjectionHead

    recipe = example("with_lightly_moco", monkeypatch)
    model = recipe.DenseMoCo(nn.Identity(), 24)
    theirs = MoCoProjectionHead(24, 24, 128)
    block = next(block for block in python_blocks("lightly") if "image_mlp" in block)
    exec(block, {"model": model, "moco_head_state": theirs.state_dict()})
    features = torch.randn(3, 24, 5, 4)
    torch.testing.assert_close(model.projection_head(features).image, theirs(features.mean((2, 3))))


def test_lightly_shuffle(lightly: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's forward_momentum with a shuffle gives the keys in the order of the queries."""
    recipe = example("with_lightly_moco", monkeypatch)
    model = recipe.DenseMoCo(recipe.tiny_backbone(), 64, queue_size=10).double()
    space: dict[str, Any] = {"torch": torch}
    exec(next(block for block in python_blocks("lightly") if "batch_unshuffle" in block), space)
    images, _ = views()
    for shuffled, plain in zip(
        flatten(space["forward_momentum"](model, images)), flatten(model.forward_momentum(images)), strict=True
    ):
        torch.testing.assert_close(shuffled, plain)


def flatten(output: tuple[Tensor, Any]) -> tuple[Tensor, ...]:
    return (output[0], *output[1])


def perceptron(params: oracle.Params, first: str, norm: str, last: str, x: np.ndarray) -> np.ndarray:
    """Linear, batch norm with the statistics of the batch, ReLU, linear; (B, C, P) -> (B, D, P)."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        weight = params[f"{name}.weight"]
        bias = params.get(f"{name}.bias", np.zeros(len(weight)))
        return np.einsum("dc,bcp->bdp", weight.reshape(len(weight), -1), x) + bias[:, None]

    hidden = linear(first, x)
    mean, variance = hidden.mean((0, 2), keepdims=True), hidden.var((0, 2), keepdims=True)
    scaled = (hidden - mean) / np.sqrt(variance + 1e-5)
    scaled = scaled * params[f"{norm}.weight"][:, None] + params[f"{norm}.bias"][:, None]
    return linear(last, np.maximum(scaled, 0))


def test_lightly_byol(lightly: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = example("with_lightly_byol", monkeypatch)
    model = recipe.DenseBYOL(recipe.tiny_backbone(), 64).double()
    disturb(model)
    images = views()
    before = parameters_of(model.backbone_momentum), parameters_of(model.projection_head_momentum)
    with inputs_of(model.projection_head) as maps_q, inputs_of(model.projection_head_momentum) as maps_k:
        image_loss, dense_loss = recipe.training_step(model, *images, momentum=0.9)
    check_maps(maps_q, tuple(map(model.backbone, images)))
    check_maps(maps_k, tuple(map(model.backbone_momentum, images[::-1])))
    check_momentum(model.backbone, model.backbone_momentum, before[0], 0.9)
    check_momentum(model.projection_head, model.projection_head_momentum, before[1], 0.9)

    params = parameters_of(model)
    image, dense = [], []
    for map_q, map_k in zip(maps_q, maps_k, strict=True):
        grids, z = (flat(map_q), flat(map_k)), []
        for name, grid in zip(("projection_head", "projection_head_momentum"), grids, strict=True):
            mean = grid.mean(2, keepdims=True)
            z.append(
                (
                    perceptron(params, *(f"{name}.image_mlp.{i}" for i in (0, 2, 5)), mean),
                    perceptron(params, *(f"{name}.dense_mlp.{i}" for i in (0, 1, 3)), grid),
                )
            )
        p = perceptron(params, *(f"prediction_head.layers.{i}" for i in (0, 1, 3)), z[0][0])
        dense_p = perceptron(params, *(f"dense_prediction_head.{i}" for i in (0, 1, 3)), z[0][1])
        image.append(-(oracle.unit(p, 1)[0] * oracle.unit(z[1][0], 1)[0]).sum(1).mean())
        negatives, index = oracle.unit(z[1][1].mean(2), 1)[0], oracle.match(*grids).index
        dense.append(info_nce(dense_p, z[1][1], negatives, index=index, exclude=np.arange(len(p))))
    assert len(dense) == 2
    assert_close(image_loss, np.mean(image), TOLERANCE, "image term")
    assert_close(dense_loss, np.mean(dense), TOLERANCE, "dense term")

    (0.5 * image_loss + 0.5 * dense_loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "a parameter goes unused"
    assert model.projection_head.dense_mlp[0].weight.grad.any()
    assert model.dense_prediction_head[0].weight.grad.any()


# ---- solo-learn ----------------------------------------------------------------------------------------------------

CFG = SimpleNamespace(
    method_kwargs=type("Settings", (dict,), {"__getattr__": dict.__getitem__})(
        proj_hidden_dim=16, proj_output_dim=8, temperature=0.1, queue_size=12
    )
)


@pytest.mark.parametrize("small_crops", [0, 2])
def test_solo_learn(solo: None, monkeypatch: pytest.MonkeyPatch, small_crops: int) -> None:
    model = example("with_solo_learn", monkeypatch).DenseMoCoV2Plus(CFG).double()
    disturb(model.backbone, model.head)
    host_queue = numpy64(model.queue).copy()
    rows = [numpy64(queue.rows).copy() for queue in model.dense_queues]
    crops = [*views(6, 64), *views(6, 32)[:small_crops]]
    targets = torch.arange(6)
    with inputs_of(model.backbone.avgpool) as maps_q, inputs_of(model.momentum_backbone.avgpool) as maps_k:
        loss = model.training_step([torch.arange(6), crops, targets], 0)

    weights = parameters_of(model.head), parameters_of(model.head_k)
    queries, keys = ([oracle.head(w, m) for m in maps[:2]] for w, maps in zip(weights, (maps_q, maps_k), strict=True))
    assert (weights[0]["dense_mlp.0.weight"] != weights[1]["dense_mlp.0.weight"]).all()
    terms = []
    for view, other in ((0, 1), (1, 0)):
        index = oracle.match(queries[view].grid, keys[other].grid).index
        options = {"temperature": 0.1}
        terms.append(
            (
                info_nce(queries[view].image, keys[other].image, host_queue[other].T, **options),
                info_nce(queries[view].dense, keys[other].dense, rows[other], index=index, **options),
            )
        )
    (image, dense), classifier = np.mean(terms, axis=0), parameters_of(model.classifier)
    class_losses = []
    for query in queries:
        logits = query.mean @ classifier["weight"].T + classifier["bias"]
        class_losses.append((np.log(np.exp(logits).sum(1)) - logits[np.arange(6), np.arange(6)]).mean())
    assert_close(model.logged["train_dense_loss"], dense, TOLERANCE, "dense term")
    assert_close(loss, 0.5 * (image + np.mean(class_losses)) + 0.5 * dense, TOLERANCE, "loss")
    for view in (0, 1):
        check_queue(model.dense_queues[view], rows[view], keys[view].pooled)

    # One optimizer step and the host's end of a batch: everything trained is in a group once, and the dense head's
    # key moves with the rest.
    optimizer = torch.optim.SGD(model.learnable_params, lr=0.1)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, owned)) == sorted(map(id, trained))
    loss.backward()
    assert all(p.grad is not None for p in trained), "a parameter goes unused"
    assert model.head.dense_mlp[0].weight.grad.any()
    optimizer.step()
    before, model.trainer.global_step = parameters_of(model.head_k), 1
    model.on_train_batch_end(loss, [], 0)
    check_momentum(model.head, model.head_k, before, 0.9)
    assert not model.backbone.layer4._forward_hooks
    assert not model.momentum_backbone.layer4._forward_hooks


def test_solo_learn_in_half_precision(solo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the maps are half precision and channels_last; the dense loss stays float32."""
    model = example("with_solo_learn", monkeypatch).DenseMoCoV2Plus(CFG)
    crops = [x.float() for x in views(6, 64)]
    seen: list[Tensor] = []
    model.backbone.layer4.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step([torch.arange(6), crops, torch.arange(6)], 0)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model.logged["train_dense_loss"].dtype == torch.float32
    loss.backward()
    assert model.head.dense_mlp[0].weight.grad.isfinite().all()
    assert model.head.dense_mlp[0].weight.grad.any()


def test_solo_learn_changes_one_line_of_main_pretrain(solo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = example("with_solo_learn", monkeypatch)
    monkeypatch.setitem(sys.modules, "with_solo_learn", recipe)
    space: dict[str, Any] = {"METHODS": {"mocov2plus": None}}
    exec("\n".join(added_lines("solo-learn")), space)
    assert space["METHODS"]["mocov2plus"] is recipe.DenseMoCoV2Plus


# ---- Lightning -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning_recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("lightning.pytorch")
    return example("with_lightning", monkeypatch)


def trainer_for(recipe: ModuleType, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return recipe.pl.Trainer(**quiet, enable_model_summary=False, accelerator="cpu", devices=1, **options)


def loader_of(recipe: ModuleType, images: int = 8, batch: int = 4) -> Any:
    return torch.utils.data.DataLoader(recipe.RandomViews(images), batch_size=batch)


def test_lightning_first_step(lightning_recipe: ModuleType) -> None:
    model = lightning_recipe.DenseCL(momentum=0.9, queue_size=10)
    disturb(model.backbone, model.head)
    rows = tuple(numpy64(queue.rows).copy() for queue in (model.image_queue, model.dense_queue))
    weights = parameters_of(model.head), parameters_of(model.head_k)
    before = parameters_of(model.backbone_k), parameters_of(model.head_k)
    networks = [copy.deepcopy(module).double() for module in (model.backbone, model.backbone_k)]
    trainer = trainer_for(lightning_recipe, max_steps=1, precision="64-true")
    with inputs_of(model.head) as maps_q, inputs_of(model.head_k) as maps_k:
        trainer.fit(model, loader_of(lightning_recipe))
    batch = next(iter(loader_of(lightning_recipe)))
    for seen, network, view in zip((maps_q, maps_k), networks, batch, strict=True):
        check_maps(seen, (network(view.double()),))
    image, dense, key = expected_moco(*weights, (maps_q[0], maps_k[0]), rows)
    # float32 views of the metrics; the queues are float64
    assert_close(trainer.callback_metrics["image_loss"], image, 1e-6, "image term")
    assert_close(trainer.callback_metrics["dense_loss"], dense, 1e-6, "dense term")
    check_queue(model.image_queue, rows[0], key.image)
    check_queue(model.dense_queue, rows[1], key.pooled)
    check_momentum(model.backbone, model.backbone_k, before[0], 0.9)
    check_momentum(model.head, model.head_k, before[1], 0.9)
    assert (parameters_of(model.head)["dense_mlp.0.weight"] != weights[0]["dense_mlp.0.weight"]).any()


def test_lightning_moves_keys_once_per_accumulated_step(lightning_recipe: ModuleType) -> None:
    model = lightning_recipe.DenseCL(momentum=0.9, queue_size=10).double()
    disturb(model.head)
    before = parameters_of(model.head_k)
    trainer = trainer_for(lightning_recipe, max_steps=1, precision="64-true", accumulate_grad_batches=2)
    trainer.fit(model, loader_of(lightning_recipe))
    check_momentum(model.head, model.head_k, before, 0.9)
    assert int(model.dense_queue.position) == 8


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_resumes_bit_for_bit(lightning_recipe: ModuleType, tmp_path: Path, precision: str) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0 if checkpoint is None else 1)
        model = lightning_recipe.DenseCL(momentum=0.9, queue_size=10)
        trainer = trainer_for(lightning_recipe, max_epochs=epochs, precision=precision)
        trainer.fit(model, loader_of(lightning_recipe), ckpt_path=None if checkpoint is None else str(checkpoint))
        return trainer, model

    trainer, half = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(saved["dense_queue.rows"], half.dense_queue.rows)
    assert int(saved["dense_queue.position"]) == 8
    whole, resumed = fit(2)[1].state_dict(), fit(2, tmp_path / "half.ckpt")[1].state_dict()
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert int(whole["dense_queue.position"]) == 16 % 10
    assert not torch.equal(whole["dense_queue.rows"], saved["dense_queue.rows"])


# ---- ViT and FPN ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_class_token", [False, True])
def test_vit(monkeypatch: pytest.MonkeyPatch, use_class_token: bool) -> None:
    recipe = example("with_vit", monkeypatch)
    vit = recipe.ViT(size=32, width=24)
    model = recipe.DenseCL(vit, width=24, queue_size=10, use_class_token=use_class_token).double()
    q, k = model.encoder_q, model.encoder_k
    maps_q, maps_k, (image_loss, rows, weights) = check_moco_step(
        model,
        lambda *images: model(*images, momentum=0.9),
        {"backbone": q.vit, "head": q.head},
        {"backbone": k.vit, "head": k.head},
        heads=lambda tokens: (tokens[:, 1:].transpose(1, 2), tokens[:, 0])[: 1 + use_class_token],
    )
    assert maps_q[0].shape == (4, 24, 16, 1)
    if use_class_token:
        query, key = (oracle.head(w, maps[1]) for w, maps in zip(weights, (maps_q, maps_k), strict=True))
        assert_close(image_loss, info_nce(query.image, key.image, rows), TOLERANCE, "image term")
        check_queue(model.image_queue, rows, key.image)


def test_vit_tokens_are_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = example("with_vit", monkeypatch)
    encoder = recipe.Encoder(recipe.ViT(), 96, False)
    tokens: list[Tensor] = []
    encoder.vit.register_forward_hook(lambda _m, _i, out: tokens.append(out))
    features, projection = encoder(torch.rand(2, 3, 64, 64))
    assert features.untyped_storage().data_ptr() == tokens[0].untyped_storage().data_ptr()
    assert projection.dense.shape == (2, 128, 64)


@pytest.mark.parametrize("grid_size", [4, 3, 8])
def test_fpn(monkeypatch: pytest.MonkeyPatch, grid_size: int) -> None:
    recipe = example("with_fpn", monkeypatch)
    model = recipe.DenseCL(grid_size, queue_size=10).double()
    q, k = model.encoder_q, model.encoder_k
    maps_q, _, _ = check_moco_step(
        model,
        lambda *images: model(*images, momentum=0.9),
        {"backbone": q.pyramid, "head": q.head},
        {"backbone": k.pyramid, "head": k.head},
        (grid_size, grid_size),
        lambda out: (out[1],),
    )
    assert maps_q[0].shape == (4, 64, 8, 8)


def test_pyramid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The level from its equation: output(lateral(c_4) + each lateral(c_8) on 2 x 2 cells)."""
    pyramid = example("with_fpn", monkeypatch).Pyramid(6).double().eval()
    images, _ = views()
    c_8, level = pyramid(images)
    coarse, fine = numpy64(pyramid.lateral_8(c_8)), numpy64(pyramid.lateral_4(pyramid.stage_4(images)))
    merged = torch.from_numpy(fine + coarse.repeat(2, axis=2).repeat(2, axis=3))
    assert_close(level, nn.functional.conv2d(merged, pyramid.output_4.weight, pyramid.output_4.bias, padding=1), 1e-12)
    assert flat64(c_8).shape == (4, 64, 16)


# ---- files and pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with_vit", "with_fpn"])
def test_example_runs_by_itself(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "2"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 1: image \d+\.\d+, dense \d+\.\d+", done.stdout)


@pytest.mark.parametrize("name", ["with_lightly_moco", "with_lightly_byol"])
def test_lightly_example_runs(lightly: str, name: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example(name, monkeypatch).main(["--steps", "2"])
    assert re.search(r"step 1: image -?\d+\.\d+, dense \d+\.\d+", capsys.readouterr().out)


def test_lightning_example_runs(lightning_recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    lightning_recipe.main(["--steps", "2", "--precision", "bf16-mixed"])
    assert re.search(r"image_loss \d+\.\d+, dense_loss \d+\.\d+", capsys.readouterr().out)


def page(name: str) -> str:
    return (RECIPES / f"{name}.md").read_text()


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)


def added_lines(name: str) -> list[str]:
    diffs = re.findall(r"```diff\n(.*?)```", page(name), re.DOTALL)
    return [line[1:] for diff in diffs for line in diff.splitlines() if line.startswith("+")]


def code_lines(text: str) -> list[str]:
    lines = (re.sub(r"(^|\s+)# .*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("name", [name for name in PAGES if name != "solo-learn"])
def test_added_lines_of_the_page_are_the_tested_ones(name: str) -> None:
    tested = {line for file in PAGES[name] for line in code_lines((EXAMPLES / f"{file}.py").read_text())}
    added = code_lines("\n".join(added_lines(name)))
    assert added
    assert [line for line in added if line not in tested] == []


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_of_the_page_are_the_tested_ones(name: str) -> None:
    """Each block stands in an example line by line, or a test above executes it."""
    executed = ("moco_head_state", "batch_unshuffle")
    sources = ["\n".join(code_lines((EXAMPLES / f"{file}.py").read_text())) for file in PAGES[name]]
    for block in python_blocks(name):
        if not any(word in block for word in executed):
            assert any("\n".join(code_lines(block)) in source for source in sources), block


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", page(name)):
        assert (RECIPES / target).exists(), target
