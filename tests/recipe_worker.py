"""Recipes for the tests on two ranks. One rank: python recipe_worker.py RANK WORLD DIRECTORY NAME..."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from helpers import assert_close, run_ranks
from recipes import STANDINS, TOLERANCE, disturb, example, imported, load, torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BATCH, STEPS = 6, 3  # images over all ranks


def moco() -> ModuleType:
    """docs/examples/with_moco.py over a clone of facebookresearch/moco on PYTHONPATH, or over the stand-in of it."""
    if find_spec("moco") is not None:
        return example("with_moco")
    return example("with_moco", moco=ModuleType("moco"), moco__builder=load(STANDINS / "moco_builder.py"))


class Encoder(nn.Sequential):
    """A torchvision ResNet's names; ranks can only agree with one process without batch norm."""

    def __init__(self, num_classes: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 4, 4)
        self.bn1 = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.layer4 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh())
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, num_classes)


def dense_moco(size: int = 16) -> Any:
    model = moco().DenseMoCo(Encoder, dim=5, K=size, m=0.9, T=0.2).double()
    disturb(model.encoder_k)
    return model


def dense_moco_unshuffled() -> Any:
    """A mistake: keys stay in the order in which they were shuffled."""
    model = dense_moco()
    model._batch_unshuffle_ddp = lambda x, idx_unshuffle: x
    return model


def moco_views(step: int) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, BATCH, 3, 24, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return first, 0.5 * first + second


def byol_pytorch() -> Any:
    """The package, without its own training loop where that cannot be imported."""
    modules: dict[str, Any] = torchvision()
    if find_spec("accelerate") is None or find_spec("beartype") is None:
        modules["byol_pytorch__trainer"] = ModuleType("byol_pytorch.trainer")
        modules["byol_pytorch__trainer"].BYOLTrainer = modules["byol_pytorch__trainer"].MockDataset = None
    with imported(**modules):
        return importlib.import_module("byol_pytorch")


def flip(images: Tensor) -> Tensor:
    return images.flip(3)


def dense_byol() -> Any:
    """To be made before the process group: in one the package wants GPUs."""
    recipe = example("with_byol_pytorch")
    options = {"augment_fn": nn.Identity(), "augment_fn2": flip, "projection_hidden_size": 32}
    options |= {"hidden_layer": "avgpool", "moving_average_decay": 0.9}
    learner = byol_pytorch().BYOL(recipe.TinyResNet(), 64, **options)
    model = recipe.DenseBYOL(learner, in_channels=64, hidden_channels=16, out_channels=8)
    disturb(learner.target_encoder, model.target_head)
    for module in model.modules():  # the learner has seen a batch in float32, whose rounding goes with the threads
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    return model.double()


def byol_images(step: int) -> tuple[Tensor]:
    return (torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(step), dtype=torch.float64),)


# Name -> its model, and the images of all ranks at a step.
RECIPES: dict[str, tuple[Callable[[], Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "moco": (dense_moco, moco_views),
    "moco, shuffle not undone": (dense_moco_unshuffled, moco_views),
    "byol-pytorch": (dense_byol, byol_images),
}


def new_model(name: str) -> Any:
    torch.manual_seed(0)
    return RECIPES[name][0]()


def run(name: str, model: Any, wrapped: nn.Module, share: slice) -> list[dict[str, Any]]:
    """What every step computed and left behind, with fixed batch statistics: the batch norm of ranks would differ."""
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps = []
    for step in range(STEPS):
        image_loss, dense_loss, *ranks = wrapped(*(images[share] for images in RECIPES[name][1](step)))
        optimizer.zero_grad()
        (0.3 * image_loss + 0.7 * dense_loss).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        if hasattr(model, "update_moving_average"):
            model.update_moving_average()
        state = {name: value.double() for name, value in model.state_dict().items()}
        losses = torch.stack([image_loss, dense_loss]).detach()
        steps.append({"losses": losses, "ranks": ranks, "grad": gradients, "state": state})
    return steps


def check_two_ranks(directory: Path, name: str, *others: str) -> tuple[list[Any], list[Any]]:
    """Two gloo processes on half a batch each against this one on the whole; returns the steps of this one and theirs.

    DistributedDataParallel refuses, at the second step, a trained parameter without a gradient, such as an unused fc.
    """
    model = new_model(name)
    alone, ranks = run(name, model, model, slice(None)), run_ranks(__file__, 2, directory, name, *others)
    for step, wish in enumerate(alone):
        first, second = (results[name][step] for results in ranks)
        assert_close((first["losses"] + second["losses"]) / 2, wish["losses"], TOLERANCE, "losses")
        for one, two, both in zip(first["ranks"], second["ranks"], wish["ranks"], strict=True):
            assert torch.equal(torch.cat([one, two]), both)
        for seen in (first, second):
            for kind in ("grad", "state"):
                assert seen[kind].keys() == wish[kind].keys()
                for key, value in wish[kind].items():
                    assert_close(seen[kind][key], value, TOLERANCE, f"{kind} {key}")
    return alone, ranks


def main(rank: int, world: int, directory: Path, *names: str) -> None:
    torch.set_num_threads(1)
    models = {name: new_model(name) for name in names}
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    results = {name: run(name, model, DistributedDataParallel(model), share) for name, model in models.items()}
    torch.save(results, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
