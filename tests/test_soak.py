"""Long runs: thousands of random operations on a queue beside a deque, and memory over ten thousand steps."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
from collections import deque
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from helpers import BACKENDS, EPS, numpy64
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, MomentumQueue

DTYPES = list(EPS)


class Model:
    """Unit rows, oldest first, each with the error that its dtypes allow it."""

    def __init__(self, queue: MomentumQueue) -> None:
        count = int(queue.count)
        self.size, self.dtype, self.written = queue.size, queue.rows.dtype, 0
        self.rows = deque(zip(numpy64(queue.rows[:count]), [0.0] * count, strict=True), maxlen=queue.size)

    def enqueue(self, keys: Tensor) -> None:
        eps = max(EPS[self.dtype], 1e-6 if keys.dtype != torch.float64 else 0)
        units = oracle.unit(numpy64(keys), 1)[0]
        self.rows.extend((row, eps) for row in units)
        self.written += len(keys)

    def to(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows = deque([(row, eps + EPS[dtype]) for row, eps in self.rows], maxlen=self.size)

    def check(self, queue: MomentumQueue) -> None:
        count, position = len(self.rows), self.written % self.size
        assert (int(queue.count), int(queue.position), queue.rows.dtype) == (count, position, self.dtype)
        rows = np.array([row for row, _ in self.rows]).reshape(count, queue.dim)
        eps = np.array([eps for _, eps in self.rows])
        turn = position if count == self.size else 0  # a full ring holds its oldest row at the position
        off = np.abs(numpy64(queue.rows[:count]) - np.roll(rows, turn, 0)).max(1, initial=0)
        assert (off <= np.roll(eps, turn)).all()


def fresh(queue: MomentumQueue, init: str) -> MomentumQueue:
    return MomentumQueue(queue.size, queue.dim, init=init, dtype=queue.rows.dtype)


def saved_and_loaded(queue: MomentumQueue, rng: np.random.Generator) -> MomentumQueue:
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other = fresh(queue, str(rng.choice(["random", "empty"])))
    other.load_state_dict(torch.load(file, weights_only=True), assign=bool(rng.integers(2)))
    return other


def random_keys(rng: np.random.Generator, n: int, dim: int) -> Tensor:
    """Any dtype, any strides, with or without gradient, now and then with a zero row or repeated rows."""
    keys = torch.tensor(rng.standard_normal((n, dim)) * 3, dtype=DTYPES[rng.integers(len(DTYPES))])
    if n and rng.random() < 0.1:
        keys[rng.integers(n)] = 0
    layout = rng.integers(6)
    if layout == 1:
        keys = keys.t().contiguous().t()
    elif layout == 2:
        keys = torch.cat([keys, keys.flip(0)], 1)[:, :dim]
    elif layout == 3:
        keys = keys.repeat_interleave(2, 0)[::2]
    elif layout == 4 and n:
        keys = keys[:1].expand(n, -1)
    elif layout == 5:
        keys = nn.Parameter(keys) * 1
    return keys


def soak(seed: int, init: str, operations: int) -> None:
    rng = np.random.default_rng(seed)
    size, dim = (int(x) for x in rng.integers(1, (12, 6)))
    queue = MomentumQueue(size, dim, init=init)
    model = Model(queue)
    for step in range(operations):
        name = str(
            rng.choice(["enqueue"] * 10 + ["own rows", "refused", "save", "copy", "pickle", "to", "half", "clear"])
        )
        try:
            if name == "enqueue":
                keys = random_keys(rng, int(rng.integers(0, 3 * size + 1)), dim)
                queue.enqueue(keys)
                model.enqueue(keys.detach())
            elif name == "own rows":
                keys = queue.rows[int(rng.integers(size)) :]
                model.enqueue(keys.clone())
                queue.enqueue(keys)
            elif name == "refused":
                with pytest.raises((TypeError, ValueError), match=r"^keys: got"):
                    queue.enqueue([torch.ones(2, dim + 1), torch.ones(dim), torch.ones(2, dim).int()][rng.integers(3)])
            elif name == "save":
                queue = saved_and_loaded(queue, rng)
            elif name == "copy":
                queue = copy.deepcopy(queue)
            elif name == "pickle":
                queue = pickle.loads(pickle.dumps(queue))
            elif name == "to":
                dtype = DTYPES[rng.integers(len(DTYPES))]
                queue.to(dtype)
                model.to(dtype)
            elif name == "half":
                queue.half().float()
                model.to(torch.float16)
                model.to(torch.float32)
            elif name == "clear":  # there is no method for it: the state of a new queue does it
                empty = fresh(queue, str(rng.choice(["random", "empty"])))
                queue.load_state_dict(empty.state_dict())
                model = Model(empty)
            model.check(queue)
        except AssertionError as failure:
            raise AssertionError(f"seed {seed}, init {init}, size {size}, step {step}: {name}") from failure


@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("seed", range(5))
def test_soak_of_the_queue(seed: int, init: str) -> None:
    """2 x 5 x 1,000 operations; a failure names seed and step."""
    soak(seed, init, 1000)


STATM = Path("/proc/self/statm")


def resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
def test_memory_does_not_grow_over_ten_thousand_steps() -> None:
    """Backend, gradients, rank and reduction differ from step to step. One leaked loss row a step would be 8 MiB."""
    shape, size = (2, 8, 10, 10), 64
    queue, matches = MomentumQueue(size, 8), [DenseCorrespondence(backend=b, mutual=b == "eager") for b in BACKENDS]
    criteria = [DenseInfoNCELoss(0.2, r, r == "sum", backend=b) for b in BACKENDS for r in ("mean", "sum")]
    maps = torch.randn(4, *shape)

    def steps(count: int) -> None:
        for step in range(count):
            query = maps[0].clone().requires_grad_()
            key = maps[1].clone().requires_grad_(step % 5 == 0)
            match = matches[step % 2](maps[2], maps[3])
            loss = criteria[step % 4](query, key, queue, match, return_rank=step % 3 == 0)
            (loss[0] if isinstance(loss, tuple) else loss).backward()
            queue.enqueue(key.mean((2, 3)))

    steps(500)
    tensors, before = live_tensors(), resident()
    steps(10_000)
    assert live_tensors() <= tensors  # what earlier tests left may go meanwhile
    assert resident() - before < 4 * 2**20
