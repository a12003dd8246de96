"""Threads, worker processes, and copies in mid-training: nobody feels the other."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

from densecl_ops import Correspondence, DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import (
    location_correspondence,
)


class Step(nn.Module):
    """Head, rule, loss and queue as one model, with a learned temperature."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.head = DenseProjectionHead(6, 8, 5)
        self.match = DenseCorrespondence(mutual=True, backend=backend)
        self.criterion = DenseInfoNCELoss(0.2, "sum", learnable_temperature=True, backend=backend)
        self.frozen = DenseInfoNCELoss(0.1, "sum", backend=backend)
        self.queue = MomentumQueue(40, 5)

    def forward(self, features_q: Tensor, features_k: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the keys to enqueue."""
        query, key = self.head(features_q), self.head(features_k)
        dense = self.criterion(query.dense, key.dense, self.queue, self.match(features_q, features_k))
        return dense + self.frozen(query.image, key.image, self.queue), key.pooled.detach()


def views(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(2, batch, 6, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def replicate(module: nn.Module) -> nn.Module:
    """What nn.DataParallel does on GPUs: shallow copies that hold (copies of) the one set of parameters."""
    replica: nn.Module = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
        if child is not None and not isinstance(replica, nn.Sequential):
            setattr(replica, name, replica._modules[name])
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1)  # the broadcast, through which gradients return
    return replica


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_data_parallel_replicas(backend: str) -> None:
    """Eight threads, forward and backward each, ten times over: the gradients of one thread on the whole batch."""
    torch.manual_seed(0)
    model, maps = Step(backend).double(), views(16)
    loss, keys = model(*maps)
    loss.backward()
    expected = gradients(model)
    assert len(expected) == 9

    def one(replica: nn.Module, part: Tensor) -> tuple[Tensor, Tensor]:
        loss, keys = replica(*part)
        loss.backward()
        return loss.detach(), keys

    rows = model.queue.rows.clone()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            model.zero_grad()
            results = list(pool.map(one, [replicate(model) for _ in range(8)], maps.chunk(8, 1)))
            assert_close(sum(loss for loss, _ in results), loss, 1e-12)
            assert_close(torch.cat([k for _, k in results]), keys, 1e-12)
            for name, grad in gradients(model).items():
                assert_close(grad, expected[name], 1e-11, name)
    assert torch.equal(model.queue.rows, rows)


RACE = """
import sys, threading
import torch
from densecl_ops.functional import dense_correspondence, dense_info_nce, location_correspondence

boxes = torch.tensor([[0.0, 0, 9, 9], [1, 2, 8, 8]])

def work(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 8, 4, 4, generator=generator)
    negatives = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    q = query.clone().requires_grad_()
    match = dense_correspondence(query, key, mutual=True, backend=backend)
    place = location_correspondence(boxes, boxes.flip(0), 4)
    loss = dense_info_nce(q, key, negatives, match._replace(valid=match.valid & place.valid), backend=backend)
    loss.backward()
    return loss.detach(), q.grad

def racer(i, backend):
    barrier.wait()
    try:
        for _ in range(rounds):
            results[i] = work(backend, i)
    except BaseException as error:
        results[i] = error

backends = sys.argv[1].split(",")
rounds = int(sys.argv[2])
barrier, results = threading.Barrier(len(backends)), [None] * len(backends)
threads = [threading.Thread(target=racer, args=pair) for pair in enumerate(backends)]
for thread in threads: thread.start()
for thread in threads: thread.join(100)
for i, result in enumerate(results):
    assert isinstance(result, tuple), (backends[i], result)
    for seen, wish in zip(result, work("eager", i)):
        assert torch.dist(seen, wish) <= 1e-5 * wish.norm(), backends[i]
print("alike")
"""


def run_race(backends: str, rounds: int, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE, backends, str(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout == "alike\n", done.stderr


def test_first_calls_race() -> None:
    """In a new process thirteen threads make their first call at once, and go on, each with its own backend.

    One of them, where there is Triton, in its interpreter, which keeps global state and would not bear a second.
    """
    triton = ["triton"] if find_spec("triton") else []
    run_race(",".join(triton + ["eager", "blockwise", "auto"] * 4), 10, TRITON_INTERPRET="1")


SEEN: list[str] = []


def record(module: nn.Module, arguments: object, output: object) -> None:
    """A forward hook; at module level, so that pickle finds it."""
    SEEN.append(type(module).__name__)


def train(model: Step, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss, keys = model(*views(3, seed))
        loss.backward()
        optimizer.step()
        model.queue.enqueue(keys)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def through_file(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("duplicate", list(DUPLICATES.values()), ids=list(DUPLICATES))
def test_copies_in_mid_training(duplicate: Callable[[Any], Any], backend: str) -> None:
    """Between backward and step, gradients and hooks in place. Both go on alike, and neither feels the other."""
    torch.manual_seed(0)
    model = Step(backend).double()
    for module in (model.head, model.match, model.criterion):
        module.register_forward_hook(record)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, range(3))
    model(*views(3, 3))[0].backward()  # on top of the gradients of the last step

    twin, its_optimizer = duplicate((model, optimizer))
    assert same(state(model), state(twin))
    assert not gradients(twin)  # torch copies no gradients: a copy starts at none
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.data_ptr() != q.data_ptr()

    before = state(model)
    SEEN.clear()
    train(twin, its_optimizer, range(10, 14))
    assert SEEN == ["DenseProjectionHead", "DenseProjectionHead", "DenseCorrespondence", "DenseInfoNCELoss"] * 4
    assert same(before, state(model))
    train(model, optimizer, range(10, 14))
    assert same(state(model), state(twin))
    assert not same(before, state(model))
    train(twin, its_optimizer, range(20, 21))
    assert not same(state(model), state(twin))


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_matching_by_place_in_data_loader_workers(context: str) -> None:
    """The Correspondence comes back from the worker as it would have been made here."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [2, 1, 9, 9]])
    samples = [boxes + torch.tensor([x, 0, x, 0]) for x in range(5)]
    rule = functools.partial(location_correspondence, key_boxes=boxes, query_grid=3)
    loader = torch.utils.data.DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=rule,
        num_workers=1,
        multiprocessing_context=context,
    )
    for seen, sample in zip(loader, samples, strict=True):
        assert isinstance(seen, Correspondence)
        assert all(map(torch.equal, seen, rule(sample)))
