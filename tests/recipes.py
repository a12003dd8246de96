"""Recipes beside the equations: loading one over its host, and what its first step must compute."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, numpy64
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
STANDINS = Path(__file__).parent / "standins"
TOLERANCE = 1e-9


def load(path: Path, **modules: ModuleType) -> ModuleType:
    """A file as a module of its own. `modules` stand in sys.modules while it is imported; `__` means a dot."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {name.replace("__", "."): other for name, other in modules.items()}):
        spec.loader.exec_module(module)
    return module


def example(name: str, **modules: ModuleType) -> ModuleType:
    return load(EXAMPLES / f"{name}.py", **modules)


def hosts(package: str) -> list[Any]:
    """Parameters of a test: our stand-in, and the package itself where there is one."""
    missing = importlib.util.find_spec(package) is None
    return ["stand-in", pytest.param(package, marks=pytest.mark.skipif(missing, reason=f"no {package}"))]


def views(batch: int = 4, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, batch, 3, height, width, dtype=torch.float64)
    return first, 0.5 * first + second


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
        inputs.append(numpy64(given[0]).reshape(shape).copy())

    hook = module.register_forward_pre_hook(keep)
    yield inputs
    hook.remove()


def info_nce(query: np.ndarray, key: np.ndarray, negatives: np.ndarray, **options: Any) -> oracle.LossResult:
    query, key = (x if x.ndim == 3 else x[:, :, None] for x in (query, key))
    return oracle.info_nce(query, key, negatives, **({"temperature": 0.2} | options))


def check_maps(seen: list[np.ndarray], wish: tuple[Tensor, ...]) -> None:
    assert len(seen) == len(wish)
    for actual, expected in zip(seen, wish, strict=True):
        assert_close(actual, expected, TOLERANCE, "input of the head")


def check_queue(queue: Any, before: np.ndarray, keys: np.ndarray) -> None:
    truth = oracle.Queue(len(before), before)
    truth.enqueue(keys)
    assert int(queue.position) == truth.position == len(keys) % len(before)
    assert_close(queue.rows, truth.rows(), TOLERANCE, "queue")


def check_momentum(online: nn.Module, momentum: nn.Module, before: oracle.Params, m: float = 0.9) -> None:
    seen = parameters_of(momentum)
    for name, theirs in parameters_of(online).items():
        assert_close(seen[name], m * before[name] + (1 - m) * theirs, TOLERANCE, name)


def check_all_trained(model: nn.Module, *parts: nn.Module) -> None:
    """After backward: every trained parameter has a gradient, no other has, and those of `parts` are not all zero."""
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    for part in parts:
        assert all(p.grad.abs().max() > 0 for p in part.parameters() if p.ndim > 1)


class Network(NamedTuple):
    """The online or the momentum network of a recipe with queues."""

    whole: nn.Module  # what the momentum update moves: backbone and head
    head: nn.Module
    maps: Callable[[Tensor], tuple[Tensor, ...]]  # from images to what the head is called on, the map first

    @classmethod
    def of(cls, backbone: nn.Module, head: nn.Module) -> Network:
        return cls(nn.ModuleList([backbone, head]), head, lambda images: (backbone(images),))


