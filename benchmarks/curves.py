"""The runs of docs/training.md: the demo trained in several ways, healthy and broken, with every step recorded.

The trainer is run as a user runs it. Hooks on the library's own modules read what it does not record itself, and break
what a broken run breaks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from benchmarks.measure import commit
from benchmarks.records import write
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, MomentumQueue
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share


@contextmanager
def enqueue_first() -> Iterator[None]:
    """A batch's keys go into the queues before the loss, so that each positive is a negative too."""
    enqueue = MomentumQueue.enqueue

    def before(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, DenseInfoNCELoss):
            _, key, queue, *_ = inputs
            enqueue(queue, key if key.ndim == 2 else key.flatten(2).mean(2))

    with register_module_forward_pre_hook(before), mock.patch.object(MomentumQueue, "enqueue"):
        yield


def same_view() -> AbstractContextManager[Any]:
    """Both encoders see the same view."""
    from pretraining.augment import augment

    return mock.patch("pretrain.augment", lambda *given: augment(*given).chunk(2)[0].repeat(2, 1, 1, 1))


SHORT = "--steps 150 --lambda-warmup 50"
RUNS: dict[
    str, tuple[str, str, Callable[[], AbstractContextManager[Any]]]
] = {  # label, options of the trainer, what is broken
    "random": ("random queue, warm-up", "", nullcontext),
    "random-no-warmup": ("random queue, no warm-up", "--lambda-warmup 0", nullcontext),
    "empty": ("empty queue, warm-up", "--queue-init empty", nullcontext),
    "empty-no-warmup": ("empty queue, no warm-up", "--queue-init empty --lambda-warmup 0", nullcontext),
    "enqueue-first": ("enqueue before the loss", SHORT, enqueue_first),
    "same-view": ("the same view twice", SHORT, same_view),
    "high-lr": ("learning rate 50 times too high", f"{SHORT} --lr 1", nullcontext),
}


def watch(log: dict[str, list[Tensor]], module: nn.Module, inputs: Any, output: Any) -> None:
    """Collects the numbers of a training step from the modules that it calls."""
    if not torch.is_grad_enabled():  # the evaluation
        return
    if isinstance(module, DenseCorrespondence):
        log["match_score"].append(match_score(output))
        log["mutual_share"].append(mutual_share(*inputs))
    elif isinstance(module, DenseInfoNCELoss) and isinstance(output, tuple):  # the dense term, with ranks
        loss, rank = output
        log["dense_loss"].append(loss.detach())
        log["top1"].append(contrastive_accuracy(rank))
        log["top5"].append(contrastive_accuracy(rank, top_k=5))
    elif isinstance(module, DenseInfoNCELoss):
        log["image_loss"].append(output.detach())
        log["queue_size"].append(torch.tensor(inputs[2].rows.shape[0]))


def record(name: str, more: list[str]) -> dict[str, Any]:
    """Trains one run with seed 0."""
    import pretrain

    label, options, fault = RUNS[name]
    log = defaultdict[str, list[Tensor]](list)
    with tempfile.TemporaryDirectory() as scratch, fault(), register_module_forward_hook(partial(watch, log)):
        result = Path(scratch, "result.json")
        pretrain.main(["--seed", "0", "--out", scratch, "--json", str(result), *options.split(), *more])
        found = json.loads(result.read_text())
    columns = {key: [round(x, 4) for x in torch.stack(values).tolist()] for key, values in log.items()}
    settings = {"queue_init": "random", "queue_size": columns.pop("queue_size")[0]} | found["settings"]
    facts = {key: found[key] for key in ("threads", "versions")} | {"commit": commit(), "history": columns}
    return {"name": name, "label": label, "settings": settings, "matches": found["rows"]["image and dense"]} | facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--options", default="", help="of the trainer, for all runs: '--steps 2'")


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.runs:
        write(arguments.out / "curves_cpu" / f"{name}.json", record(name, arguments.options.split()))
