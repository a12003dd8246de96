"""Pre-training without labels: MoCo-v2 and BYOL, each alone and with a dense term.

Arms of one seed start from the same backbone and see the same views in the same order; those of one host start from the
same heads and queues, too. Every arm takes one pass of one view per network and step.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.transfer.encoder import WIDTHS, autocast, encode, resnet
from benchmarks.transfer.views import Views, draw
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import dense_cosine, in_batch_negatives, location_correspondence

RANDOM, IMAGE, BYOL = "random", "image", "byol"  # random weights; the image term of MoCo-v2 and of BYOL alone
# MoCo-v2's are called after the rule that matches positions, BYOL's after the loss of a pair.
DENSE = ("nearest", "mutual", "place", "byol_dense", "byol_contrast")
ARMS = (RANDOM, IMAGE, "nearest", "mutual", "place", BYOL, "byol_dense", "byol_contrast")
CURVE = 50  # points of a record's loss curves
SETTLING = 100  # steps in which the arm of random weights gathers batch norm statistics, and learns nothing


@dataclass(frozen=True)
class Setting:
    """One run: what its record is filed under, and all that decides its weights."""

    arm: str
    seed: int
    rate: float
    steps: int = 800
    encoder: str = "narrow"
    view: int = 64
    window: int = 112
    batch: int = 32
    queue: int = 1024
    momentum: float = 0.99
    temperature: float = 0.2
    dense_weight: float = 0.5
    dense_from: float = 0.05  # share of the steps after which the dense term joins in
    norm: str = "batch"

    @property
    def name(self) -> str:
        """Of the run's file; settings that differ from the suite's defaults are part of it."""
        words = [self.arm, f"seed{self.seed}", f"rate{self.rate:g}", f"steps{self.steps}"]
        usual = asdict(Setting(self.arm, self.seed, self.rate, self.steps))
        return "-".join(words + [f"{key}{value}" for key, value in asdict(self).items() if value != usual[key]])


class Siamese(nn.Module):
    """The trained backbone and head, their moving averages, and what MoCo-v2 or BYOL adds to them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.arm, byol, widths = setting.arm, setting.arm.startswith(BYOL), WIDTHS[setting.encoder]
        width, norm = widths[-1], nn.BatchNorm2d if byol else None
        self.backbone_q, self.backbone_k = (resnet(widths, setting.norm) for _ in range(2))
        self.head_q, self.head_k = (DenseProjectionHead(width, width, norm_layer=norm) for _ in range(2))
        self.backbone_k.load_state_dict(self.backbone_q.state_dict())
        self.head_k.load_state_dict(self.head_q.state_dict())
        self.backbone_k.requires_grad_(False)
        self.head_k.requires_grad_(False)
        self.predict_image, self.predict_dense = (predictor(width) if byol else nn.Identity() for _ in range(2))
        self.image_queue, self.dense_queue = (MomentumQueue(setting.queue) for _ in range(2))
        self.match = DenseCorrespondence(mutual=self.arm == "mutual")
        self.criterion = DenseInfoNCELoss(setting.temperature)

    @torch.no_grad()
    def update_keys(self, momentum: float) -> None:
        keys: list[Tensor] = [*self.backbone_k.parameters(), *self.head_k.parameters()]
        queries: list[Tensor] = [*self.backbone_q.parameters(), *self.head_q.parameters()]
        torch._foreach_lerp_(keys, queries, 1 - momentum)

    def forward(self, query: Views, key: Views, momentum: float) -> tuple[Tensor, Tensor]:
        """Image term and dense term; the latter is 0 where the arm has none."""
        map_q = encode(self.backbone_q, query.images)
        with torch.no_grad():
            self.update_keys(momentum)
            map_k = encode(self.backbone_k, key.images)
        with autocast(map_q.device):
            projected_q = self.head_q(map_q)
            with torch.no_grad():
                projected_k = self.head_k(map_k)
            image = self.predict_image(projected_q.image[..., None, None]).flatten(1)
            dense = self.predict_dense(projected_q.dense) if self.arm in DENSE else None
        if self.arm.startswith(BYOL):
            image_loss = dense_cosine(image, projected_k.image)
        else:
            image_loss = self.criterion(image, projected_k.image, self.image_queue)
            self.image_queue.enqueue(projected_k.image)
        if dense is None:
            return image_loss, torch.zeros_like(image_loss)
        if self.arm == "place":
            match = location_correspondence(query.boxes, key.boxes, (map_q.shape[2], map_q.shape[3]))
        else:
            match = self.match(map_q, map_k)
        if self.arm == "byol_dense":
            return image_loss, dense_cosine(dense, projected_k.dense, match)
        if self.arm == "byol_contrast":
            negatives, own = in_batch_negatives(projected_k.pooled)
            return image_loss, self.criterion(dense, projected_k.dense, negatives, match, exclude=own)
        dense_loss = self.criterion(dense, projected_k.dense, self.dense_queue, match)
        self.dense_queue.enqueue(projected_k.pooled)
        return image_loss, dense_loss


def predictor(width: int) -> nn.Module:
    """BYOL's: docs/recipes/byol.md has the same, and trains in both directions."""
    layers = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1)
    return nn.Sequential(*layers)


def pretrain(
    setting: Setting, photographs: list[Tensor], say: Callable[[str], None]
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains; returns the backbone and what happened. After initialisation only the views' generator is drawn from."""
    torch.manual_seed(setting.seed)
    model = Siamese(setting).to(photographs[0].device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    generator = torch.Generator().manual_seed(setting.seed)
    views = functools.partial(draw, photographs, setting.batch, setting.window, setting.view, generator)
    if setting.arm == RANDOM:
        with torch.no_grad():  # batch norm statistics of the views: as good as random weights can be used
            for _ in range(SETTLING):
                encode(model.backbone_q, views()[0].images)
        return model.backbone_q, {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, setting.rate, momentum=0.9, weight_decay=1e-4)
    history = torch.zeros(setting.steps, 2)
    began = time.perf_counter()
    for step in range(setting.steps):
        done = step / setting.steps  # linear warm-up over the first twentieth, half a cosine over all
        rate = min(1.0, 20 * (step + 1) / setting.steps) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = setting.rate * rate
        query, key = views()
        image_loss, dense_loss = model(query, key, setting.momentum)
        joined = setting.arm in DENSE and step >= setting.dense_from * setting.steps
        weight = setting.dense_weight if joined else 0.0
        loss = (1 - weight) * image_loss + weight * dense_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history[step] = torch.stack([image_loss, dense_loss]).detach()
        if (step + 1) % 100 == 0:
            say(f"step {step + 1} of {setting.steps}, image {image_loss:.3f}, dense {dense_loss:.3f}")
    if not history.isfinite().all():
        raise FloatingPointError(f"{setting.name}: the loss is not finite")
    curves = [curve.mean(0) for curve in history.tensor_split(min(CURVE, setting.steps))]
    image, dense = torch.stack(curves).T.tolist()
    facts: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
    facts["image_loss"] = [round(value, 4) for value in image]
    if setting.arm in DENSE:
        facts["dense_loss"] = [round(value, 4) for value in dense]
    return model.backbone_q, facts
