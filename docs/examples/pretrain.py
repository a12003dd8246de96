"""DenseCL on one page: MoCo-v2 with a dense term, on one CPU, one GPU, or several of either.

    python docs/examples/pretrain.py                      # photographs inside scikit-image, minutes on 2 cores
    python docs/examples/pretrain.py --images DIR         # any folder of images
    torchrun --nproc-per-node 2 docs/examples/pretrain.py

Here is the algorithm; the folder pretraining/ has what surrounds it. Whatever it trains on, it ends by measuring dense
matches on a stereo pair with known disparities. docs/pretraining.md: the paper's settings, and what they need.
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pretraining import checkpoints, options, processes
from pretraining.augment import augment
from pretraining.backbones import Backbone, build
from pretraining.images import BuiltIn, Folder, Order, Samples, stream
from pretraining.pictures import draw
from pretraining.progress import Progress
from pretraining.stereo import Matches, evaluate, load_pair
from torch import Tensor, nn

from densecl_ops import (
    Correspondence,
    DenseCorrespondence,
    DenseInfoNCELoss,
    DenseProjectionHead,
    MomentumQueue,
    Projection,
)
from densecl_ops.functional import location_correspondence
from densecl_ops.metrics import contrastive_accuracy


class Encoder(nn.Module):
    """A backbone without its pooling, and the projection head on its last map."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.network
        self.head = DenseProjectionHead(backbone.channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Projection]:
        features = self.backbone(images)
        return features, self.head(features)


class Output(NamedTuple):
    """Both terms of a batch, the share of positions whose match beats all negatives, and what the queues are owed."""

    image_loss: Tensor
    dense_loss: Tensor
    accuracy: Tensor
    image_key: Tensor
    dense_key: Tensor
    match: Correspondence
    maps: tuple[Tensor, Tensor]


class DenseCL(nn.Module):
    """MoCo-v2; densecl_ops adds to it the lines marked (dense)."""

    def __init__(
        self,
        encoder: Encoder,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        queue_init: Literal["random", "empty"] = "random",
        matching: str = "nearest",
    ) -> None:
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum = momentum
        self.criterion = DenseInfoNCELoss(temperature)
        self.image_queue = MomentumQueue(queue_size, dim=128, init=queue_init)
        self.dense_queue = MomentumQueue(queue_size, dim=128, init=queue_init)  # (dense)
        self.match = DenseCorrespondence(mutual=matching == "mutual")  # (dense)
        self.by_place = matching == "place"  # (dense)

    def forward(self, images_q: Tensor, images_k: Tensor, boxes_q: Tensor, boxes_k: Tensor) -> Output:
        maps_q, query = self.encoder_q(images_q)
        with torch.no_grad():
            maps_k, key = self.encoder_k(images_k)

        image_loss = self.criterion(query.image, key.image, self.image_queue)
        if self.by_place:  # (dense)
            match = location_correspondence(boxes_q, boxes_k, tuple(query.dense.shape[2:]))
        else:
            match = self.match(maps_q, maps_k)
        dense_loss, rank = self.criterion(query.dense, key.dense, self.dense_queue, match, return_rank=True)
        accuracy = contrastive_accuracy(rank, valid=match.valid)
        return Output(image_loss, dense_loss, accuracy, key.image, key.pooled, match, (maps_q.detach(), maps_k))

    @torch.no_grad()
    def update(self, outputs: list[Output]) -> None:
        """Ends a step: the key encoder follows the query encoder, and the batch's keys become negatives.

        Not part of forward(). A batch must not be among its own negatives, nor enter the queue before its backward
        pass is over: activation checkpointing runs forward() once more in there. And accumulated parts of a batch
        must all meet the same key encoder and queues, as they would in one piece.
        """
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.lerp_(query, 1 - self.momentum)
        for output in outputs:
            self.image_queue.enqueue(output.image_key)
            self.dense_queue.enqueue(output.dense_key)  # (dense)


def lambda_at(step: int, value: float, warmup: int) -> float:
    """Weight of the dense term: 0 at first, while features are too raw to say which positions match."""
    return 0.0 if step < warmup else value


