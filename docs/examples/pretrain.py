"""DenseCL on one page: MoCo-v2 with a dense term, on one CPU, one GPU, or several of either.

    python docs/examples/pretrain.py                      # photographs inside scikit-image, minutes on 2 cores
    python docs/examples/pretrain.py --images DIR         # any folder of images; --shards TAR ... for webdataset's
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pretraining import checkpoints, options, processes
from pretraining.augment import augment
from pretraining.backbones import Backbone, build, load_weights
from pretraining.images import BuiltIn, Folder, Order, Samples, stream
from pretraining.pictures import draw
from pretraining.progress import READ_EVERY, Progress
from pretraining.stereo import Matches, evaluate, load_pair
from pretraining.streams import Iterated, Shards, Stream
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
    """Both terms of a batch, how its positives rank among the negatives, and what the queues are owed."""

    image_loss: Tensor
    dense_loss: Tensor
    accuracy: Tensor
    rank: Tensor
    negatives: Tensor
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
        mean_rank = (rank * match.valid).sum() / match.valid.sum().clamp(min=1)
        ranks = accuracy, mean_rank, self.dense_queue.count.clone()
        return Output(image_loss, dense_loss, *ranks, key.image, key.pooled, match, (maps_q.detach(), maps_k))

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


def train(
    model: DenseCL, samples: Samples | Stream, lambda_: float, checkpoint: Path, args: argparse.Namespace
) -> Tensor:
    """Trains in place; returns the history (steps, 3) of image term, dense term and accuracy."""
    device, rank = next(model.parameters()).device, processes.rank()
    settings = checkpoints.settings_of(args, lambda_)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    start, history = 0, torch.zeros(args.steps, 3)
    state = checkpoints.resume(checkpoint, model, optimizer, settings) if args.resume else None
    if state is not None:
        start = state["step"]
        history[:start] = state["history"][:start]
        samples.go_on(state)
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
                progress.tell(views)
                if views.place is not None:
                    samples.places[views.place[0]] = views.place[1]
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
            progress.step(step, history[step], rate, weight > 0, output, (images_q, images_k))
            stopped = stop.anywhere()
            due = stopped or (step + 1) % args.save_every == 0 or step + 1 == args.steps
            if due or step % READ_EVERY == 0:
                checkpoints.require_finite(history[: step + 1], model if due else None, checkpoint)
            if due:
                state = {"step": step + 1, "history": history.cpu(), "settings": settings}
                state |= {"skipped": processes.union(samples.skipped), "places": processes.union(samples.places)}
                checkpoints.save(checkpoint, model, optimizer, **state)
            if stopped:
                print(f"stopped by SIGTERM after step {step + 1}; --resume goes on", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
    return history


def main(arguments: list[str] | None = None, dataset: Iterable[Any] | None = None) -> None:
    """Trains; `dataset` is an IterableDataset of images or (image, ...), instead of --images and --shards."""
    args = options.parse(arguments)
    device = processes.start()
    try:
        run(args, device, dataset)
    finally:
        processes.end()


def run(args: argparse.Namespace, device: torch.device, dataset: Iterable[Any] | None) -> None:
    rank, count = processes.rank(), processes.count()
    source = processes.together(lambda: find_images(args, dataset))
    processes.together(lambda: options.settle(args, len(source)))
    processes.agree(checkpoints.settings_of(args, args.lambda_) | {"names of images": source.digest})

    last = "image and dense" if args.lambda_ > 0 else "image term alone"
    arms = ({"image term alone": 0.0} if args.compare else {}) | {last: args.lambda_}
    files = {name: args.out / f"{name.replace(' ', '-')}.pt" for name in arms}
    processes.from_rank_0(lambda: checkpoints.claim(list(files.values()), args))

    matches: dict[str, Matches] = {}
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, lambda_ in arms.items():
        model, stride = processes.together(lambda: make_model(args))
        model.to(device)
        pair = load_pair(stride, device)
        matches["random weights" if args.weights is None else "weights given"] = evaluate(
            model.encoder_q.backbone, pair
        )
        if isinstance(source, (Shards, Iterated)):
            samples: Samples | Stream = Stream(source, args.seed, args.view, args.window, args.workers, rank, count)
        else:
            samples = Samples(source, args.seed, args.view, args.window)
        samples.skipped |= skipped  # named already
        began = time.perf_counter()
        history = train(model, samples, lambda_, files[name], args)
        seconds[name] = time.perf_counter() - began
        matches[name] = evaluate(model.encoder_q.backbone, pair)
        skipped |= processes.union(samples.skipped)

    def write() -> None:
        written = [*checkpoints.export(model, args.out, args.densecl), args.out / "matches.png"]
        picture = pair, matches, last, history.cpu(), args.lambda_warmup
        checkpoints.write_whole(written[-1], lambda file: draw(*picture, file))
        for file in files.values():
            written += [path for path in (file, checkpoints.previous(file), file.with_suffix("")) if path.exists()]
        checkpoints.report(args, matches, pair, seconds, skipped, written)

    processes.from_rank_0(write)  # all leave together: a rank that is gone would have its launcher kill the writer


def find_images(args: argparse.Namespace, dataset: Iterable[Any] | None) -> BuiltIn | Folder | Shards | Iterated:
    """What to train on, and a word for it that settings and results keep."""
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = {"dataset": dataset, "shards": args.shards, "folder": args.images}
    kind = next((kind for kind, given in kinds.items() if given is not None), "scikit-image")
    makers = {"dataset": Iterated, "shards": Shards, "folder": Folder}
    source = makers[kind](kinds[kind]) if kind in makers else BuiltIn()
    args.images_seen = f"{kind}, {len(source)}" if len(source) else kind
    return source


def make_model(args: argparse.Namespace) -> tuple[DenseCL, int]:
    """The model of these options, at the start that their seed gives it, and its stride in pixels."""
    torch.manual_seed(args.seed)
    backbone = build(args.backbone)
    if args.weights is not None:
        load_weights(backbone.network, args.weights)
    wanted = {name: getattr(args, name) for name in ("queue_size", "momentum", "queue_init", "matching")}
    return DenseCL(Encoder(backbone), **wanted), backbone.stride


if __name__ == "__main__":
    main()
