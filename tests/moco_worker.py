"""One rank of test_recipe_moco.py: python moco_worker.py RANK WORLD DIRECTORY HOST."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from recipes import STANDINS, disturb, example, load
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BATCH, STEPS = 6, 2  # images over all ranks


def recipe(host: str) -> ModuleType:
    """docs/examples/with_moco.py over the stand-in, or over a clone of facebookresearch/moco on PYTHONPATH."""
    if host == "moco":
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


def new_model(module: ModuleType, **options: Any) -> Any:
    torch.manual_seed(0)
    model = module.DenseMoCo(Encoder, dim=5, **{"K": 16, "m": 0.9, "T": 0.2} | options).double()
    disturb(model.encoder_k)
    return model


def views(step: int) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, BATCH, 3, 24, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return first, 0.5 * first + second


def run(model: Any, wrapped: nn.Module, share: slice) -> list[dict[str, Any]]:
    """What every step computed and left behind."""
    seen: list[Tensor] = []
    model.encoder_k.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps = []
    for step in range(STEPS):
        im_q, im_k = (view[share] for view in views(step))
        image_loss, dense_loss, rank = wrapped(im_q, im_k)
        optimizer.zero_grad()
        (0.3 * image_loss + 0.7 * dense_loss).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        losses = torch.stack([image_loss, dense_loss]).detach()
        steps.append({"losses": losses, "rank": rank, "grad": gradients, "state": state, "keys": seen[-1]})
    return steps


def main(rank: int, world: int, directory: Path, host: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    module = recipe(host)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)

    model = new_model(module)
    results = {"right": run(model, DistributedDataParallel(model), share)}
    broken = new_model(module)
    broken._batch_unshuffle_ddp = lambda x, idx_unshuffle: x
    results["shuffle not undone"] = run(broken, DistributedDataParallel(broken), share)
    torch.save(results, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