def learning_rate_at(step: int, value: float, steps: int) -> float:
    """Linear warm-up over the first twentieth, half a cosine over all."""
    return value * min(1.0, (step + 1) * 20 / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: DenseCL, samples: Samples, lambda_: float, checkpoint: Path, args: argparse.Namespace) -> Tensor:
    """Trains in place; returns the history (steps, 3) of image term, dense term and accuracy."""
    device, rank = next(model.parameters()).device, processes.rank()
    settings = checkpoints.settings_of(args, lambda_)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    start, history = 0, torch.zeros(args.steps, 3)
    if args.resume and checkpoint.exists():
        start, history, skipped = checkpoints.resume(checkpoint, model, optimizer, settings)
        samples.skipped |= skipped
    history = history.to(device)
    parallel = processes.distribute(model)
    forward = torch.compile(parallel) if args.compile else parallel
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.train().to(memory_format=layout)  # type: ignore[call-overload]

    steps = range(start, args.steps)
    order = Order(len(samples.source), args.seed, args.batch_size, steps, args.accumulate, rank, processes.count())
    curves = checkpoint.with_suffix("") if args.tensorboard else None
    with (
        stream(samples, order, args.workers, device.type == "cuda") as batches,
        Progress(args.steps, start, args.batch_size, samples.skipped, rank == 0, curves) as progress,
        processes.StopSignal() as stop,
    ):
        for step in steps:
            rate = learning_rate_at(step, args.lr, args.steps)
            optimizer.param_groups[0]["lr"] = rate
            weight = lambda_at(step, lambda_, args.lambda_warmup)
            outputs, measured = [], torch.zeros(3, device=device)
            for part in range(args.accumulate):
                views = next(batches)
                progress.skip(views.skipped)
                pixels, boxes, uniform = (x.to(device, non_blocking=True).flatten(0, 1) for x in views[:3])
                images = augment(pixels, uniform).contiguous(memory_format=layout)
                (images_q, images_k), (boxes_q, boxes_k) = images.chunk(2), boxes.chunk(2)
                with processes.without_averaging(parallel, part + 1 < args.accumulate):
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        output = forward(images_q, images_k, boxes_q, boxes_k)
                    loss = (1 - weight) * output.image_loss + weight * output.dense_loss
                    (loss / args.accumulate).backward()
                outputs.append(output)
                measured += torch.stack(output[:3]).detach() / args.accumulate
            optimizer.step()
            optimizer.zero_grad()
            model.update(outputs)

            history[step] = processes.mean(measured)
            progress.step(step, history[step], rate, output, (images_q, images_k))
            stopped = stop.anywhere()
            if rank == 0 and (stopped or (step + 1) % args.save_every == 0 or step + 1 == args.steps):
                state = {"step": step + 1, "history": history.cpu(), "settings": settings, "skipped": samples.skipped}
                checkpoints.save(checkpoint, model, optimizer, **state)
            if stopped:
                print(f"stopped by SIGTERM after step {step + 1}; --resume goes on", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
    return history


def main(arguments: list[str] | None = None) -> None:
    args = options.parse(arguments)
    device = processes.start()
    try:
        run(args, device)
    finally:
        processes.end()


def run(args: argparse.Namespace, device: torch.device) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    source = BuiltIn() if args.images is None else Folder(args.images)
    args.images_seen = f"{'scikit-image' if args.images is None else 'folder'}, {len(source)}"
    if args.epochs is not None:
        args.steps = math.ceil(args.epochs * len(source) / args.batch_size)
    samples = Samples(source, args.seed, args.view, args.window)

    matches: dict[str, Matches] = {}
    seconds: dict[str, float] = {}
    arms = {"image term alone": 0.0} if args.compare else {}
    for name, lambda_ in (arms | {"image and dense": args.lambda_}).items():
        model, stride = make_model(args)
        model.to(device)
        pair = load_pair(stride, device)
        matches["random weights"] = evaluate(model.encoder_q.backbone, pair)
        began = time.perf_counter()
        history = train(model, samples, lambda_, args.out / f"{name.replace(' ', '-')}.pt", args)
        seconds[name] = time.perf_counter() - began
        matches[name] = evaluate(model.encoder_q.backbone, pair)

    skipped = processes.union(samples.skipped)
    if processes.rank() == 0:
        draw(pair, matches, history.cpu(), args.lambda_warmup, args.out / "matches.png")
        checkpoints.report(args, matches, seconds, skipped)
        checkpoints.export(model, args.out, args.densecl)


def make_model(args: argparse.Namespace) -> tuple[DenseCL, int]:
    """The model of these options, at the start that their seed gives it, and its stride in pixels."""
    torch.manual_seed(args.seed)
    backbone = build(args.backbone)
    wanted = {name: getattr(args, name) for name in ("queue_size", "momentum", "queue_init", "matching")}
    return DenseCL(Encoder(backbone), **wanted), backbone.stride


if __name__ == "__main__":
    main()
