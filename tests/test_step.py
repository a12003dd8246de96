"""A whole DenseCL step, head to queue, against the same step in numpy; and no step waits for its device."""

from __future__ import annotations

from typing import Any

import helpers
import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, numpy64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue

LAMBDA, TEMPERATURE = 0.3, 0.2


class Step:
    """Everything a trainer holds: two heads, two queues, the matching rule and the loss."""

    def __init__(
        self,
        backend: str,
        dtype: torch.dtype = torch.float64,
        size: int = 13,
        init: str = "random",
        grid: int | None = 2,
    ) -> None:
        self.head, self.momentum_head = (DenseProjectionHead(6, 8, 5, grid_size=grid).to(dtype) for _ in range(2))
        self.queue, self.dense_queue = (MomentumQueue(size, 5, init=init, dtype=dtype) for _ in range(2))
        self.match = DenseCorrespondence(grid_size=grid, backend=backend)
        self.criterion = DenseInfoNCELoss(TEMPERATURE, backend=backend)
        self.grid = grid
        helpers.to_device(backend, self.head, self.momentum_head, self.queue, self.dense_queue)

    def __call__(self, features_q: Tensor, features_k: Tensor) -> tuple[Tensor, Tensor]:
        image_q, dense_q, _ = self.head(features_q)
        with torch.no_grad():
            image_k, dense_k, pooled_k = self.momentum_head(features_k)
        match = self.match(features_q, features_k)
        image_loss, rank = self.criterion(image_q, image_k, self.queue, return_rank=True)
        dense_loss = self.criterion(dense_q, dense_k, self.dense_queue, match)
        self.queue.enqueue(image_k)
        self.dense_queue.enqueue(pooled_k)
        return (1 - LAMBDA) * image_loss + LAMBDA * dense_loss, rank


class NumpyStep:
    """The same, from the equations."""

    def __init__(self, step: Step) -> None:
        self.params, self.momentum_params = (
            {name: numpy64(p).copy() for name, p in head.state_dict().items()}
            for head in (step.head, step.momentum_head)
        )
        self.queues = [
            oracle.Queue(queue.size, numpy64(queue.rows[: int(queue.count)]).copy())
            for queue in (step.queue, step.dense_queue)
        ]
        self.grid = None if step.grid is None else (step.grid, step.grid)

    def __call__(self, features_q: Tensor, features_k: Tensor) -> tuple[float, np.ndarray, oracle.Params]:
        q, k = numpy64(features_q), numpy64(features_k)
        online = oracle.head(self.params, q, self.grid)
        target = oracle.head(self.momentum_params, k, self.grid)
        index = oracle.match(online.grid, target.grid).index
        image = self.loss(online.image[:, :, None], target.image[:, :, None], self.queues[0], None)
        dense = self.loss(online.dense, target.dense, self.queues[1], index)
        grads = oracle.head_gradients(self.params, online, (1 - LAMBDA) * image.query[:, :, 0], LAMBDA * dense.query)
        self.queues[0].enqueue(target.image)
        self.queues[1].enqueue(target.pooled)
        return float((1 - LAMBDA) * image.loss + LAMBDA * dense.loss), image.rank, grads

    @staticmethod
    def loss(query: np.ndarray, key: np.ndarray, queue: oracle.Queue, index: np.ndarray | None) -> oracle.LossResult:
        rows = queue.rows() if queue.count else np.zeros((1, query.shape[1]))
        return oracle.info_nce(query, key, rows, index, temperature=TEMPERATURE, count=queue.count)


