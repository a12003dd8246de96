"""The queue against a plain Python deque."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import oracle
import pytest
import torch
from helpers import EPS, numpy64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densecl_ops import DenseInfoNCELoss, MomentumQueue
from densecl_ops.functional import dense_info_nce
from densecl_ops.info_nce import function

DTYPES = st.sampled_from(list(EPS))


def keys_of(seed: int, n: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal((n, dim)) * 3, dtype=dtype)


def same(queue: MomentumQueue, model: oracle.Queue, eps: float) -> None:
    assert int(queue.position) == model.position
    assert int(queue.count) == model.count
    np.testing.assert_allclose(
        numpy64(queue.rows[: model.count]), model.rows().reshape(model.count, queue.dim), atol=eps
    )


def model_of(queue: MomentumQueue) -> oracle.Queue:
    return oracle.Queue(queue.size, numpy64(queue.rows[: int(queue.count)]))


@given(
    size=st.integers(1, 9),
    dim=st.integers(1, 5),
    init=st.sampled_from(["random", "empty"]),
    dtype=DTYPES,
    key_dtype=DTYPES,
    batches=st.lists(st.integers(0, 30), max_size=8),
    reload_at=st.integers(0, 8),
    seed=st.integers(0, 10**6),
)
def test_queue_is_a_deque(
    size: int,
    dim: int,
    init: str,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    batches: list[int],
    reload_at: int,
    seed: int,
) -> None:
    queue = MomentumQueue(size, dim, init=init, dtype=dtype)
    model, eps = model_of(queue), max(EPS[dtype], 1e-6 if key_dtype != torch.float64 else 0)
    same(queue, model, eps)
    for step, n in enumerate(batches):
        if step == reload_at:
            other = MomentumQueue(size, dim, init="random" if init == "empty" else "empty", dtype=dtype)
            other.load_state_dict(queue.state_dict())
            queue = other
        keys = keys_of(seed + step, n, dim, key_dtype)
        queue.enqueue(keys)
        model.enqueue(numpy64(keys))
        same(queue, model, eps)
        assert queue.rows.dtype == dtype


def test_defaults() -> None:
    queue = MomentumQueue()
    assert queue.rows.shape == (65536, 128)
    assert queue.rows.dtype == torch.float32
    assert (queue.size, queue.dim, queue.gather_distributed) == (65536, 128, True)
    assert (int(queue.position), int(queue.count)) == (0, 65536)
    np.testing.assert_allclose(queue.rows.norm(dim=1).numpy(), 1, atol=1e-6)


def test_random_rows_are_uniform_on_the_sphere() -> None:
    """Mean 0 and covariance 1 / dim, within 5 standard errors; and the generator's seed decides them."""
    rows = MomentumQueue(20000, 4, dtype=torch.float64).rows.numpy()
    assert np.abs(rows.mean(0)).max() < 5 * 0.5 / 20000**0.5
    assert np.abs(rows.T @ rows / 20000 - np.eye(4) / 4).max() < 5 * 0.3 / 20000**0.5
    torch.manual_seed(5)
    first = MomentumQueue(10, 3).rows
    torch.manual_seed(5)
    assert torch.equal(first, MomentumQueue(10, 3).rows)
    assert not torch.equal(first, MomentumQueue(10, 3).rows)


@pytest.mark.parametrize("dtype", list(EPS))
def test_dtype_of_rows(dtype: torch.dtype) -> None:
    queue = MomentumQueue(50, 8, dtype=dtype)
    assert queue.rows.dtype == dtype
    np.testing.assert_allclose(np.linalg.norm(numpy64(queue.rows), axis=1), 1, atol=4 * max(EPS[dtype], 1e-7))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert MomentumQueue(2, 2).rows.dtype == dtype
    finally:
        torch.set_default_dtype(default)


def test_empty_start() -> None:
    queue = MomentumQueue(6, 3, init="empty")
    assert (int(queue.position), int(queue.count)) == (0, 0)
    assert (queue.rows == 0).all()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x[:1].expand(5, -1),
    ],
)
def test_strides_of_keys(layout: object) -> None:
    keys = layout(keys_of(2, 5, 4))
    queue = MomentumQueue(7, 4, dtype=torch.float64)
    model = model_of(queue)
    queue.enqueue(keys)
    model.enqueue(numpy64(keys))
    same(queue, model, 1e-14)


