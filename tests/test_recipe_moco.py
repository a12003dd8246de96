"""The recipes for MoCo and BYOL: first-step losses from the equations, keys, momentum, gradients, and their pages."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, flat64, numpy64
from standins import moco_worker as worker
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
PAGES = {
    "moco": "with_moco",
    "plain-moco": "moco_loop",
    "byol": "byol_loop",
    "byol-pytorch": "with_byol_pytorch",
}
MOCO_HOSTS = [
    "stand-in",
    pytest.param(
        "clone", marks=pytest.mark.skipif(importlib.util.find_spec("moco") is None, reason="no clone of moco")
    ),
]
BYOL_HOSTS = [
    "stand-in",
    pytest.param(
        "byol-pytorch",
        marks=pytest.mark.skipif(importlib.util.find_spec("byol_pytorch") is None, reason="no byol-pytorch"),
    ),
]
TOLERANCE = 1e-9


def example(name: str) -> ModuleType:
    return worker.load(worker.EXAMPLES / f"{name}.py")


def parameters_of(module: nn.Module) -> oracle.Params:
    return {name: numpy64(value).copy() for name, value in module.state_dict().items()}


def moved(online: oracle.Params, target: oracle.Params, momentum: float) -> oracle.Params:
    return {name: momentum * target[name] + (1 - momentum) * online[name] for name in target}


def info_nce(query: np.ndarray, key: np.ndarray, negatives: np.ndarray, **options: Any) -> oracle.LossResult:
    query, key = (x if x.ndim == 3 else x[:, :, None] for x in (query, key))
    return oracle.info_nce(query, key, negatives, temperature=0.2, **options)


def inputs_of(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def check_gradients(params: oracle.Params, names: nn.Module, features: np.ndarray, image: Any, dense: Any) -> None:
    """Every gradient of a head, from those of both losses (weights 0.3 and 0.7)."""
    result = oracle.head(params, features)
    expected = oracle.head_gradients(params, result, 0.3 * image.query[:, :, 0], 0.7 * dense.query)
    for name, parameter in names.named_parameters():
        assert np.abs(expected[name]).max() > 1e-6, name
        assert_close(parameter.grad, expected[name], TOLERANCE, name)


# ---- MoCo: the subclass and the loop -------------------------------------------------------------------------------


def moco_model(kind: str) -> tuple[Any, nn.Module, nn.Module]:
    """A model in float64, and its heads."""
    if kind == "loop":
        torch.manual_seed(0)
        model = example("moco_loop").Trainer(queue_size=13, momentum=0.9).double()
        with torch.no_grad():
            for parameter in model.encoder_k.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model, model.encoder_q.head, model.encoder_k.head
    model = worker.new_model(worker.recipe(kind), K=13)
    return model, model.encoder_q.fc, model.encoder_k.fc


@pytest.mark.parametrize("kind", [*MOCO_HOSTS, "loop"])
def test_moco_step(kind: str) -> None:
    model, head_q, head_k = moco_model(kind)
    start = copy.deepcopy(model)
    map_q, map_k = inputs_of(head_q), inputs_of(head_k)
    image_loss, dense_loss, rank = model(*(view.repeat(1, 1, 1, 2) for view in worker.views(0)))
    (0.3 * image_loss + 0.7 * dense_loss).backward()

    encoders = parameters_of(start.encoder_q), parameters_of(start.encoder_k)
    key_encoder = moved(*encoders, momentum=0.9)
    for name, parameter in model.encoder_k.named_parameters():
        assert_close(parameter, key_encoder[name], 1e-12, name)
        assert parameter.grad is None
    prefix = "fc." if kind != "loop" else "head."
    heads = [
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for state in (encoders[0], key_encoder)
    ]
    query, key = oracle.head(heads[0], numpy64(map_q[0])), oracle.head(heads[1], numpy64(map_k[0]))
    rows = numpy64(start.image_queue.rows), numpy64(start.dense_queue.rows)
    image = info_nce(query.image, key.image, rows[0])
    dense = info_nce(query.dense, key.dense, rows[1], index=oracle.match(query.grid, key.grid).index)

    assert_close(image_loss, image.loss, TOLERANCE)
    assert_close(dense_loss, dense.loss, TOLERANCE)
    assert rank.tolist() == image.rank.tolist()
    check_gradients(heads[0], head_q, numpy64(map_q[0]), image, dense)
    for queue, before, keys in ((model.image_queue, rows[0], key.image), (model.dense_queue, rows[1], key.pooled)):
        model_queue = oracle.Queue(13, before)
        model_queue.enqueue(keys)
        assert_close(queue.rows, model_queue.rows(), TOLERANCE)
        assert int(queue.position) == worker.BATCH


def test_moco_maps_come_from_the_two_encoders() -> None:
    model, head_q, head_k = moco_model("stand-in")
    map_q, map_k = inputs_of(head_q), inputs_of(head_k)
    im_q, im_k = worker.views(0)
    model(im_q, im_k)
    for encoder, images, features in ((model.encoder_q, im_q, map_q), (model.encoder_k, im_k, map_k)):
        expected = encoder.layer4(encoder.relu(encoder.bn1(encoder.conv1(images))))
        assert features[0].shape == (worker.BATCH, 8, 3, 2)
        assert torch.equal(features[0], expected)


def test_moco_names_and_options() -> None:
    """What main_moco.py passes by position, what main_lincls.py reads, what main_moco.py trains."""
    module = worker.recipe("stand-in")
    model = module.DenseMoCo(worker.Encoder, 5, 10, 0.9, 0.07, False)
    assert (model.m, model.criterion.temperature, model.image_queue.size, model.dense_queue.size) == (0.9, 0.07, 10, 10)
    kept = {name for name in model.state_dict() if name.startswith("encoder_q.") and ".fc." not in name}
    own = {f"encoder_q.{name}" for name in worker.Encoder(7).state_dict() if not name.startswith("fc.")}
    assert kept == own
    assert not [name for name in model.state_dict() if name in ("queue", "queue_ptr")]
    for name, value in model.encoder_q.state_dict().items():
        assert torch.equal(value, model.encoder_k.state_dict()[name])
    assert not any(p.requires_grad for p in model.encoder_k.parameters())
    with pytest.raises(ValueError, match=r"^base_encoder: got Sequential without avgpool, expected a torchvision"):
        module.backbone_map(nn.Sequential(nn.Identity()), torch.randn(1, 3, 8, 8))


def test_moco_with_batch_norm_and_any_batch() -> None:
    """Queue of 10, batches of 6 and 5: MoCo asserts that the batch divides K."""
    torch.manual_seed(0)
    model = worker.recipe("stand-in").DenseMoCo(lambda num_classes: worker.Encoder(num_classes, True), dim=5, K=10)
    for batch, position in ((6, 6), (5, 1)):
        image_loss, dense_loss, _ = model(*(view[:batch].float() for view in worker.views(0)))
        assert torch.isfinite(image_loss + dense_loss)
        assert int(model.dense_queue.position) == position


@pytest.fixture(scope="module", params=MOCO_HOSTS)
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """The steps of one process on the whole batch, and of two gloo processes on a half each."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, worker.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(directory), request.param], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    model = worker.new_model(worker.recipe(request.param))
    alone = worker.run(model, model, slice(None))
    return alone, [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_moco_two_ranks_equal_one_process(two_ranks: tuple[Any, list[Any]]) -> None:
    alone, ranks = two_ranks
    for step, expected in enumerate(alone):
        first, second = (results["right"][step] for results in ranks)
        assert_close((first["losses"] + second["losses"]) / 2, expected["losses"], TOLERANCE, "losses")
        assert torch.equal(torch.cat([first["rank"], second["rank"]]), expected["rank"])
        for actual in (first, second):
            assert actual["grad"].keys() == expected["grad"].keys()
            for name, value in expected["grad"].items():
                assert_close(actual["grad"][name], value, TOLERANCE, name)
            for name, value in expected["state"].items():
                assert_close(actual["state"][name].double(), value.double(), TOLERANCE, name)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_moco_shuffles_and_must_undo_it(two_ranks: tuple[Any, list[Any]]) -> None:
    """The key encoders see all images, in another order than they came; left so, every key is off."""
    alone, ranks = two_ranks
    for step, expected in enumerate(alone):
        seen = torch.cat([results["right"][step]["keys"] for results in ranks])
        order = [next(i for i, image in enumerate(expected["keys"]) if torch.equal(image, one)) for one in seen]
        assert sorted(order) == list(range(worker.BATCH))
        assert sorted(order[:3]) != [0, 1, 2], "no image changed its rank"
        broken = sum(results["shuffle not undone"][step]["losses"] for results in ranks) / 2
        assert ((broken - expected["losses"]).abs() > 1e-3).all()


# ---- BYOL: the loop and the hooks ----------------------------------------------------------------------------------


def dense_direction(
    maps: tuple[np.ndarray, np.ndarray], prediction: np.ndarray, key: np.ndarray
) -> tuple[oracle.LossResult, oracle.Match]:
    """One direction from backbone maps (B, C, P), the predictor's output and the target's dense map (B, D, P)."""
    matched = oracle.match(*maps)
    negatives = oracle.unit(key.mean(2), 1)[0]
    return info_nce(prediction, key, negatives, index=matched.index, exclude=np.arange(len(key))), matched


def sequential(module: nn.Sequential, x: np.ndarray) -> np.ndarray:
    """conv, batch norm of this batch, ReLU, conv on (B, C, P), from the weights."""
    first, norm, _, last = module
    for layer in (first, norm, last):
        weight, bias = numpy64(layer.weight), numpy64(layer.bias)[:, None]
        if layer is norm:
            mean, variance = x.mean((0, 2))[:, None], x.var((0, 2))[:, None]
            x = np.maximum((x - mean) / np.sqrt(variance + norm.eps) * weight[:, None] + bias, 0)
        else:
            x = np.einsum("dc,bcp->bdp", weight.reshape(len(bias), -1), x) + bias
    return x


def perturbed(model: Any, target: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in target.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double()


def test_byol_loop_step() -> None:
    torch.manual_seed(0)
    model = example("byol_loop").Trainer()
    perturbed(model, model.target)
    maps_q, maps_k = inputs_of(model.online.head), inputs_of(model.target.head)
    online, target = copy.deepcopy(model.online.head), copy.deepcopy(model.target.head)
    image_loss, dense_loss = model(*worker.views(0))
    (image_loss + dense_loss).backward()

    image_expected, dense_expected = 0.0, 0.0
    for one, two in ((0, 1), (1, 0)):
        query_map, key_map = flat64(maps_q[one]), flat64(maps_k[two])
        prediction = sequential(model.dense_predictor, sequential(online.dense_mlp, query_map))
        key = sequential(target.dense_mlp, key_map)
        dense_expected += 0.5 * dense_direction((query_map, key_map), prediction, key)[0].loss
        image_query, image_key = query_map.mean(2)[:, :, None], key_map.mean(2)[:, :, None]
        image_prediction = sequential(model.predictor, mlp(online.image_mlp, image_query))
        cosine = oracle.unit(image_prediction, 1)[0] * oracle.unit(mlp(target.image_mlp, image_key), 1)[0]
        image_expected += 1 - cosine.sum(1).mean()
    assert_close(dense_loss, dense_expected, TOLERANCE)
    assert_close(image_loss, image_expected, TOLERANCE)
    for part in (model.online.head.dense_mlp, model.dense_predictor, model.online.backbone):
        assert all(p.grad.abs().max() > 0 for p in part.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in model.target.parameters())


def mlp(module: nn.Sequential, x: np.ndarray) -> np.ndarray:
    """The head's image branch, whose batch norm stands between two reshapes."""
    return sequential(nn.Sequential(*(m for m in module if not isinstance(m, nn.Flatten | nn.Unflatten))), x)


def test_byol_loop_target_follows_online() -> None:
    model = example("byol_loop").Trainer(momentum=0.9)
    perturbed(model, model.target)
    expected = moved(parameters_of(model.online), parameters_of(model.target), 0.9)
    model.update_target()
    for name, parameter in model.target.named_parameters():
        assert_close(parameter, expected[name], 1e-12, name)


def byol_class(host: str) -> Any:
    if host == "stand-in":
        return worker.load(worker.STANDINS / "byol_learner.py").BYOL
    modules: dict[str, Any] = {}
    if importlib.util.find_spec("torchvision") is None:  # only its default augmentation, not used here, needs it
        names = (
            "ColorJitter",
            "RandomGrayscale",
            "RandomHorizontalFlip",
            "GaussianBlur",
            "RandomResizedCrop",
            "Normalize",
        )
        torchvision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
        transforms.__dict__.update(dict.fromkeys(names, nn.Identity))
        torchvision.transforms = transforms
        modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}
    if importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("beartype") is None:
        trainer = ModuleType("byol_pytorch.trainer")  # the package's own loop
        trainer.BYOLTrainer = trainer.MockDataset = None
        modules["byol_pytorch.trainer"] = trainer
    with mock.patch.dict(sys.modules, modules):
        return importlib.import_module("byol_pytorch").BYOL


def flip(images: Tensor) -> Tensor:
    return images.flip(3)


def dense_byol(host: str) -> Any:
    torch.manual_seed(0)
    module = example("with_byol_pytorch")
    options = {"augment_fn": nn.Identity(), "augment_fn2": flip, "projection_hidden_size": 32}
    learner = byol_class(host)(module.TinyResNet(), 64, hidden_layer="avgpool", moving_average_decay=0.9, **options)
    model = module.DenseBYOL(learner, in_channels=64, hidden_channels=16, out_channels=8)
    return perturbed(perturbed(model, learner.target_encoder), model.target_head)


@pytest.mark.parametrize("host", BYOL_HOSTS)
def test_byol_pytorch_step(host: str) -> None:
    model = dense_byol(host)
    alone = copy.deepcopy(model.learner)
    online_head, target_head = copy.deepcopy(model.head.dense_mlp), copy.deepcopy(model.target_head.dense_mlp)
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    maps = []
    for net in (copy.deepcopy(model.learner.net), copy.deepcopy(model.learner.target_encoder.net)):
        both = torch.cat([images, flip(images)])
        maps.append(flat64(net.layer4(net.relu(net.bn1(net.conv1(both))))))
    byol_loss, dense_loss = model(images)
    dense_loss.backward()

    prediction = sequential(model.predictor, sequential(online_head, maps[0]))
    key = sequential(target_head, maps[1])
    first, second = slice(6), slice(6, 12)
    expected = 0.5 * sum(
        dense_direction((maps[0][one], maps[1][two]), prediction[one], key[two])[0].loss
        for one, two in ((first, second), (second, first))
    )
    assert_close(dense_loss, expected, TOLERANCE)
    assert_close(byol_loss, alone(images), TOLERANCE)  # the learner's own loss is as it was
    for part in (model.head.dense_mlp, model.predictor, model.learner.net.layer4):
        assert all(p.grad.abs().max() > 0 for p in part.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in model.learner.target_encoder.parameters())
    assert not model.learner.net.layer4._forward_hooks
    assert not model.learner.target_encoder.net.layer4._forward_hooks


@pytest.mark.parametrize("host", BYOL_HOSTS)
def test_byol_pytorch_moving_average(host: str) -> None:
    model = dense_byol(host)
    pairs = ((model.learner.online_encoder, model.learner.target_encoder), (model.head, model.target_head))
    expected = [moved(parameters_of(online), parameters_of(target), 0.9) for online, target in pairs]
    model.update_moving_average()
    for (_, target), wish in zip(pairs, expected, strict=True):
        for name, parameter in target.named_parameters():
            assert_close(parameter, wish[name], 1e-12, name)


def test_byol_pytorch_in_two_calls() -> None:
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
    assert_close(model(images)[1], together, TOLERANCE)


def test_byol_pytorch_without_momentum() -> None:
    module = example("with_byol_pytorch")
    learner = byol_class("stand-in")(module.TinyResNet(), 64, projection_hidden_size=32, use_momentum=False)
    with pytest.raises(ValueError, match=r"^learner: got a BYOL without target_encoder, expected one with"):
        module.DenseBYOL(learner, in_channels=64)


# ---- files and pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES.values())
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "with_moco":
        worker.recipe("stand-in").main(["--steps", "2"])
    else:
        learner = worker.load(worker.STANDINS / "byol_learner.py")
        with mock.patch.dict(sys.modules, {"byol_pytorch": learner}):
            example(name).main(["--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1"]
    assert "nan" not in " ".join(lines)


@pytest.mark.parametrize(("page", "name"), PAGES.items())
def test_pages_show_the_tested_code(page: str, name: str) -> None:
    """Every line that a page adds or shows stands in the example, in that order."""
    text = (ROOT / "docs" / "recipes" / f"{page}.md").read_text()
    code = (worker.EXAMPLES / f"{name}.py").read_text()
    lines = [squeezed(line) for line in code.splitlines()]
    blocks = re.findall(r"```(python|diff)\n(.*?)```", text, re.DOTALL)
    assert blocks
    for language, block in blocks:
        shown = block.splitlines()
        if language == "diff":
            shown = [line[1:] for line in shown if line.startswith("+")]
        shown = [squeezed(line) for line in shown if line.strip()]
        rest = iter(lines)
        for line in shown:
            assert line in EXEMPT or line in rest, f"{page}: {line!r} is not in {name}.py, or not in this order"
    assert f"docs/examples/{name}.py" in text or f"../examples/{name}.py" in text


EXEMPT = {  # lines that only a host's own script has; they are made of names that the tests above call
    "from with_moco import DenseMoCo",
    "model = DenseMoCo(",
    "from with_byol_pytorch import DenseBYOL",
    "model = DenseBYOL(learner, in_channels=2048)",
}


def squeezed(line: str) -> str:
    return re.sub(r"\s+#.*", "", line).strip()
