"""The queue of negatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from densecl_ops import _checks, _distributed
from densecl_ops._numerics import normalize, to_unit_rows

INITS = ("random", "empty")


class MomentumQueue(nn.Module):
    """First-in, first-out store of unit rows that serve as negatives (MoCo, arXiv 1911.05722).

    Pass it to the loss as `negatives`, and enqueue after the loss, so that a batch is not among its own negatives.

    Buffers, all in the state_dict: `rows` (size, dim); `position`, 0-d int64, where the next row goes; `count`, 0-d
    int64, how many rows are negatives (the first `count` ones).

    Args:
        size: K, rows kept. Default 65,536.
        dim: Channels of a row, D. Default 128.
        init: "random" (default), the paper's start: random unit rows are negatives from step 1. "empty" ignores rows
            not written yet, so that only real keys are ever negatives; the loss then starts at 0, for want of any.
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

    def __init__(
        self,
        size: int = 65536,
        dim: int = 128,
        *,
        init: str = "random",
        dtype: torch.dtype | None = None,
        gather_distributed: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _checks.require_positive_int("size", size)
        _checks.require_positive_int("dim", dim)
        _checks.require_choice("init", init, INITS)
        _checks.require_bool("gather_distributed", gather_distributed)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"dtype: got {dtype!r}, expected float16, bfloat16, float32 or float64")
        self.gather_distributed = gather_distributed
        self._membership = _distributed.Membership(process_group)
        rows = torch.zeros(size, dim) if init == "empty" else normalize(torch.randn(size, dim), dim=1)
        self.register_buffer("rows", rows.to(dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.tensor(0 if init == "empty" else size))

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return self._membership.process_group

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Normalises keys and writes them over the oldest rows.

        Wraps exactly. Of more than `size` rows the newest stay. Never makes the host wait for a device.

        In a process group every rank must call it, and ends with the keys of all ranks in rank order. The first call
        in a group, and the first after load_state_dict on any rank, also copies the buffers of the group's first rank
        to the others: random starts and checkpoints loaded on that rank alone differ between ranks.

        Args:
            keys: (n, dim), any float dtype and strides; n may be 0, and may differ between calls and between ranks.

        Raises:
            TypeError: keys is not a floating-point tensor.
            ValueError: keys has another shape or device than the queue, or the ranks' queues differ in size, dim or
                dtype. In a process group an error on one rank raises on all, and nothing is written.
        """
        group = _distributed.group_of(self.process_group) if self.gather_distributed else None
        if group is None:
            rows = self._unit_rows(keys)
        else:
            rows = _distributed.outside_graphs(self._rows_of_all_ranks)(keys, group)
        written = rows.shape[0]
        skipped = max(0, written - self.size)
        # Positions stay on the device: reading them on the host would wait for it at every step.
        target = torch.arange(skipped, written, device=rows.device).add_(self.position).remainder_(self.size)
        self.rows.index_copy_(0, target, rows[skipped:])
        self.position.add_(written).remainder_(self.size)
        self.count.add_(written).clamp_(max=self.size)

    def _unit_rows(self, keys: Tensor) -> Tensor:
        _checks.require_float("keys", keys)
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys: got shape {_checks.shape_of(keys)}, expected (n, {self.dim})")
        _checks.require_same_device("keys", keys, "the queue", self.rows)
        return to_unit_rows(keys, self.rows.dtype)

    def _rows_of_all_ranks(self, keys: Tensor, group: dist.ProcessGroup) -> Tensor:
        with _distributed.telling_failure(group):
            rows = self._unit_rows(keys)
            _distributed.require_device("keys", rows, group)
        header = _distributed.Header(
            rows=rows.shape[0],
            equal=self._membership.is_equal_in(group),
            size=self.size,
            dim=self.dim,
            dtype=_checks.FLOAT_DTYPES.index(rows.dtype),
        )
        headers = _distributed.exchange(header, group)
        if not all(other.equal for other in headers):
            _distributed.send_from_first([self.rows, self.position, self.count], group)
            self._membership.set_equal_in(group)
        return _distributed.gather_rows(rows, [other.rows for other in headers], group)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._membership.set_equal_in(None)
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, dim={self.dim}, dtype={self.rows.dtype}, gather_distributed={self.gather_distributed}"
        )