def test_keys_are_neither_changed_nor_kept() -> None:
    queue, keys = MomentumQueue(4, 3), torch.randn(2, 3, requires_grad=True)
    before = keys.detach().clone()
    queue.enqueue(keys)
    assert torch.equal(keys.detach(), before)
    assert not queue.rows.requires_grad
    written = queue.rows.clone()
    with torch.no_grad():
        keys.fill_(7)
    assert torch.equal(queue.rows, written)


def test_enqueueing_its_own_rows() -> None:
    queue = MomentumQueue(5, 3, dtype=torch.float64)
    queue.enqueue(keys_of(3, 2, 3))
    before = queue.rows.clone()
    queue.enqueue(queue.rows)
    np.testing.assert_allclose(queue.rows.numpy(), np.roll(before.numpy(), 2, 0), atol=1e-14)


def test_extreme_keys() -> None:
    """Zero keys stay zero, float16 keys whose squares overflow float16 or vanish in it are normalised in float32."""
    queue = MomentumQueue(4, 2)
    queue.enqueue(torch.tensor([[0.0, 0.0]]))
    queue.enqueue(torch.tensor([[3e4, 4e4], [3e-4, 4e-4]], dtype=torch.float16))
    np.testing.assert_allclose(queue.rows[:3].numpy(), [[0, 0], [0.6, 0.8], [0.6, 0.8]], atol=1e-3)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(autocast: torch.dtype) -> None:
    keys, queues = torch.randn(5, 16), [MomentumQueue(8, 16, init="empty") for _ in range(2)]
    queues[0].enqueue(keys)
    with torch.autocast("cpu", autocast):
        queues[1].enqueue(keys)
    assert torch.equal(queues[0].rows, queues[1].rows)


def test_inference_mode() -> None:
    queue, keys = MomentumQueue(4, 3, dtype=torch.float64), keys_of(4, 3, 3)
    model = model_of(queue)
    with torch.inference_mode():
        queue.enqueue(keys)
        inside = keys * 1
    queue.enqueue(inside)
    model.enqueue(numpy64(keys)), model.enqueue(numpy64(keys))
    same(queue, model, 1e-14)


def test_state_dict_names_everything() -> None:
    queue = MomentumQueue(6, 3, init="empty")
    queue.enqueue(torch.randn(4, 3))
    state = queue.state_dict()
    assert set(state) == {"rows", "position", "count"}
    assert state["position"].dtype == state["count"].dtype == torch.int64
    assert state["position"].shape == state["count"].shape == ()
    assert (int(state["position"]), int(state["count"])) == (4, 4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda queue: pickle.loads(pickle.dumps(queue))])
