"""DenseCL on one page: MoCo-v2 with a dense term, on one CPU, one GPU, or several of either.

    python docs/examples/pretrain.py                      # photographs inside scikit-image, minutes on 2 cores
    python docs/examples/pretrain.py --images DIR         # any folder of images
    torchrun --nproc-per-node 2 docs/examples/pretrain.py

Whatever it trains on, it ends by measuring dense matches on a stereo pair with known disparities.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import kornia
import skimage
import torch
import torch.distributed as dist
from backbone import STRIDE, small_resnet
from pictures import draw
from stereo import Matches, evaluate, load_pair
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from views import TwoViews, load_photographs

import densecl_ops
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue, Projection
from densecl_ops.metrics import contrastive_accuracy

SAVE_EVERY = 100  # steps


class Encoder(nn.Module):
    """A backbone without its pooling, and the projection head on its last map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small_resnet()
        self.head = DenseProjectionHead(in_channels=256, hidden_channels=256, out_channels=128)

    def forward(self, images: Tensor) -> tuple[Tensor, Projection]:
        features = self.backbone(images)
        return features, self.head(features)


class DenseCL(nn.Module):
    """MoCo-v2; densecl_ops adds to it the lines marked (dense)."""

    def __init__(
        self, queue_size: int = 1024, momentum: float = 0.99, temperature: float = 0.2, queue_init: str = "random"
    ) -> None:
        super().__init__()
        self.encoder_q = Encoder()
        self.encoder_k = AveragedModel(self.encoder_q, multi_avg_fn=get_ema_multi_avg_fn(momentum))  # type: ignore[no-untyped-call]
        self.encoder_k.requires_grad_(False)
        self.criterion = DenseInfoNCELoss(temperature)
        self.image_queue = MomentumQueue(queue_size, dim=128, init=queue_init)
        self.dense_queue = MomentumQueue(queue_size, dim=128, init=queue_init)  # (dense)
        self.match = DenseCorrespondence()  # (dense)

    def forward(self, images_q: Tensor, images_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image term, dense term, and contrastive accuracy: the share of positions whose match beats all negatives."""
        features_q, query = self.encoder_q(images_q)
        with torch.no_grad():
            self.encoder_k.update_parameters(self.encoder_q)
            features_k, key = self.encoder_k(images_k)

        image_loss = self.criterion(query.image, key.image, self.image_queue)
        match = self.match(features_q, features_k)  # (dense)
        dense_loss, rank = self.criterion(query.dense, key.dense, self.dense_queue, match, return_rank=True)  # (dense)

        # After the loss: a batch is not among its own negatives. After backward() if a checkpoint recomputes the loss.
        self.image_queue.enqueue(key.image)
        self.dense_queue.enqueue(key.pooled)  # (dense)
        return image_loss, dense_loss, contrastive_accuracy(rank)


def lambda_at(step: int, value: float, warmup: int) -> float:
    """Weight of the dense term: 0 at first, while features are too raw to say which positions match."""
    return 0.0 if step < warmup else value


def learning_rate_at(step: int, value: float, steps: int) -> float:
    """Linear warm-up over the first twentieth, half a cosine over all."""
    return value * min(1.0, (step + 1) * 20 / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: DenseCL, views: TwoViews, lambda_: float, checkpoint: Path, args: argparse.Namespace) -> Tensor:
    """Trains in place; returns the history (steps, 3) of image term, dense term and accuracy."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    share = slice(rank * args.batch_size // processes, (rank + 1) * args.batch_size // processes)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    history = torch.zeros(args.steps, 3)
    start = 0
    if args.resume and checkpoint.exists():
        start, history = resume(checkpoint, model, optimizer, views, settings_of(args, lambda_))
    parallel = distribute(model) if processes > 1 else model

    model.train()
    bar = tqdm(total=args.steps, initial=start, disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 20)
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args.lr, args.steps)
        weight = lambda_at(step, lambda_, args.lambda_warmup)
        images_q, images_k = views.draw(args.batch_size, share, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            image_loss, dense_loss, accuracy = parallel(images_q, images_k)
        loss = (1 - weight) * image_loss + weight * dense_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        measured = torch.stack([image_loss, dense_loss, accuracy]).detach() / processes
        if processes > 1:
            dist.all_reduce(measured)
        history[step] = measured
        bar.set_postfix_str("image {:.2f}, dense {:.2f}, accuracy {:.2f}".format(*history[step]), refresh=False)
        bar.update()
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps):
            save(checkpoint, step + 1, history, model, optimizer, views, settings_of(args, lambda_))
    bar.close()
    return history


def settings_of(args: argparse.Namespace, lambda_: float) -> dict[str, Any]:
    """What decides the weights: a resumed run must agree with it, and the results are stored beside it."""
    names = ["seed", "steps", "batch_size", "lr", "lambda_warmup", "amp"]
    if args.queue_init != "random":  # younger than the first results: where it is missing it was "random"
        names.append("queue_init")
    return {"lambda": lambda_, "images": args.images_seen} | {name: getattr(args, name) for name in names}


