"""One rank of test_recipe_byol_pytorch.py: python byol_worker.py RANK WORLD DIRECTORY HOST."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from recipes import STANDINS, disturb, example, load
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BATCH, STEPS = 6, 3  # images over all ranks


def byol_class(host: str) -> Any:
    if host == "stand-in":
        return load(STANDINS / "byol_learner.py").BYOL
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
    """Over the stand-in, or over the package. To be made before the process group: in one the package wants GPUs."""
    torch.manual_seed(0)
    module = example("with_byol_pytorch")
    options = {"augment_fn": nn.Identity(), "augment_fn2": flip, "projection_hidden_size": 32}
    learner = byol_class(host)(module.TinyResNet(), 64, hidden_layer="avgpool", moving_average_decay=0.9, **options)
    model = module.DenseBYOL(learner, in_channels=64, hidden_channels=16, out_channels=8)
    disturb(learner.target_encoder, model.target_head)
    for module in model.modules():  # the learner has seen a batch in float32, whose rounding goes with the threads
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    return model.double()


def run(model: Any, wrapped: nn.Module, share: slice) -> list[dict[str, Any]]:
    """What every step computed and left behind, with fixed batch statistics: the batch norm of ranks would differ."""
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps = []
    for step in range(STEPS):
        images = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        byol_loss, dense_loss = wrapped(images[share])
        optimizer.zero_grad()
        (0.3 * byol_loss + 0.7 * dense_loss).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        model.update_moving_average()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        steps.append({"losses": torch.stack([byol_loss, dense_loss]).detach(), "grad": gradients, "state": state})
    return steps


def main(rank: int, world: int, directory: Path, host: str) -> None:
    torch.set_num_threads(1)
    model = dense_byol(host)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    torch.save(run(model, DistributedDataParallel(model), share), directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
