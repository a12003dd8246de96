"""The queue against a plain Python deque."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EPS, assert_same, check_queue, deque_of, numpy64, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densecl_ops import MomentumQueue
from densecl_ops.functional import dense_info_nce

DTYPES = st.sampled_from(list(EPS))


def keys_of(seed: int, n: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal((n, dim)) * 3, dtype=dtype)


def reloaded(queue: MomentumQueue) -> MomentumQueue:
    other = MomentumQueue(queue.size, queue.dim).to(queue.rows.dtype)
    other.load_state_dict(queue.state_dict())
    return other


@pytest.mark.parametrize("duplicate", [reloaded, lambda queue: pickle.loads(pickle.dumps(queue)), copy.deepcopy])
@given(
    queue=st.builds(
        MomentumQueue, st.integers(1, 9), st.integers(1, 5), init=st.sampled_from(["random", "empty"]), dtype=DTYPES
    ),
    key_dtype=DTYPES,
    batches=st.lists(st.integers(0, 30), max_size=8),
    copied_at=st.integers(0, 8),
    seed=st.integers(0, 10**6),
)
def test_queue_and_its_copies_are_deques(
    duplicate: Any, queue: MomentumQueue, key_dtype: torch.dtype, batches: list[int], copied_at: int, seed: int
) -> None:
    model, dtype = deque_of(queue), queue.rows.dtype
    eps = EPS[dtype]
    check_queue(queue, model, eps)
    left = []  # a queue stays as it is once its copy goes on
    for step, n in enumerate(batches):
        if step == copied_at:
            left.append((queue, copy.deepcopy(model)))
            queue = duplicate(queue)
        keys = keys_of(seed + step, n, queue.dim, key_dtype)
        queue.enqueue(keys)
        model.enqueue(numpy64(keys))
        check_queue(queue, model, eps)
        assert (queue.rows.dtype, queue.position.dtype, queue.count.dtype) == (dtype, torch.int64, torch.int64)
    for pair in left:
        check_queue(*pair, eps)


def test_defaults() -> None:
    queue = MomentumQueue()
    assert list(queue.parameters()) == []
    state = queue.state_dict()
    kinds = {name: (x.shape, x.dtype) for name, x in state.items()}
    assert kinds == {"rows": ((65536, 128), torch.float32), "position": ((), torch.int64), "count": ((), torch.int64)}
    assert (int(queue.position), int(queue.count)) == (0, 65536)
    assert (queue.size, queue.dim, queue.gather_distributed) == (65536, 128, True)
    assert "size=65536, dim=128, init='random'" in repr(queue)
    assert (MomentumQueue(6, 3, init="empty").rows == 0).all()


def test_random_rows_are_uniform_on_the_sphere() -> None:
    """Mean 0 and covariance 1 / dim, within 5 standard errors."""
    rows = MomentumQueue(20000, 4, dtype=torch.float64).rows.numpy()
    assert np.abs(rows.mean(0)).max() < 5 * 0.5 / 20000**0.5
    assert np.abs(rows.T @ rows / 20000 - np.eye(4) / 4).max() < 5 * 0.3 / 20000**0.5


@pytest.mark.parametrize("dtype", [None, *EPS])
def test_random_rows_are_unit_in_any_dtype(dtype: torch.dtype | None, defaults: None) -> None:
    queue = MomentumQueue(50, 8, dtype=dtype)
    assert queue.rows.dtype == (dtype or torch.get_default_dtype())
    if not queue.rows.is_meta:
        np.testing.assert_allclose(np.linalg.norm(numpy64(queue.rows), axis=1), 1, atol=4 * EPS[queue.rows.dtype])


@pytest.mark.parametrize(
    ("guise", "mode"),
    [
        (lambda x: x.t().contiguous().t(), nullcontext),
        (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], nullcontext),
        (lambda x: x.repeat_interleave(2, 0)[::2], nullcontext),
        (lambda x: x[:1].expand(5, -1), nullcontext),
        (lambda x: x.requires_grad_(), nullcontext),
        (torch.inference_mode()(lambda x: x * 1), nullcontext),
        (lambda x: x, torch.inference_mode),
        (lambda x: x.float(), lambda: torch.autocast("cpu", torch.bfloat16)),
        (lambda x: x.float(), lambda: torch.autocast("cpu", torch.float16)),
    ],
)
def test_keys_of_any_kind_are_neither_changed_nor_kept(guise: Any, mode: Any) -> None:
    keys = guise(keys_of(2, 5, 4))
    queue, before = MomentumQueue(7, 4, dtype=torch.float64), numpy64(keys).copy()
    model = deque_of(queue)
    with mode():
        queue.enqueue(keys)
    np.testing.assert_array_equal(numpy64(keys), before)
    with torch.inference_mode():
        keys[0] = 7
    model.enqueue(before)
    check_queue(queue, model, EPS[keys.dtype])
    assert not queue.rows.requires_grad


def test_enqueueing_its_own_rows() -> None:
    queue = MomentumQueue(5, 3, dtype=torch.float64)
    queue.enqueue(keys_of(3, 2, 3))
    before = queue.rows.clone()
    queue.enqueue(queue.rows)
    np.testing.assert_allclose(queue.rows.numpy(), np.roll(before.numpy(), 2, 0), atol=1e-14)


@pytest.mark.parametrize(
    ("key", "dtype", "row"),
    [
        ([0.0, 0.0], torch.float32, [0, 0]),
        ([3e4, 4e4], torch.float16, [0.6, 0.8]),  # their squares overflow float16
        ([3e-4, 4e-4], torch.float16, [0.6, 0.8]),  # and these vanish in it
        *(([bad, 1], dtype, [0, 0]) for bad in (np.inf, np.nan) for dtype in (torch.float16, torch.float32)),
        ([1e30, 1], torch.float32, [0, 0]),  # finite, but its square is not: it has no direction there either
    ],
)
def test_extreme_keys(key: list[float], dtype: torch.dtype, row: list[float]) -> None:
    """One that is not finite enters as a zero row, and costs the others nothing."""
    queue = MomentumQueue(6, 2, init="empty")
    queue.enqueue(torch.tensor([[0.8, 0.6], key, [-4.0, 3.0]], dtype=dtype))
    np.testing.assert_allclose(queue.rows[:3].numpy(), [[0.8, 0.6], row, [-0.8, 0.6]], atol=1e-3)
    assert int(queue.count) == 3


@pytest.mark.parametrize("init", ["random", "empty"])
def test_deferred_initialisation(init: str) -> None:
    """Made on meta, then to_empty and reset_parameters, as FSDP and others do: as if made in place."""
    with torch.device("meta"):
        queue = MomentumQueue(64, 16, init=init, dtype=torch.bfloat16)
    assert f"init={init!r}" in repr(queue)
    with pytest.raises(ValueError, match="keys: got a tensor on meta"):
        queue.enqueue(torch.randn(4, 16, device="meta"))
    queue.to_empty(device="cpu")
    for buffer in queue.buffers():
        buffer.fill_(77)
    torch.manual_seed(3)
    queue.reset_parameters()
    torch.manual_seed(3)
    fresh = MomentumQueue(64, 16, init=init, dtype=torch.bfloat16)
    assert_same(queue.state_dict(), fresh.state_dict())


def state_of(size: int = 8, **numbers: int) -> dict[str, Tensor]:
    return MomentumQueue(size, 3).state_dict() | {name: torch.tensor(value) for name, value in numbers.items()}


STRANGE = "count and queue.position: got {} and {}, .*these 8 rows; load rows, position and count of one queue"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        *(({name: state_of()[name] for name in part}, "Missing key") for part in (["position", "count"], ["rows"])),
        (state_of(5), r"size mismatch for queue\.rows.*\(5, 3\).*\(8, 3\)"),
        # own = model.state_dict(); own.update(what fits by shape): the rows are the model's, the numbers another's
        (state_of(count=12, position=3), STRANGE.format(12, 3)),
        (state_of(count=8, position=9), STRANGE.format(8, 9)),
        (state_of(count=-1, position=0), STRANGE.format(-1, 0)),
        (state_of(count=6, position=3), STRANGE.format(6, 3)),
    ],
)
def test_a_state_that_is_not_one_queues_changes_nothing(state: dict[str, Tensor], message: str, strict: bool) -> None:
    model = torch.nn.ModuleDict({"queue": MomentumQueue(8, 3, init="empty")})
    before = copy.deepcopy(model.state_dict())
    load = partial(model.load_state_dict, {f"queue.{name}": x for name, x in state.items()}, strict=strict)
    if message == "Missing key" and not strict:
        assert set(load().missing_keys) == {f"queue.{name}" for name in state_of().keys() - state}
    else:
        with pytest.raises(RuntimeError, match=message):
            load()
    assert_same(model.state_dict(), before)


def test_rows_that_were_averaged_are_told_at_loading() -> None:
    """The mean of unit rows is shorter than one: what AveragedModel(use_buffers=True) makes of a queue."""
    queue, other = MomentumQueue(8, 3), MomentumQueue(8, 3, init="empty")
    queue.enqueue(torch.zeros(1, 3))  # zero rows are no sign of it
    other.rows.fill_(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MomentumQueue(8, 3).load_state_dict(queue.state_dict())
        MomentumQueue(8, 3, dtype=torch.bfloat16).load_state_dict(queue.state_dict())
        MomentumQueue(8, 3).load_state_dict(other.state_dict())  # rows past the count may hold anything
    queue.rows.mul_(0.26)
    with pytest.warns(UserWarning, match=r"rows: got a row of length 0\.26.*use_buffers=False"):
        MomentumQueue(8, 3).load_state_dict(queue.state_dict())


def test_a_replica_of_data_parallel_does_not_enqueue() -> None:
    """Its buffers are thrown away, and the keys with them."""
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        MomentumQueue(8, 4)._replicate_for_data_parallel().enqueue(torch.randn(2, 4))


@pytest.mark.parametrize(("name", "value"), [("position", 94705377164016), ("position", -1), ("count", 9)])
def test_a_queue_that_was_not_initialised_says_so(name: str, value: int) -> None:
    """As transformers leaves what a checkpoint does not hold."""
    queue = MomentumQueue(8, 4, init="empty")
    getattr(queue, name).fill_(value)
    with pytest.raises(ValueError, match=r"call reset_parameters\(\)"):
        queue.enqueue(torch.randn(2, 4))
    if name == "count":
        loss = partial(dense_info_nce, torch.randn(2, 4), torch.randn(2, 4), queue)
        refused(loss, "negatives.count: got 9, expected 0 to 8; ... reset_parameters()")
