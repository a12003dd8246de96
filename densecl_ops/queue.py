"""The queue of negatives."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from densecl_ops import _checks, _distributed, _tracing
from densecl_ops._numerics import accumulation_dtype, normalize_keys
from densecl_ops._recomputation import in_backward
from densecl_ops._types import INITS, Init


class MomentumQueue(nn.Module):
    """First-in, first-out store of unit rows that serve as negatives (MoCo, arXiv 1911.05722).

    Pass it to the loss as `negatives`, and enqueue after the loss, so that a batch is not among its own negatives.
    Buffers, all in the state_dict: `rows` (size, dim); `position`, 0-d int64, where the next row goes; `count`, 0-d
    int64, how many rows are negatives (the first `count` ones).

    Averages of a whole model average its buffers too, and an average of rows is no row: leave the queue out, by
    use_buffers=False (AveragedModel, EMAWeightAveraging) or ignore_startswith_names={"queue"} (ema-pytorch, whose
    `update_model_with_ema_every` would write the averages back).

    Args:
        size: K, rows kept. Default 65,536.
        dim: Channels of a row, D. Default 128.
        init: "random" (default), the paper's start: random unit rows are negatives from step 1. "empty" ignores rows
            not written yet, so that only real keys are ever negatives; the loss then starts at 0 and rises as
            log(1 + count).
        dtype: Of `rows`: float32, float64, bfloat16 or float16. Default: torch's default dtype.
        gather_distributed: Whether `enqueue` gathers the keys of every rank once torch.distributed is initialised.
            Default True.
        process_group: The ranks to gather from, this one among them. Default: the default group at the time of the
            call. Deep copies share it; a queue that was given one cannot be pickled, its state_dict can.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or this process is not in process_group.

    Example:
        >>> import torch
        >>> from densecl_ops import MomentumQueue
        >>> queue = MomentumQueue(size=5, dim=16, init="empty")
        >>> queue.enqueue(torch.randn(3, 16))
        >>> int(queue.count), int(queue.position)
        (3, 3)
        >>> queue.enqueue(torch.randn(4, 16))  # any number of rows; wraps exactly
        >>> int(queue.count), int(queue.position)
        (5, 2)
    """

    rows: Tensor
    position: Tensor
    count: Tensor
    _is_replica = False  # torch sets it in what nn.DataParallel copies
    unit_rows = True  # what lets the kernels do without a running maximum

    def __init__(
        self,
        size: int = 65536,
        dim: int = 128,
        *,
        init: Init = "random",
        dtype: torch.dtype | None = None,
        gather_distributed: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _checks.require_positive_int("size", size)
        _checks.require_positive_int("dim", dim)
        _checks.require_choice("init", init, INITS)
        self.gather_distributed = _checks.require_bool("gather_distributed", gather_distributed)
        self.process_group = _distributed.require_group(process_group)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"dtype: got {dtype!r}, expected float16, bfloat16, float32 or float64")
        self.init = init
        self._synchronised_in: weakref.ref[dist.ProcessGroup] | None = None
        self.register_buffer("rows", torch.empty(size, dim, dtype=dtype))
        self.register_buffer("position", torch.empty((), dtype=torch.int64))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts anew, as `init` says: what deferred initialisation calls after `to_empty`."""
        self.position.zero_()
        self.count.zero_()
        self.rows.zero_()
        if self.init == "random":
            drawn = torch.randn(self.rows.shape, dtype=accumulation_dtype(self.rows), device=self.rows.device)
            self.rows.copy_(normalize_keys(drawn, self.rows.dtype))
            self.count.fill_(self.size)
        self._synchronised_in = None

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def enqueue(self, keys: Tensor) -> None:
        """Normalises keys and writes them over the oldest rows.

        Wraps exactly. Of more than `size` rows the newest stay. Never makes the host wait for a device. A key that is
        not finite enters as a zero row, so that one overflowing batch costs one step, not size / n of them. The loss
        before may still wait for its backward(), unless activation checkpointing computes it again there: then enqueue
        after backward().

        In a process group every rank must call it, and ends with the keys of all ranks in rank order. The first call
        in a group, and the first after load_state_dict on any rank, also copies the buffers of the group's first rank
        to the others: random starts and checkpoints loaded on that rank alone differ between ranks.

        Args:
            keys: (n, dim), any float dtype and strides; n may be 0, and may differ between calls and between ranks.

        Raises:
            TypeError: keys is not a floating-point tensor.
            ValueError: Shape or device of keys do not fit, the queue is on the meta device, the ranks' queues differ,
                or they gather inside DistributedDataParallel.join(). An error on one rank raises on all.
            RuntimeError: It is called inside a backward pass, where activation checkpointing repeats what it wraps, or
                in a replica that nn.DataParallel made.
        """
        rows, position, count = self.rows, self.position, self.count
        traced = _tracing.is_traced(rows)
        if not traced and in_backward():
            raise RuntimeError(
                "enqueue: got a call inside backward(), where activation checkpointing runs again what it wraps, so "
                "that keys would enter twice; call enqueue outside of the checkpoint"
            )
        if self._is_replica:
            raise RuntimeError(
                "enqueue: got a call inside torch.nn.DataParallel, which throws away what its replicas write, so that "
                "keys would be lost; use DistributedDataParallel, or enqueue the gathered keys outside of it"
            )
        group = _distributed.group_of(self.process_group) if self.gather_distributed else None
        if group is None:
            unit = _unit_keys(keys, rows)
        else:
            unit = _distributed.outside_graphs(self._unit_keys_of_all_ranks)(keys, group)
        size, written = rows.shape[0], unit.shape[0]
        if not traced and rows.is_cpu:  # where the host may look: a third of the time of what follows
            start, existing = int(position), int(count)
            if not (0 <= start < size and 0 <= existing <= size):
                raise ValueError(
                    f"position and count: got {start} and {existing}, expected places in {size} rows; the queue was "
                    "not initialised: call reset_parameters()"
                )
            if start + written <= size:
                rows[start : start + written].copy_(unit)
                position.fill_((start + written) % size)
                if existing < size:
                    count.fill_(min(existing + written, size))
                return
        skipped = max(0, written - size)
        # Positions stay on the device: reading them on the host would wait for it at every step.
        target = torch.arange(skipped, written, device=unit.device).add_(position).remainder_(size)
        rows.index_put_((target,), unit[skipped:])  # index_copy_ has no MPS kernel in older torch
        position.add_(written).remainder_(size)
        count.add_(written).clamp_(max=size)

    def _unit_keys_of_all_ranks(self, keys: Tensor, group: dist.ProcessGroup) -> Tensor:
        synchronised = self._synchronised_in is not None and self._synchronised_in() is group
        unit, headers = _distributed.announce(
            lambda: _unit_keys(keys, self.rows), group, size=self.size, synchronised=synchronised
        )
        if not all(header.synchronised for header in headers):
            _distributed.send_from_first([self.rows, self.position, self.count], group)
            self._synchronised_in = weakref.ref(group)
        return _distributed.gather(unit, [header.keys for header in headers], group)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Takes all three buffers or none: the count and position of another queue's rows would be wrong here."""
        *_, missing_keys, _, error_msgs = rest
        buffers = {prefix + name: buffer for name, buffer in self.named_buffers()}
        missing = [name for name in buffers if name not in state_dict]
        mismatches = [
            f"size mismatch for {name}: copying a param with shape {tuple(state_dict[name].shape)} from checkpoint, "
            f"the shape in current model is {tuple(buffer.shape)}."
            for name, buffer in buffers.items()
            if name in state_dict and state_dict[name].shape != buffer.shape
        ]
        missing_keys += missing
        error_msgs += mismatches
        if missing or mismatches:
            return
        rows, position, count = (state_dict[name] for name in buffers)
        if not rows.is_meta and not _tracing.is_traced(rows):
            end, existing = int(position), int(count)
            if not 0 <= existing <= self.size or end != (existing if existing < self.size else end % self.size):
                error_msgs.append(
                    f"{prefix}count and {prefix}position: got {existing} and {end}, which do not belong to these "
                    f"{self.size} rows; load rows, position and count of one queue, or none of them."
                )
                return
            length = _checks.find_length(rows[:existing])
            if length is not None:
                warnings.warn(
                    f"{prefix}rows: got a row of length {length:.3g}, expected unit rows; averaging of buffers spoils "
                    "a queue: give AveragedModel or EMAWeightAveraging use_buffers=False",
                    stacklevel=2,
                )
        self._synchronised_in = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> MomentumQueue:
        """Shares the process group, which cannot be copied, and has yet to be synchronised in it."""
        twin = type(self).__new__(type(self))
        memo |= {id(self): twin, id(self.process_group): self.process_group}
        twin.__dict__ = copy.deepcopy(self.__dict__ | {"_synchronised_in": None}, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            expected = "expected None; save the state_dict, not the module"
            raise TypeError(f"process_group: got a process group, which cannot be pickled, {expected}")
        return self.__dict__ | {"_synchronised_in": None}

    def extra_repr(self) -> str:
        sizes = f"size={self.size}, dim={self.dim}, init={self.init!r}, dtype={self.rows.dtype}"
        return f"{sizes}, gather_distributed={self.gather_distributed}"


def _unit_keys(keys: Tensor, rows: Tensor) -> Tensor:
    """Checked keys as they are written into `rows`."""
    _checks.require_float("keys", keys)
    if keys.ndim != 2 or keys.shape[1] != rows.shape[1]:
        hint = "; of a Projection enqueue `pooled`, one vector per image" if keys.ndim > 2 else ""
        raise ValueError(f"keys: got shape {_checks.shape_of(keys)}, expected (n, {rows.shape[1]}){hint}")
    _checks.require_same_device("keys", keys, "the queue", rows)
    _checks.require_values("keys", keys)
    keys = keys.detach() if keys.requires_grad else keys  # no_grad() takes longer
    return normalize_keys(keys, rows.dtype).nan_to_num_(0.0)  # a row that is not finite is all NaN