def save(
    path: Path,
    step: int,
    history: Tensor,
    model: DenseCL,
    optimizer: torch.optim.Optimizer,
    views: TwoViews,
    settings: dict[str, Any],
) -> None:
    """The model's state holds both encoders and both queues; after initialisation only `views` draws at random."""
    state = {"step": step, "history": history, "settings": settings, "generator": views.generator.get_state()}
    torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)  # an interruption leaves the last whole checkpoint


def resume(
    path: Path, model: DenseCL, optimizer: torch.optim.Optimizer, views: TwoViews, settings: dict[str, Any]
) -> tuple[int, Tensor]:
    """Puts everything back as `save` found it; returns the next step and the history."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        raise SystemExit(f"--resume: {path} was made with {state['settings']}, not with {settings}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    views.generator.set_state(state["generator"])
    return state["step"], state["history"]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains DenseCL and measures dense matches on a stereo pair.")
    parser.add_argument("--images", type=Path, metavar="DIR", help="train on the images below DIR (default: built-in)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="for checkpoint, picture, result.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes instead of OUT/result.json")
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="images over all processes (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.5, help="weight of the dense term, 0 to 1")
    parser.add_argument("--lambda-warmup", type=int, default=50, help="first steps, lambda 0 (default: %(default)s)")
    parser.add_argument("--queue-init", choices=("random", "empty"), default="random", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--compare", action="store_true", help="also train with lambda 0, the image term alone")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in OUT, if there are any")
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=bfloat16_is_fast(), help="bfloat16 autocast"
    )
    args = parser.parse_args(arguments)
    for name, low, high in (("steps", 1, math.inf), ("batch_size", 1, math.inf), ("lambda_", 0, 1)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.strip('_').replace('_', '-')}: got {getattr(args, name)}, expected {low} to {high}")
    if args.images is not None and not args.images.is_dir():
        parser.error(f"--images: {args.images} is not a folder")
    return args


def bfloat16_is_fast() -> bool:
    """On CPUs with bfloat16 instructions a step takes 0.6 of its float32 time; elsewhere they would be emulated."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def start_processes(batch_size: int) -> torch.device:
    """Joins torchrun's process group, if there is one, and returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if batch_size % dist.get_world_size():
            raise SystemExit(f"--batch-size: got {batch_size}, expected a multiple of WORLD_SIZE")
    return device


def distribute(model: DenseCL) -> nn.Module:
    """Averages gradients over the processes. Buffers are equal everywhere already: to send rank 0's at every step,
    as DDP does by default, would cost both queues."""
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # new and old name
    return DistributedDataParallel(model, **{option: False})  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = start_processes(args.batch_size)
    args.out.mkdir(parents=True, exist_ok=True)
    photographs = load_photographs(args.images)
    args.images_seen = f"{'scikit-image' if args.images is None else 'folder'}, {len(photographs)}"
    pair = load_pair(STRIDE, device)

    matches: dict[str, Matches] = {}
    seconds: dict[str, float] = {}
    runs = {"image term alone": 0.0} if args.compare else {}
    for name, lambda_ in (runs | {"image and dense": args.lambda_}).items():
        torch.manual_seed(args.seed)
        model = DenseCL(queue_init=args.queue_init).to(device)
        if device.type == "cuda" and dist.is_initialized():
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        matches["random weights"] = evaluate(model.encoder_q.backbone, pair)
        views = TwoViews(photographs, torch.Generator().manual_seed(args.seed))
        began = time.perf_counter()
        history = train(model, views, lambda_, args.out / f"{name.replace(' ', '-')}.pt", args)
        seconds[name] = round(time.perf_counter() - began, 1)
        matches[name] = evaluate(model.encoder_q.backbone, pair)

    if not dist.is_initialized() or dist.get_rank() == 0:
        report(args, matches, seconds)
        draw(pair, matches["random weights"], matches["image and dense"], history, args.lambda_warmup, args.out)
    if dist.is_initialized():
        dist.destroy_process_group()


def report(args: argparse.Namespace, matches: dict[str, Matches], seconds: dict[str, float]) -> None:
    """Prints the table; writes it as JSON without the times, so that equal runs give equal files."""
    print(f"\n{'matches on the stereo pair':28}{'within 1.5 cells':>18}{'median error':>16}{'training':>12}")
    for name, row in matches.items():
        time_taken = f"{seconds[name]:.0f} s" if name in seconds else ""
        print(f"{name:28}{row.close:18.3f}{row.median:10.2f} cells{time_taken:>12}")
    margin = matches["image and dense"].close - matches["random weights"].close
    print(f"trained over random: {margin:+.3f}")
    result = {
        "settings": settings_of(args, args.lambda_),
        "rows": {name: {"close": round(row.close, 4), "median": round(row.median, 4)} for name, row in matches.items()},
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (densecl_ops, torch, kornia, skimage)}
        | {"python": platform.python_version()},
    }
    path = args.json or args.out / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}, {args.out / 'matches.png'}")


if __name__ == "__main__":
    main()