def views(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    first = torch.randn(batch, 6, 5, 4, dtype=torch.float64)
    second = first.flip(3) + 0.5 * torch.randn_like(first)
    return first.to(dtype).contiguous(memory_format=torch.channels_last), second.to(dtype)


@pytest.mark.parametrize("init", ["random", "empty"])
@pytest.mark.parametrize("grid", [2, None])
def test_training_steps(backend: str, init: str, grid: int | None) -> None:
    """Five steps of SGD with batches of different size: loss, rank, every parameter's gradient, both queues."""
    step = Step(backend, init=init, grid=grid)
    model = NumpyStep(step)
    optimizer = torch.optim.SGD(step.head.parameters(), lr=0.1)
    for batch in (4, 3, 5, 1, 4):
        features = views(batch)
        wish_loss, wish_rank, wish_grads = model(*features)
        loss, rank = step(*helpers.to_device(backend, *features))
        optimizer.zero_grad()
        loss.backward()
        assert_close(loss, wish_loss, 1e-9, "loss")
        assert rank.tolist() == wish_rank.tolist()
        for name, parameter in step.head.named_parameters():
            assert_close(parameter.grad, wish_grads[name], 1e-8, name)
            model.params[name] -= 0.1 * wish_grads[name]
        assert all(parameter.grad is None for parameter in step.momentum_head.parameters())
        for queue, wish in zip((step.queue, step.dense_queue), model.queues, strict=True):
            assert (int(queue.count), int(queue.position)) == (wish.count, wish.position)
            assert_close(queue.rows[: wish.count], wish.rows(), 1e-9, "queue")
        optimizer.step()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_float32_step(backend: str, autocast: torch.dtype | None) -> None:
    step = Step(backend, torch.float32)
    model = NumpyStep(step)
    device = helpers.DEVICES.get(backend, "cpu")
    for batch in (4, 5):
        features = views(batch, torch.float32)
        wish_loss, _, wish_grads = model(*features)
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            loss, _ = step(*helpers.to_device(backend, *features))
        step.head.zero_grad()
        loss.backward()
        assert loss.dtype == torch.float32
        tolerance = 1e-5 if autocast is None else 3e-2
        assert_close(loss, wish_loss, tolerance)
        for name, parameter in step.head.named_parameters():
            assert_close(parameter.grad, wish_grads[name], 2 * tolerance, name)


def test_predictor_free_symmetric_step(backend: str) -> None:
    """Both views through one head, keys and in-batch negatives with gradient: against directional differences."""
    head = DenseProjectionHead(6, 8, 5).double()
    (head,) = helpers.to_device(backend, head)
    features = [flat[:, :, :2, :2].contiguous() for flat in views(3)]
    index, own = torch.randint(4, (3, 4)), torch.arange(3)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        projections = head(*helpers.to_device(backend, first)), head(*helpers.to_device(backend, second))
        negatives = torch.nn.functional.normalize(projections[1].pooled, dim=1)
        return helpers.info_nce(backend, projections[0].dense, projections[1].dense, negatives, index, exclude=own)

    def reference() -> float:
        params = {name: numpy64(p) for name, p in head.state_dict().items()}
        first, second = (oracle.head(params, numpy64(x)) for x in features)
        negatives = oracle.unit(second.pooled, 1)[0]
        return float(oracle.info_nce(first.dense, second.dense, negatives, index.numpy(), exclude=own.numpy()).loss)

    value = loss(*features)
    value.backward()
    assert_close(value, reference(), 1e-10)
    for parameter in head.dense_mlp.parameters():
        direction, at = torch.randn_like(parameter), parameter.detach().clone()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(at + sign * 1e-5 * direction)
            ends.append(reference())
        with torch.no_grad():
            parameter.copy_(at)
        assert float((parameter.grad * direction).sum()) == pytest.approx(
            (ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8
        )


# ---- no waiting for a device ----------------------------------------------------------------------------------------


class NoReading(TorchDispatchMode):
    """Raises where a value travels to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "equal")):
            raise AssertionError(f"{func} reads a value on the host")
        return func(*args, **(kwargs or {}))


def test_enqueue_does_not_read_on_the_host() -> None:
    queue = MomentumQueue(7, 3, init="empty")
    with NoReading():
        for n in (0, 3, 20):
            queue.enqueue(torch.randn(n, 3))
        with pytest.raises(AssertionError):
            int(queue.count)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("init", ["random", "empty"])
def test_step_does_not_wait_for_the_gpu(backend: str, init: str) -> None:
    step, features = Step(backend, torch.float32, init=init), [x.cuda() for x in views(4, torch.float32)]
    for module in (step.head, step.momentum_head, step.queue, step.dense_queue):
        module.cuda()
    step(*features)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*features)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