def test_copies_go_their_own_way(duplicate: object) -> None:
    queue = MomentumQueue(5, 3, init="empty", gather_distributed=False)
    queue.enqueue(torch.randn(3, 3))
    twin, before = duplicate(queue), queue.rows.clone()
    keys = torch.randn(4, 3)
    twin.enqueue(keys)
    assert torch.equal(queue.rows, before)
    queue.enqueue(keys)
    assert torch.equal(queue.rows, twin.rows)
    assert (int(twin.position), int(twin.count), twin.gather_distributed) == (2, 5, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_dtype(dtype: torch.dtype) -> None:
    queue = MomentumQueue(5, 3, init="empty").to(dtype)
    model = oracle.Queue(5, np.zeros((0, 3)))
    for seed in (6, 7):
        keys = keys_of(seed, 3, 3)
        queue.enqueue(keys)
        model.enqueue(numpy64(keys))
    same(queue, model, EPS[dtype])
    assert (queue.rows.dtype, queue.position.dtype, queue.count.dtype) == (dtype, torch.int64, torch.int64)


def test_no_parameters() -> None:
    assert list(MomentumQueue(2, 2).parameters()) == []
    assert "size=2" in repr(MomentumQueue(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_keys_that_are_not_finite_enter_as_zero_rows(dtype: torch.dtype, bad: float) -> None:
    """1e30 is finite in float32, but its square is not: it has no direction there either."""
    queue, keys = MomentumQueue(6, 3, init="empty"), torch.randn(4, 3, dtype=dtype)
    keys[1, 2] = bad
    queue.enqueue(keys)
    truth = oracle.unit(numpy64(keys), 1)[0]
    truth[1] = 0
    np.testing.assert_allclose(queue.rows[:4].numpy(), truth, atol=1e-3 if dtype == torch.float16 else 1e-6)
    assert int(queue.count) == 4


def test_one_overflow_costs_one_step() -> None:
    """What GradScaler is there for. Keys are stored at every step, also at those that it skips."""
    torch.manual_seed(0)
    queue, net = MomentumQueue(32, 16), torch.nn.Linear(16, 16)
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(20):
        x = torch.randn(4, 16)
        query, key = net(x), net(x + 0.1).detach()
        if step == 5:
            query, key = query * float("inf"), (key * 1e9).half()
        optimizer.zero_grad()
        scaler.scale(DenseInfoNCELoss()(query, key.float(), queue)).backward()
        scaler.step(optimizer)
        scaler.update()
        queue.enqueue(key)
    assert scaler.get_scale() == 2.0**15
    assert net.weight.isfinite().all()


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
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(queue.buffers(), fresh.buffers(), strict=True))


def test_random_rows_are_unit_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        rows = MomentumQueue(64, 16, dtype=torch.float32).rows
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(np.linalg.norm(numpy64(rows), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("keep", [{"position", "count"}, {"rows"}, {"rows", "count"}])
@pytest.mark.parametrize("strict", [False, True])
def test_a_part_of_a_state_changes_nothing(keep: set[str], strict: bool) -> None:
    other, queue = MomentumQueue(8, 3), MomentumQueue(8, 3, init="empty")
    before = copy.deepcopy(queue.state_dict())
    state = {name: x for name, x in other.state_dict().items() if name in keep}
    if strict:
        with pytest.raises(RuntimeError, match="Missing key"):
            queue.load_state_dict(state)
    else:
        assert set(queue.load_state_dict(state, strict=False).missing_keys) == set(before) - keep
    assert all(torch.equal(before[name], x) for name, x in queue.state_dict().items())


def test_a_queue_of_another_size_changes_nothing() -> None:
    other, model = MomentumQueue(8, 3), torch.nn.ModuleDict({"queue": MomentumQueue(5, 3, init="empty")})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for queue\.rows.*\(8, 3\).*\(5, 3\)"):
        model.load_state_dict({f"queue.{name}": x for name, x in other.state_dict().items()})
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(("size", "count", "position"), [(5, 8, 3), (5, 5, 7), (5, -1, 0), (12, 8, 3)])
@pytest.mark.parametrize("strict", [True, False])
def test_numbers_of_another_queue_are_refused(size: int, count: int, position: int, strict: bool) -> None:
    """own = model.state_dict(); own.update(what fits by shape): the rows are the model's, the numbers another's."""
    queue = MomentumQueue(size, 3, init="empty")
    before = copy.deepcopy(queue.state_dict())
    state = {**before, "count": torch.tensor(count), "position": torch.tensor(position)}
    with pytest.raises(RuntimeError, match=rf"count and position: got {count} and {position}.*{size} rows.*one queue"):
        queue.load_state_dict(state, strict=strict)
    assert all(torch.equal(before[name], x) for name, x in queue.state_dict().items())


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
        with pytest.raises(ValueError, match=r"negatives.count: got 9, expected 0 to 8; .*reset_parameters\(\)"):
            dense_info_nce(torch.randn(2, 4), torch.randn(2, 4), queue)


def test_averaged_rows_are_told_with_their_cause() -> None:
    """ema-pytorch writes through .data, which leaves no version; the loss looks at a tensor's first call."""
    function._warn_of_length.cache_clear()
    queue = MomentumQueue(64, 4)
    queue.rows.data.mul_(0.5)
    with pytest.warns(UserWarning, match="averaging of buffers spoils a queue.*ignore_startswith_names"):
        dense_info_nce(torch.randn(2, 4), torch.randn(2, 4), queue)
