"""The runs of docs/training.md: the demo trained in several ways, healthy and broken, with every step recorded.

The trainer is run as a user runs it. Hooks on the library's own modules read what it does not record itself, and break
what a broken run breaks.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from benchmarks.measure import commit
from benchmarks.records import add_out, write
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, MomentumQueue
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def enqueue_first(faults: ExitStack) -> None:
    """A batch's keys go into the queues before the loss, so that each positive is a negative too."""
    enqueue = MomentumQueue.enqueue

    def before(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, DenseInfoNCELoss):
            _, key, queue, *_ = inputs
            enqueue(queue, key if key.ndim == 2 else key.flatten(2).mean(2))

    faults.callback(register_module_forward_pre_hook(before).remove)
    faults.enter_context(mock.patch.object(MomentumQueue, "enqueue"))


def same_view(faults: ExitStack) -> None:
    """Both encoders see the same view."""

    def before(module: nn.Module, inputs: Any) -> Any:
        whole = any(isinstance(child, DenseCorrespondence) for child in module.children())
        return (inputs[0], inputs[0], *inputs[2:]) if whole else None

    faults.callback(register_module_forward_pre_hook(before).remove)


SHORT = "--steps 150 --lambda-warmup 50"
RUNS: dict[str, tuple[str, str, Callable[[ExitStack], None]]] = {  # label, options of the trainer, what is broken
    "random": ("random queue, warm-up", "", lambda _: None),
    "random-no-warmup": ("random queue, no warm-up", "--lambda-warmup 0", lambda _: None),
    "empty": ("empty queue, warm-up", "--queue-init empty", lambda _: None),
    "empty-no-warmup": ("empty queue, no warm-up", "--queue-init empty --lambda-warmup 0", lambda _: None),
    "enqueue-first": ("enqueue before the loss", SHORT, enqueue_first),
    "same-view": ("the same view twice", SHORT, same_view),
    "high-lr": ("learning rate 50 times too high", f"{SHORT} --lr 1", lambda _: None),
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
    label, options, fault = RUNS[name]
    log = defaultdict[str, list[Tensor]](list)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]))
        stack.callback(register_module_forward_hook(functools.partial(watch, log)).remove)
        fault(stack)
        result = Path(scratch, "result.json")
        fixed = ["--seed", "0", "--out", scratch, "--json", str(result)]
        importlib.import_module("pretrain").main([*fixed, *options.split(), *more])
        found = json.loads(result.read_text())
    columns = {key: [round(x, 4) for x in torch.stack(values).tolist()] for key, values in log.items()}
    settings = {"queue_init": "random", "queue_size": columns.pop("queue_size")[0]} | found["settings"]
    facts = {key: found[key] for key in ("threads", "versions")} | {"commit": commit(), "history": columns}
    return {"name": name, "label": label, "settings": settings, "matches": found["rows"]["image and dense"]} | facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--options", default="", help="of the trainer, for all runs: '--steps 2'")


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.runs:
        write(arguments.out / "curves_cpu" / f"{name}.json", record(name, arguments.options.split()))
