"""Recipes beside the equations: loading one over its host, and what its first step must compute."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import oracle
import standins
import torch
from helpers import assert_close, flat64, numpy64
from pages import EXAMPLES
from torch import Tensor, nn

TOLERANCE = 1e-9


class Unused(ModuleType):
    """Has any name that is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nn.Identity


def stand_ins() -> dict[str, ModuleType]:
    """For hosts that are not installed, and for what lightly and byol-pytorch import and the recipes do not use."""
    found = {"solo": standins, "solo.methods": standins, "solo.methods.mocov2plus": standins}
    if find_spec("moco") is None:  # a clone on PYTHONPATH
        found |= {"moco": standins, "moco.builder": standins}
    if find_spec("torchvision") is None:
        found |= {name: Unused(name) for name in ("torchvision", "torchvision.ops", "torchvision.transforms")}
        found["torchvision"].ops = found["torchvision.ops"]
        found["torchvision"].transforms = found["torchvision.transforms"]
    if find_spec("accelerate") is None or find_spec("beartype") is None:
        found["byol_pytorch.trainer"] = Unused("byol_pytorch.trainer")
    return found


@contextmanager
def hosts() -> Iterator[None]:
    """All hosts can be imported inside. What they import stays, for it can register only once."""
    added = stand_ins()
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def example(name: str) -> ModuleType:
    """A file of docs/examples as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def info_nce(
    query: np.ndarray, key: np.ndarray, negatives: np.ndarray | oracle.Queue, **options: Any
) -> oracle.LossResult:
    query, key = (x if x.ndim == 3 else x[:, :, None] for x in (query, key))
    if isinstance(negatives, oracle.Queue):
        options["count"] = negatives.count
        negatives = negatives.rows() if negatives.count else np.zeros((1, query.shape[1]))
    return oracle.info_nce(query, key, negatives, **({"temperature": 0.2} | options))


def check_maps(seen: list[np.ndarray], wish: tuple[Tensor, ...]) -> None:
    assert len(seen) == len(wish)
    for actual, expected in zip(seen, wish, strict=True):
        assert_close(actual, expected, TOLERANCE, "input of the head")


def truth_of(queue: Any) -> oracle.Queue:
    """The queue as it is now."""
    position, rows = int(queue.position), numpy64(queue.rows[: int(queue.count)])
    truth = oracle.Queue(queue.size, np.roll(rows, -position, 0) if len(rows) == queue.size else rows.copy())
    truth.written = position
    return truth


def check_queue(queue: Any, truth: oracle.Queue, keys: np.ndarray, tolerance: float = TOLERANCE) -> None:
    truth.enqueue(keys)
    assert (int(queue.position), int(queue.count)) == (truth.position, truth.count)
    assert_close(queue.rows[: truth.count], truth.rows(), tolerance, "queue")


def check_momentum(online: nn.Module, momentum: nn.Module, before: oracle.Params, tolerance: float = TOLERANCE) -> None:
    seen = parameters_of(momentum)
    for name, theirs in parameters_of(online).items():
        assert_close(seen[name], 0.9 * before[name] + 0.1 * theirs, tolerance, name)


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
    tolerance: float = TOLERANCE,
) -> tuple[int, ...]:
    """Everything in one step of a trainer with both terms of MoCo: losses, ranks, keys, momentum and head gradients.

    The key network moves (0.9) before it is used. A head that is called twice takes its image vector from the second
    call. Returns the shape of the query map.
    """
    images = views() if images is None else images
    disturb(online.whole)
    before, queues = parameters_of(momentum.whole), (truth_of(model.image_queue), truth_of(model.dense_queue))
    empty = queues[0].count == 0
    with inputs_of(online.head) as maps_q, inputs_of(momentum.head) as maps_k:
        image_loss, dense_loss, *rank = step(*images)
    check_momentum(online.whole, momentum.whole, before, tolerance)
    for network, seen, view in ((online, maps_q, images[0]), (momentum, maps_k, images[1])):
        check_maps(seen, network.maps(view))

    weights = parameters_of(online.head), parameters_of(momentum.head)
    query, key, image, dense = moco_terms(weights, (maps_q, maps_k), queues, grid)
    assert_close(image_loss, image.loss, tolerance, "image term")
    assert_close(dense_loss, dense.loss, tolerance, "dense term")
    for ranks in rank:
        low, high = oracle.rank_bounds(image, 5 * tolerance)
        assert ((low <= numpy64(ranks)) & (numpy64(ranks) <= high)).all()
    check_queue(model.image_queue, queues[0], key.image, tolerance)
    check_queue(model.dense_queue, queues[1], key.pooled, tolerance)

    model.zero_grad()
    (0.3 * image_loss + 0.7 * dense_loss).backward()
    wish = oracle.head_gradients(weights[0], query, 0.3 * image.query[:, :, 0], 0.7 * dense.query)
    for name, parameter in online.head.named_parameters():
        assert empty or np.abs(wish[name]).max() > 1e-6, name
        assert_close(parameter.grad, wish[name], 2 * tolerance, name)
    check_all_trained(model)
    return maps_q[0].shape


def moco_terms(
    weights: tuple[oracle.Params, oracle.Params],
    maps: tuple[list[np.ndarray], list[np.ndarray]],
    queues: tuple[oracle.Queue, oracle.Queue],
    grid: tuple[int, int] | None = None,
) -> tuple[oracle.HeadResult, oracle.HeadResult, oracle.LossResult, oracle.LossResult]:
    """Query, key, image term and dense term from the weights of both heads and what they were called on."""
    heads = []
    for params, inputs in zip(weights, maps, strict=True):
        first, last = (oracle.head(params, features, grid) for features in (inputs[0], inputs[-1]))
        heads.append(first._replace(image=last.image, mean=last.mean))
    query, key = heads
    image = info_nce(query.image, key.image, queues[0])
    return (
        query,
        key,
        image,
        info_nce(query.dense, key.dense, queues[1], index=oracle.match(query.grid, key.grid).index),
    )


def byol_terms(
    maps: tuple[Tensor, Tensor],
    heads: tuple[nn.Module, nn.Module],
    predictors: tuple[nn.Module, nn.Module],
    contrastive: bool = True,
) -> tuple[float, float]:
    """Mean cosine and dense term of one direction, from the maps of the two views and the recipe's own layers."""
    with torch.no_grad():
        query, key = (head(features) for head, features in zip(heads, maps, strict=True))
        cosine = nn.functional.cosine_similarity(predictors[0](query.image), key.image).mean()
        prediction, dense_key = flat64(predictors[1](query.dense)), flat64(key.dense)
    index = oracle.match(*map(flat64, maps)).index
    if contrastive:
        negatives = oracle.unit(dense_key.mean(2), 1)[0]
        return float(cosine), float(
            info_nce(prediction, dense_key, negatives, index=index, exclude=np.arange(len(index))).loss
        )
    matched = np.take_along_axis(dense_key, index[:, None, :], 2)
    return float(cosine), (2 - 2 * (oracle.unit(prediction, 1)[0] * oracle.unit(matched, 1)[0]).sum(1)).mean()


# ---- models that run on two ranks, too -------------------------------------------------------------------------------


def dense_moco() -> Any:
    """Over a clone of facebookresearch/moco on PYTHONPATH, or over the stand-in of it."""
    model = example("with_moco").DenseMoCo(standins.TinyResNet, dim=5, K=13, m=0.9, T=0.2).double()
    disturb(model.encoder_k)
    return model


def dense_byol() -> Any:
    """To be made before the process group: in one the package wants GPUs."""
    from byol_pytorch import BYOL

    recipe = example("with_byol_pytorch")
    options = {"augment_fn": nn.Identity(), "augment_fn2": partial(torch.flip, dims=[3]), "projection_hidden_size": 32}
    options |= {"hidden_layer": "avgpool", "moving_average_decay": 0.9}
    learner = BYOL(recipe.TinyResNet(), 64, **options)
    model = recipe.DenseBYOL(learner, in_channels=64, hidden_channels=16, out_channels=8)
    disturb(learner.target_encoder, model.target_head)
    for module in model.modules():  # the learner has seen a batch in float32, whose rounding goes with the threads
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    return model.double()
