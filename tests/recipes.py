"""What a recipe's step must compute, written in plain torch for a twin of its networks; and the hosts of recipes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import standins
import torch
import torch.nn.functional as F
from pages import EXAMPLES
from torch import Tensor, nn

from densecl_ops import MomentumQueue, Projection

# ---- hosts -----------------------------------------------------------------------------------------------------------


class Unused(ModuleType):
    """Has any name that is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nn.Identity


def stand_ins() -> dict[str, ModuleType]:
    """For sys.modules: hosts that are not installed, and what lightly and byol-pytorch import and no recipe uses."""
    found: dict[str, ModuleType] = dict.fromkeys(("solo", "solo.methods", "solo.methods.mocov2plus"), standins)
    if find_spec("moco") is None:  # a clone on PYTHONPATH
        found |= {"moco": standins, "moco.builder": standins}
    if find_spec("torchvision") is None:
        found |= {name: Unused(name) for name in ("torchvision", "torchvision.ops", "torchvision.transforms")}
        found["torchvision"].transforms = found["torchvision.transforms"]
    if find_spec("accelerate") is None or find_spec("beartype") is None:
        found["byol_pytorch.trainer"] = Unused("byol_pytorch.trainer")
    return found


def example(name: str) -> ModuleType:
    """A file of docs/examples as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- a step in plain torch -------------------------------------------------------------------------------------------


def encode(encoder: Any, images: Tensor) -> tuple[Tensor, Projection]:
    """The map that is matched, and what the head makes of it."""
    features = encoder.backbone(images)
    return features, encoder.head(features)


def encoder_of(backbone: nn.Module, head: nn.Module) -> nn.Module:
    """For hosts that keep the two apart."""
    return nn.ModuleDict({"backbone": backbone, "head": head})


def info_nce(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float = 0.2, exclude_own: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean loss, and ranks (B, P) of the positives, of (B, D, P) or (B, D) vectors and (K, D) unit negatives."""
    query, key = (F.normalize(x, dim=1) for x in (query, key))
    positive = (query * key).sum(1)
    others = torch.einsum("bd...,kd->bk...", query, negatives)
    if exclude_own:  # row b is of image b
        others[range(len(query)), range(len(query))] = -torch.inf
    logits = torch.cat([positive[:, None], others], 1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(positive, dtype=torch.long)), (others > positive[:, None]).sum(1)


def matched(map_q: Tensor, map_k: Tensor, dense_key: Tensor) -> Tensor:
    """(B, D, P): the vector of the key position whose feature is nearest, for each query position."""
    unit_q, unit_k = (F.normalize(x.flatten(2), dim=1) for x in (map_q, map_k))
    index = torch.einsum("bcp,bcq->bpq", unit_q, unit_k).argmax(2)
    return dense_key.flatten(2).gather(2, index[:, None].expand(-1, dense_key.shape[1], -1))


def moco_terms(
    online: nn.Module,
    momentum: nn.Module,
    queues: tuple[MomentumQueue, MomentumQueue],
    views: tuple[Tensor, Tensor],
    encode: Callable[[Any, Tensor], tuple[Tensor, Projection]] = encode,
    temperature: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image term, dense term and the rank of each image's own key; then the keys enter the queues."""
    map_q, query = encode(online, views[0])
    with torch.no_grad():
        map_k, key = encode(momentum, views[1])
    rows = [queue.rows[: int(queue.count)] for queue in queues]
    image, rank = info_nce(query.image, key.image, rows[0], temperature)
    dense, _ = info_nce(query.dense.flatten(2), matched(map_q, map_k, key.dense), rows[1], temperature)
    enqueue(queues[0], key.image)
    enqueue(queues[1], key.pooled)
    return image, dense, rank[:, None]


@torch.no_grad()
def enqueue(queue: MomentumQueue, keys: Tensor) -> None:
    queue.rows = queue.rows.clone()  # backward still needs those before
    queue.rows[(queue.position + torch.arange(len(keys))) % queue.size] = F.normalize(keys, dim=1)
    queue.position.copy_((queue.position + len(keys)) % queue.size)
    queue.count.copy_(min(queue.count + len(keys), queue.size))


@torch.no_grad()
def move(online: nn.Module, momentum: nn.Module) -> None:
    for theirs, ours in zip(online.parameters(), momentum.parameters(), strict=True):
        ours.copy_(0.9 * ours + 0.1 * theirs)


def views(batch: int = 4, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, batch, 3, height, width, dtype=torch.float64)
    return first, 0.5 * first + second


def disturb(*modules: nn.Module) -> None:
    """Online networks that differ from the momentum networks, as in the middle of a training."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))


def assert_close(seen: Any, expected: Any) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-12)


def assert_same_step(model: nn.Module, twin: nn.Module) -> None:
    """Gradients, weights, queues. What is trained must have a gradient, or DistributedDataParallel would wait."""
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert_close(parameter.grad, twin.get_parameter(name).grad)
    order = ("running_mean", "running_var", "num_batches_tracked")  # depend on that of the views, and on repetitions
    assert_close(*({name: x for name, x in m.state_dict().items() if not name.endswith(order)} for m in (model, twin)))


# ---- models that run on two ranks, too -------------------------------------------------------------------------------


def dense_moco() -> Any:
    """Over a clone of facebookresearch/moco on PYTHONPATH, or over the stand-in of it."""
    recipe = example("with_moco")
    model = recipe.DenseMoCo(recipe.TinyResNet, dim=5, K=13, m=0.9, T=0.2).double()
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
    return model.double()
