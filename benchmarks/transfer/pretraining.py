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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops._processor import processor
from densecl_ops.functional import dense_cosine, in_batch_negatives, location_correspondence

RANDOM, IMAGE, BYOL = "random", "image", "byol"  # random weights; the image term of MoCo-v2 and of BYOL alone
# MoCo-v2's are called after the rule that matches positions, BYOL's after the loss of a pair.
DENSE = ("nearest", "mutual", "place", "byol_dense", "byol_contrast")
ARMS = (RANDOM, IMAGE, "nearest", "mutual", "place", BYOL, "byol_dense", "byol_contrast")
SETTLING = 100  # steps in which the arm of random weights gathers batch norm statistics, and learns nothing
WIDTH = 128  # channels of the backbone's map
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(8, channels),  # what each image alone decides
}


@dataclass(frozen=True)
class Setting:
    """One run: what its record is filed under, and all that decides its weights."""

    arm: str
    seed: int
    rate: float
    steps: int = 800
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


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = norm(channels), norm(channels)
        self.downsample: nn.Module = nn.Identity()
        if channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        return torch.relu_(out + self.downsample(x))


def resnet(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """(B, 3, H, W) to (B, WIDTH, H / 8, W / 8): as the demo's, half as wide."""
    blocks = [Block(*size, norm) for size in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, WIDTH, 1))]
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU(inplace=True), *blocks)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def encode(network: nn.Module, images: Tensor) -> Tensor:
    """Features of uint8 or [0, 1] images, with ImageNet's mean and spread taken off, under `autocast`."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = ((x - 0.45) / 0.226).contiguous(memory_format=torch.channels_last)
    with autocast(x.device):
        features: Tensor = network(x)
    return features


def autocast(device: torch.device) -> torch.autocast:
    """To bfloat16 where there are instructions for it; elsewhere they would be emulated."""
    cuda = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else processor().bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


class Views(NamedTuple):
    """One view of every window: images (B, 3, V, V) in [0, 1], boxes (B, 4) in the window, x0 > x1 if mirrored."""

    images: Tensor
    boxes: Tensor


def draw(
    photographs: list[Tensor], batch: int, window: int, view: int, generator: torch.Generator
) -> tuple[Views, Views]:
    """Two views of the same windows. All random numbers come from the (CPU) generator: equal seeds, equal views."""
    place = torch.rand(batch, 3, generator=generator)
    first, second = torch.rand(2, batch, 14, generator=generator).to(photographs[0].device)
    windows = cut(photographs, place, window).float() / 255
    return augment(windows, first, view), augment(windows, second, view)


def cut(photographs: list[Tensor], uniform: Tensor, side: int) -> Tensor:
    """(B, 3, side, side) uint8; `uniform` (B, 3) chooses photograph, top and left."""
    found = []
    for which, down, right in uniform.tolist():
        image = photographs[int(which * len(photographs))]
        top, left = (int(x * (n - side + 1)) for x, n in zip((down, right), image.shape[1:], strict=True))
        found.append(image[:, top : top + side, left : left + side])
    return torch.stack(found)


def augment(windows: Tensor, uniform: Tensor, view: int) -> Views:
    """Crop, flip, colour jitter, grey and blur, each image by its own row of `uniform` (B, 14)."""
    from kornia.filters import gaussian_blur2d  # the other benchmarks do without

    u = uniform.unbind(1)
    # Random resized crop and flip in one resampling: width and height (1: the whole window) around (x, y) in [-1, 1].
    side, stretch = torch.sqrt(0.2 + 0.8 * u[0]), torch.exp((2 * u[1] - 1) * 0.5 * math.log(4 / 3))
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    x, y = (2 * u[2] - 1) * (1 - width), (2 * u[3] - 1) * (1 - height)
    mirrored = torch.where(u[4] < 0.5, -width, width)
    zero = torch.zeros_like(x)
    corners = torch.stack([mirrored, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(corners, [len(windows), 3, view, view], align_corners=False)
    images = F.grid_sample(windows, grid, padding_mode="border", align_corners=False)

    images = _recolour(images, u)
    radius = view // 20  # MoCo-v2's kernel is a tenth of the view
    sigma = (0.1 + 1.9 * u[11]) * view / 224  # its 0.1 to 2 pixels belong to views of 224
    blurred = gaussian_blur2d(images, 2 * radius + 1, sigma[:, None].expand(-1, 2))
    images = torch.where((u[12] < 0.5)[:, None, None, None], blurred, images)
    boxes = torch.stack([x - mirrored, y - height, x + mirrored, y + height], 1)
    return Views(images, boxes)


def _recolour(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    """Brightness, saturation, hue and grey are linear in RGB: one matrix per image. Contrast scales about the mean.

    Strengths are MoCo-v2's 0.4, 0.4, 0.4 and 0.1, for 0.8 of the images; 0.2 of them turn grey. The hue turns in the
    plane of constant luma, not in HSV.
    """
    luma, eye = images.new_tensor((0.299, 0.587, 0.114)), torch.eye(3, device=images.device)
    grey = luma.expand(3, 3)
    brightness, contrast, saturation = (1 + (u[i] - 0.5) * 0.8 for i in (5, 6, 7))
    angle = (u[8] - 0.5) * 0.4 * math.pi
    # A turn about the grey axis (1, 1, 1) by Rodrigues' formula, made to keep the luma.
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=images.device) / math.sqrt(3)
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    turn = eye + sine * cross + (1 - cosine) * (cross @ cross)
    turn = turn + grey @ (eye - turn)
    matrix = brightness[:, None, None] * (grey + saturation[:, None, None] * (turn - grey @ turn))
    jittered = (u[9] < 0.8)[:, None, None]
    matrix = torch.where(jittered, matrix, eye)
    matrix = torch.where((u[10] < 0.2)[:, None, None], grey @ matrix, matrix)
    gain = torch.where(jittered, contrast[:, None, None], 1)
    coloured = matrix @ images.flatten(2)
    mean = (luma @ coloured.mean(2, keepdim=True)).unsqueeze(1)
    return (mean + gain * (coloured - mean)).clamp(0, 1).view_as(images)


class Siamese(nn.Module):
    """The trained backbone and head, their moving averages, and what MoCo-v2 or BYOL adds to them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.arm, byol = setting.arm, setting.arm.startswith(BYOL)
        norm = nn.BatchNorm2d if byol else None
        self.backbone_q, self.backbone_k = (resnet(NORMS[setting.norm]) for _ in range(2))
        self.head_q, self.head_k = (DenseProjectionHead(WIDTH, WIDTH, norm_layer=norm) for _ in range(2))
        self.backbone_k.load_state_dict(self.backbone_q.state_dict())
        self.head_k.load_state_dict(self.head_q.state_dict())
        self.backbone_k.requires_grad_(False)
        self.head_k.requires_grad_(False)
        self.predict_image, self.predict_dense = (predictor() if byol else nn.Identity() for _ in range(2))
        self.image_queue, self.dense_queue = (MomentumQueue(setting.queue) for _ in range(2))
        self.match = DenseCorrespondence(mutual=self.arm == "mutual")
        self.criterion = DenseInfoNCELoss(setting.temperature)

    def forward(self, query: Views, key: Views, momentum: float) -> tuple[Tensor, Tensor]:
        """Image term and dense term; the latter is 0 where the arm has none."""
        map_q = encode(self.backbone_q, query.images)
        with torch.no_grad():
            keys: list[Tensor] = [*self.backbone_k.parameters(), *self.head_k.parameters()]
            queries: list[Tensor] = [*self.backbone_q.parameters(), *self.head_q.parameters()]
            torch._foreach_lerp_(keys, queries, 1 - momentum)
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


def predictor() -> nn.Module:
    """BYOL's: docs/recipes/byol.md has the same, and trains in both directions."""
    layers = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), nn.Conv2d(WIDTH, WIDTH, 1)
    return nn.Sequential(*layers)


def pretrain(setting: Setting, photographs: list[Tensor]) -> tuple[nn.Module, dict[str, Any]]:
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
            now = time.strftime("%H:%M:%S")
            print(f"{now} step {step + 1}, image {image_loss:.3f}, dense {dense_loss:.3f}", flush=True)
    if not history.isfinite().all():
        raise FloatingPointError(f"{setting.name}: the loss is not finite")
    parts = [term.tensor_split(min(50, setting.steps)) for term in history.T]  # a curve of 50 points
    image, dense = ([round(float(part.mean()), 4) for part in term] for term in parts)
    facts = {"seconds": round(time.perf_counter() - began, 1), "image_loss": image}
    if setting.arm in DENSE:
        facts["dense_loss"] = dense
    return model.backbone_q, facts