def check_moco_step(
    model: nn.Module,
    step: Callable[..., tuple[Tensor, ...]],
    online: Network,
    momentum: Network,
    grid: tuple[int, int] | None = None,
    images: tuple[Tensor, Tensor] | None = None,
) -> tuple[int, ...]:
    """Everything in one step of a recipe with both terms of MoCo: losses, ranks, keys, momentum and head gradients.

    The key network moves (0.9) before it is used. A head that is called twice takes its image vector from the second
    call. Returns the shape of the query map.
    """
    images = views() if images is None else images
    disturb(online.whole)
    before = parameters_of(momentum.whole)
    rows = numpy64(model.image_queue.rows).copy(), numpy64(model.dense_queue.rows).copy()
    with inputs_of(online.head) as maps_q, inputs_of(momentum.head) as maps_k:
        image_loss, dense_loss, *rank = step(*images)
    check_momentum(online.whole, momentum.whole, before)
    for network, seen, view in ((online, maps_q, images[0]), (momentum, maps_k, images[1])):
        check_maps(seen, network.maps(view))

    weights = parameters_of(online.head), parameters_of(momentum.head)
    query, key = (with_image_of(w, maps, grid) for w, maps in zip(weights, (maps_q, maps_k), strict=True))
    image = info_nce(query.image, key.image, rows[0])
    dense = info_nce(query.dense, key.dense, rows[1], index=oracle.match(query.grid, key.grid).index)
    assert_close(image_loss, image.loss, TOLERANCE, "image term")
    assert_close(dense_loss, dense.loss, TOLERANCE, "dense term")
    for ranks in rank:
        assert ranks.tolist() == image.rank.tolist()
    check_queue(model.image_queue, rows[0], key.image)
    check_queue(model.dense_queue, rows[1], key.pooled)

    (0.3 * image_loss + 0.7 * dense_loss).backward()
    wish = oracle.head_gradients(weights[0], query, 0.3 * image.query[:, :, 0], 0.7 * dense.query)
    for name, parameter in online.head.named_parameters():
        assert np.abs(wish[name]).max() > 1e-6, name
        assert_close(parameter.grad, wish[name], TOLERANCE, name)
    check_all_trained(model)
    return maps_q[0].shape


def with_image_of(params: oracle.Params, maps: list[np.ndarray], grid: tuple[int, int] | None) -> oracle.HeadResult:
    first, last = (oracle.head(params, features, grid) for features in (maps[0], maps[-1]))
    return first._replace(image=last.image, mean=last.mean)


def perceptron(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """Linear, batch norm with the statistics of the batch, ReLU, linear on (B, C, P), from the weights."""
    first, norm, _, last = (m for m in module if not isinstance(m, nn.Flatten | nn.Unflatten))
    for layer in (first, norm, last):
        weight, bias = numpy64(layer.weight), 0 if layer.bias is None else numpy64(layer.bias)[:, None]
        if layer is norm:
            mean, variance = x.mean((0, 2))[:, None], x.var((0, 2))[:, None]
            x = np.maximum((x - mean) / np.sqrt(variance + norm.eps) * weight[:, None] + bias, 0)
        else:
            x = np.einsum("dc,bcp->bdp", weight.reshape(len(weight), -1), x) + bias
    return x


def dense_direction(maps: tuple[np.ndarray, np.ndarray], prediction: np.ndarray, key: np.ndarray) -> float:
    """BYOL's dense term of one direction, from maps (B, C, P), predictions and the target's dense map (B, D, P)."""
    negatives, index = oracle.unit(key.mean(2), 1)[0], oracle.match(*maps).index
    return float(info_nce(prediction, key, negatives, index=index, exclude=np.arange(len(key))).loss)


def byol_terms(
    maps: tuple[np.ndarray, np.ndarray], heads: tuple[nn.Module, nn.Module], predictors: tuple[nn.Module, nn.Module]
) -> tuple[float, float]:
    """Mean cosine and dense term of one direction, from maps (B, C, H, W) and the weights of BYOL's networks."""
    grids = tuple(x.reshape(*x.shape[:2], -1) for x in maps)
    image, key = (perceptron(h.image_mlp, x.mean(2, keepdims=True)) for h, x in zip(heads, grids, strict=True))
    dense, dense_key = (perceptron(h.dense_mlp, x) for h, x in zip(heads, grids, strict=True))
    cosine = oracle.unit(perceptron(predictors[0], image), 1)[0] * oracle.unit(key, 1)[0]
    return cosine.sum(1).mean(), dense_direction(grids, perceptron(predictors[1], dense), dense_key)


PRINTED = r"(image|byol)(_loss)? -?\d+\.\d+, dense(_loss)? \d+\.\d+"  # by every example


def check_main(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The two steps that main() takes on random images."""
    recipe.main(["--steps", "2"])
    for step, line in enumerate(capsys.readouterr().out.splitlines()):
        assert re.match(f"step {step}: {PRINTED}", line), line
    assert step == 1
