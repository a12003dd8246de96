"""One rank of test_distributed.py: python distributed_worker.py RANK WORLD DIRECTORY runs every case below in turn.

A case compares what this rank sees with one process on the concatenated batch of all.
"""

from __future__ import annotations

import copy
import datetime
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import recipes
import torch
import torch.distributed as dist
from helpers import EPS, numpy64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import in_batch_negatives

SIZE, DIM = 11, 4
# Keys per rank (cycled) of successive enqueues: even, uneven, a rank with none, nobody with any, n > size.
ROUNDS = {
    "even": [[2, 2], [3, 3], [3, 3]],
    "uneven": [[1, 3], [4, 2], [5, 1], [2, 6]],
    "a rank without keys": [[0, 3], [2, 0], [0, 0], [0, 9]],
    "more than size": [[9, 13], [1, 2]],
}
CUT = 2  # steps before a run is interrupted


def keys_of(name: str, step: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What every process can recompute of any rank."""
    sizes = ROUNDS[name][step]
    generator = torch.Generator().manual_seed(1000 * list(ROUNDS).index(name) + 10 * step + rank)
    return torch.randn(sizes[rank % 2], DIM, generator=generator, dtype=torch.float64).to(dtype)


def all_keys(name: str, step: int, ranks: Iterable[int]) -> np.ndarray:
    return np.concatenate([keys_of(name, step, rank).numpy() for rank in ranks])


def new_queue(rank: int, init: str = "random", dtype: torch.dtype = torch.float64, **options: Any) -> MomentumQueue:
    """Another random start on every rank."""
    torch.manual_seed(7 + rank)
    return MomentumQueue(SIZE, DIM, init=init, dtype=dtype, **options)


def new_deque(rank: int = 0, init: str = "random", dtype: torch.dtype = torch.float64) -> oracle.Queue:
    """Random rows become those of a group's first rank."""
    start = new_queue(rank, init, dtype)
    return oracle.Queue(SIZE, numpy64(start.rows[: int(start.count)]))


def check(queue: MomentumQueue, model: oracle.Queue, eps: float = 1e-14, alone: bool = False) -> None:
    """The rows of the deque, and unless `alone` to the bit those of all ranks."""
    assert (int(queue.position), int(queue.count)) == (model.position, model.count)
    np.testing.assert_allclose(numpy64(queue.rows[: model.count]), model.rows(), rtol=0, atol=eps)
    if alone:
        return
    states = [None] * dist.get_world_size(queue.process_group)
    dist.all_gather_object(states, queue.state_dict(), group=queue.process_group)
    for state in states:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


def check_rounds(
    queue: MomentumQueue,
    model: oracle.Queue,
    ranks: range,
    name: str = "uneven",
    steps: Iterable[int] | None = None,
    eps: float = 1e-14,
) -> None:
    """After every enqueue."""
    for step in range(len(ROUNDS[name])) if steps is None else steps:
        queue.enqueue(keys_of(name, step, dist.get_rank()))
        model.enqueue(all_keys(name, step, ranks))
        check(queue, model, eps)


def refused(function: Callable[[], object], message: str) -> None:
    """The ranks are on their own if one of them gets no error."""
    began = time.perf_counter()
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        seen = f"{type(error).__name__}: {error}"
        assert all(part in seen for part in message.split(" ... ")), seen
        assert time.perf_counter() - began < 20, "waited for the time limit of the process group"
    else:
        raise AssertionError(f"no error, expected {message}")


Case = Callable[[int, int], None]
CASES: dict[str, Case] = {}  # name -> function of rank and world; every rank runs them in this order


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# ---- the queue -----------------------------------------------------------------------------------------------------


@case
def enqueue(rank: int, world: int) -> None:
    for name in ROUNDS:
        for dtype, eps in EPS.items():
            for init in ("random", "empty"):
                check_rounds(new_queue(rank, init, dtype), new_deque(0, init, dtype), range(world), name, eps=eps)


@case
def keys_of_different_dtype(rank: int, world: int) -> None:
    """Rows travel in the dtype of the queue."""
    queue, model = new_queue(rank, "empty"), new_deque(0, "empty")
    queue.enqueue(keys_of("even", 0, rank, torch.float64 if rank else torch.float32))
    model.enqueue(all_keys("even", 0, range(world)))
    check(queue, model, 1e-6)


@case
def without_gathering(rank: int, world: int) -> None:
    queue, model = new_queue(rank, "empty", gather_distributed=False), new_deque(0, "empty")
    keys = keys_of("uneven", 0, rank)
    queue.enqueue(keys)
    model.enqueue(keys.numpy())
    check(queue, model, alone=True)
    negatives, own = in_batch_negatives(keys, gather_distributed=False)
    np.testing.assert_allclose(negatives.numpy(), oracle.unit(keys.numpy(), 1)[0], atol=1e-14)
    assert own.tolist() == list(range(len(keys)))


@case
def resume(rank: int, world: int) -> None:
    """Whether every rank loads the checkpoint or the first alone, at the start or when all queues are equal already."""
    for loads, keys in ((True, None), (rank == 0, None), (rank == 0, torch.ones(rank, DIM))):
        queue, model = new_queue(rank), new_deque()
        check_rounds(queue, model, range(world), steps=range(CUT))
        state = copy.deepcopy(queue.state_dict())
        if keys is None:
            queue = new_queue(rank)
        else:
            queue.enqueue(keys)
        if loads:
            queue.load_state_dict(state)
        check_rounds(queue, model, range(world), steps=range(CUT, 4))


@case
def default_device(rank: int, world: int) -> None:
    """torch.set_default_device moves nothing of what is said over the host."""
    queue, model = new_queue(rank), new_deque()
    for step in range(4):
        keys = keys_of("uneven", step, rank)
        with torch.device("meta"):
            queue.enqueue(keys)
        model.enqueue(all_keys("uneven", step, range(world)))
    check(queue, model)


@case
def deep_copies(rank: int, world: int) -> None:
    """Share the process group and nothing else."""
    group = dist.new_group()
    queue, model = new_queue(rank, process_group=group), new_deque()
    check_rounds(queue, model, range(world), steps=range(CUT))
    first, twin = copy.deepcopy(queue.state_dict()), copy.deepcopy(nn.Sequential(queue))[0]
    check_rounds(twin, model, range(world), steps=range(CUT, 4))
    torch.testing.assert_close(queue.state_dict(), first, rtol=0, atol=0)
    assert twin.process_group is queue.process_group is group
    refused(lambda: pickle.dumps(queue), "TypeError: process_group: got a process group, which cannot")
    assert pickle.loads(pickle.dumps(new_queue(rank))).process_group is None


@case
def groups_of_two(rank: int, world: int) -> None:
    """Ranks 0 and 1, and 2 and 3, with keys and random starts of their own; each pair calls at its own time."""
    pairs = [range(first, first + 2) for first in range(0, world, 2)]
    groups = [dist.new_group(list(pair)) for pair in pairs]
    pair, group = pairs[rank // 2], groups[rank // 2]
    queue = new_queue(rank, process_group=group)
    check_rounds(queue, new_deque(pair[0]), pair, list(ROUNDS)[rank // 2])
    negatives, own = in_batch_negatives(keys_of("uneven", 0, rank), process_group=group)
    np.testing.assert_allclose(negatives.numpy(), oracle.unit(all_keys("uneven", 0, pair), 1)[0], atol=1e-14)
    assert own.tolist() == [[0], [1, 2, 3]][rank % 2]
    for other in groups if world == 4 else ():
        if other is not group:
            outside = "ValueError: process_group: got a group that this process is not"
            refused(lambda other=other: new_queue(rank, process_group=other), outside)
            refused(lambda other=other: in_batch_negatives(torch.ones(2, DIM), process_group=other), outside)
    # A group for GPUs alone, as NCCL's are, needs a host group besides, which its own ranks have to make by themselves.
    device_only = dist.new_group([0, 1], backend="cuda:gloo")
    if rank < 2:
        queue = new_queue(rank, process_group=device_only)
        refused(
            lambda: queue.enqueue(torch.ones(1, DIM)), "ValueError: keys: got a tensor on cpu, expected one on cuda"
        )


# ---- mistakes ------------------------------------------------------------------------------------------------------


@case
def mistakes(rank: int, world: int) -> None:
    """What rank 1 alone does wrong, and what ranks disagree about, raises on all; caught, it spoils nothing."""
    queue, wrong, good = new_queue(rank), rank == 1, torch.ones(2, DIM)
    dim, dtype = DIM + wrong, torch.bfloat16 if wrong else torch.float32
    bad = [
        (torch.ones(2, DIM + 1), "ValueError: keys: got shape (2, 5), expected (n, 4)"),
        (torch.ones(2, DIM, 1), "ValueError: keys: got shape (2, 4, 1), expected (n, 4)"),
        (torch.ones(2, DIM).long(), "TypeError: keys: got dtype torch.int64"),
        ([[0.0] * DIM], "TypeError: keys: got list, expected a torch.Tensor"),
    ]
    calls = [(lambda keys=keys: queue.enqueue(keys if wrong else good), message) for keys, message in bad]
    calls += [(lambda: in_batch_negatives(good[0] if wrong else good), "ValueError: keys: got shape (4,), expected")]
    for call, message in calls:
        refused(call, message if wrong else "ValueError: keys: got an error on rank 1 of")
    dtypes = "float32 on rank 0 ... bfloat16 on rank 1"
    for call, message in (
        (lambda: MomentumQueue(SIZE + 3 * wrong, DIM).enqueue(good), "size 11 on rank 0 ... size 14 on rank 1"),
        (lambda: MomentumQueue(SIZE, dim).enqueue(torch.ones(2, dim)), "dim 4 on rank 0 ... dim 5 on rank 1"),
        (lambda: MomentumQueue(SIZE, DIM, dtype=dtype).enqueue(good), dtypes),
        (lambda: in_batch_negatives(torch.ones(2, dim)), "dim 4 on rank 0 ... dim 5 on rank 1"),
        (lambda: in_batch_negatives(good.to(dtype)), dtypes),
        (
            lambda: in_batch_negatives(good.clone().requires_grad_(wrong)),
            "requires_grad 0 on rank 0 ... requires_grad 1 on rank 1",
        ),
    ):
        refused(call, f"ValueError: keys: got ... {message} ... expected")
    check_rounds(queue, new_deque(), range(world))
    check_rounds(new_queue(rank, "empty"), new_deque(0, "empty"), range(world))


class InForward(nn.Module):
    """Enqueues inside the forward pass that DistributedDataParallel sees."""

    def __init__(self, store: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.scale, self.store = nn.Parameter(torch.ones((), dtype=torch.float64)), store

    def forward(self, keys: Tensor) -> Tensor:
        self.store(keys)
        return self.scale * keys.sum()


@case
def under_join(rank: int, world: int) -> None:
    """DistributedDataParallel.join() with unequal numbers of batches: a rank that has run out would never answer."""

    def run(store: Callable[[Tensor], object], **options: bool) -> None:
        parallel = DistributedDataParallel(InForward(store), broadcast_buffers=False)
        with parallel.join(**options):
            for step in range(rank % 2, 4):
                parallel(keys_of("uneven", step, rank)).backward()

    local, model = new_queue(rank, "empty", gather_distributed=False), new_deque(0, "empty")
    run(local.enqueue)
    for step in range(rank % 2, 4):
        model.enqueue(keys_of("uneven", step, rank).numpy())
    check(local, model, alone=True)
    for store in (new_queue(rank).enqueue, in_batch_negatives):
        refused(lambda store=store: run(store), "ValueError: keys: got a gather inside DistributedDataParallel.")
    # Told to throw, torch raises on all ranks before the first enqueue that one of them would miss.
    queue, model = new_queue(rank, "empty"), new_deque(0, "empty")
    refused(lambda: run(queue.enqueue, throw_on_early_termination=True), "exhausted")
    for step in range(3):
        model.enqueue(np.concatenate([keys_of("uneven", step + r % 2, r).numpy() for r in range(world)]))
    check(queue, model)


# ---- whole steps ---------------------------------------------------------------------------------------------------


@case
def in_batch_gradient(rank: int, world: int) -> None:
    """What all ranks ask of this rank's rows, through the norm; and what this rank asks of anything else alone."""
    ranks = range(world)
    sizes = [len(keys_of("uneven", 0, r)) for r in ranks]
    generators = [torch.Generator().manual_seed(500 + r) for r in ranks]
    asked = [torch.randn(sum(sizes), DIM, generator=generator, dtype=torch.float64) for generator in generators]
    keys, other = keys_of("uneven", 0, rank).requires_grad_(), torch.zeros_like(asked[0]).requires_grad_()
    doubled = 2 * other  # made before the negatives, so that its gradient is computed after theirs
    ((in_batch_negatives(keys)[0] + doubled) * asked[rank]).sum().backward()
    assert torch.equal(other.grad, 2 * asked[rank])
    rows, inverse = oracle.unit(keys.detach().numpy(), 1)
    total = sum(asked).split(sizes)[rank].numpy()
    expected = (total - (total * rows).sum(1, keepdims=True) * rows) * inverse
    np.testing.assert_allclose(keys.grad.numpy(), expected, atol=1e-14)


class Trainer(nn.Module):
    """One training step of three styles: queues (MoCo), negatives from the batch with gradient, and without (BYOL)."""

    def __init__(self, style: str, reduction: str = "mean") -> None:
        super().__init__()
        self.style = style
        self.head = DenseProjectionHead(3, 4, 5)
        if style != "SimCLR":
            self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        if style == "MoCo":
            self.image_queue, self.dense_queue = MomentumQueue(13, 5), MomentumQueue(13, 5)
        self.criterion = DenseInfoNCELoss(reduction=reduction)
        self.match = DenseCorrespondence()
        self.double()

    def forward(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.head(view_q), (self.head if self.style == "SimCLR" else self.key_head)(view_k)
        match = self.match(view_q, view_k)
        if self.style == "MoCo":
            image_loss = self.criterion(query.image, key.image, self.image_queue)
            dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, match)
            self.image_queue.enqueue(key.image)
            self.dense_queue.enqueue(key.pooled)
        else:
            image_rows, own = in_batch_negatives(key.image)
            dense_rows, _ = in_batch_negatives(key.pooled)
            image_loss = self.criterion(query.image, key.image, image_rows, exclude=own)
            dense_loss = self.criterion(query.dense, key.dense, dense_rows, match, exclude=own)
        return image_loss, dense_loss


class Run(NamedTuple):
    make: Callable[[], Any]
    images: tuple[int, int] = (2, 2)  # per rank (cycled): ranks with unequal batches add up with "sum" alone
    size: tuple[int, int] = (4, 4)
    views: int = 2


RUNS = {style: Run(partial(Trainer, style)) for style in ("MoCo", "SimCLR", "BYOL")}
RUNS |= {f"{style}, uneven": Run(partial(Trainer, style, "sum"), (1, 3)) for style in ("MoCo", "SimCLR", "BYOL")}
RECIPES = {"moco": Run(recipes.dense_moco, (3, 3), (24, 16))}
if find_spec("byol_pytorch") is not None:
    RECIPES["byol_pytorch"] = Run(recipes.dense_byol, (3, 3), (64, 64), 1)
# Name -> this rank's model, and what rank 0's saw at every step on the whole batch, before there was a group.
ALONE: dict[str, tuple[Any, list[Any]]] = {}


def steps_of(name: str, model: Any, wrapped: nn.Module, world: int, rank: int | None) -> Iterator[tuple[Any, Any, Any]]:
    """Losses, ranks, gradients and state of three steps, with fixed batch statistics: those of ranks would differ."""
    run, optimizer = (RUNS | RECIPES)[name], torch.optim.SGD(model.parameters(), 0.1)
    sizes = [run.images[r % 2] for r in range(world)]
    model.eval()
    for step in range(3):
        torch.manual_seed(step)
        views = recipes.views(sum(sizes), *run.size)[: run.views]
        image_loss, dense_loss, *ranks = wrapped(*(views if rank is None else (x.split(sizes)[rank] for x in views)))
        losses = torch.stack([image_loss, dense_loss])
        if rank is None and "uneven" in name:
            losses = losses / world  # DistributedDataParallel divides sums over the ranks by their number
        optimizer.zero_grad()
        (losses[0] + 2 * losses[1]).backward()
        optimizer.step()
        if name == "byol_pytorch":
            model.update_moving_average()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state |= {f"{key}.grad": p.grad for key, p in model.named_parameters() if p.grad is not None}
        state = {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in state.items()}  # FSDP's
        yield losses.detach(), ranks[0].split(sizes) if rank is None and ranks else ranks, copy.deepcopy(state)


def check_run(name: str, rank: int, world: int, wrap: Callable[[Any], nn.Module] = DistributedDataParallel) -> None:
    """Loss over the ranks, gradients, weights and queues of every step, from ranks that start from other seeds."""
    model, alone = copy.deepcopy(ALONE[name])
    steps = steps_of(name, model, wrap(model), world, rank)
    for (losses, ranks, state), (losses_alone, ranks_alone, state_alone) in zip(steps, alone, strict=True):
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / world, losses_alone, rtol=0, atol=1e-11)
        torch.testing.assert_close(ranks, list(ranks_alone[rank : rank + 1]), rtol=0, atol=0)
        torch.testing.assert_close(state, state_alone, rtol=0, atol=1e-11)


@case
def steps_of_ddp(rank: int, world: int) -> None:
    """With its defaults, buffer broadcast included."""
    for name in RUNS:
        check_run(name, rank, world)


@case
def compiled_steps(rank: int, world: int) -> None:
    """Around and inside DistributedDataParallel. The compiler does not trace collectives: it would warn."""
    compiled = partial(torch.compile, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        if world == 2:
            check_run("MoCo", rank, world, lambda x: compiled(DistributedDataParallel(x)))
            check_run("MoCo", rank, world, lambda x: DistributedDataParallel(compiled(x)))
            check_run("SimCLR", rank, world, lambda x: compiled(DistributedDataParallel(x)))
    assert [str(one.message) for one in caught] == []


@case
def sharded_steps(rank: int, world: int) -> None:
    """FSDP2, which unlike DistributedDataParallel leaves it to the trainer to start alike on every rank."""
    from torch.distributed.fsdp import fully_shard

    def sharded(trainer: Trainer) -> nn.Module:
        torch.manual_seed(0)
        trainer.load_state_dict(Trainer("MoCo").state_dict())
        for module in (trainer.head, trainer.key_head, trainer):
            fully_shard(module)
        return trainer

    if world == 2:
        check_run("MoCo", rank, world, sharded)


@case
def steps_of_recipes(rank: int, world: int) -> None:
    """DistributedDataParallel refuses, at the second step, a trained parameter without a gradient."""
    for name in RECIPES if world == 2 else ():
        check_run(name, rank, world)
    if world == 2:  # left as they were shuffled, all keys are off: so they were shuffled, and that was undone
        model, alone = ALONE["moco"]
        model._batch_unshuffle_ddp = lambda x, idx_unshuffle: x
        losses, *_ = next(steps_of("moco", model, DistributedDataParallel(model), world, rank))
        dist.all_reduce(losses)
        assert ((losses / 2 - alone[0][0]).abs() > 1e-5).all()


# ---- a second process group ----------------------------------------------------------------------------------------

EARLY: list[MomentumQueue] = []  # a queue that was used before the first process group


@case
def rows_from_before_the_process_group(rank: int, world: int) -> None:
    """And from between the first and the second: those of rank 0 stay. A group that was destroyed serves no more."""
    (early,), model = EARLY, new_deque()
    early.enqueue(torch.ones(0, DIM))
    stale = new_queue(rank, process_group=dist.new_group())
    destroyed = "ValueError: process_group: got a group that has been destroyed"
    dist.destroy_process_group()
    refused(lambda: stale.enqueue(torch.ones(2, DIM)), destroyed)
    early.enqueue(torch.ones(1 + rank, DIM))  # ranks part again
    join(rank, world, "second")
    refused(lambda: stale.enqueue(torch.ones(2, DIM)), destroyed)
    model.enqueue(np.ones((2 + 1, DIM)))
    check_rounds(early, model, range(world))


def join(rank: int, world: int, name: str) -> None:
    where, limit = (Path(sys.argv[3]) / name).as_uri(), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=limit)


def main(rank: int, world: int) -> None:
    torch.set_num_threads(1)
    EARLY.append(new_queue(rank))
    EARLY[0].enqueue(torch.ones(2, DIM))  # no process group yet
    with recipes.hosts():
        for name, run in (RUNS | (RECIPES if world == 2 else {})).items():
            torch.manual_seed(rank)
            model = run.make()
            torch.manual_seed(0)
            first = run.make()
            ALONE[name] = model, list(steps_of(name, first, first, world, None))
    join(rank, world, "first")
    for name, function in CASES.items():
        print(f"rank {rank}: {name}", file=sys.stderr)
        function(rank, world)
    torch.save(list(CASES), Path(sys.argv[3]) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
