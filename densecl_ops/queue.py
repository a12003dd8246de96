"""The queue of negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densecl_ops import _checks, _distributed
from densecl_ops._numerics import accumulation_dtype, no_autocast, normalize

INITS = ("random", "empty")


class MomentumQueue(nn.Module):
    """First-in, first-out store of unit rows that serve as negatives (MoCo, arXiv 1911.05722).

    Pass it to the loss as `negatives`, and enqueue after the loss, so that a batch is not among its own negatives.

    Buffers, all in the state_dict: `rows` (size, dim); `position`, 0-d int64, where the next row goes; `count`, 0-d
    int64, how many rows are negatives (the first `count` ones).

    Args:
        size: K, rows kept. Default 65,536.
        dim: D. Default 128.
        init: "random" (default), the paper's start: random unit rows are negatives from step 1. "empty" ignores rows
            not written yet, so that only real keys are ever negatives; the loss then starts at 0, for want of any.
        dtype: Of `rows`: float32, float64, bfloat16 or float16. Default: torch's default dtype.
        gather_distributed: Whether `enqueue` gathers the keys of every rank once torch.distributed is initialised.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

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

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Normalises keys and writes them over the oldest rows.

        Wraps exactly. Of more than `size` rows the newest stay. Never makes the host wait for a device; in a
        process group every rank must call it, and ends with the keys of all ranks in rank order.

        Args:
            keys: (n, dim), any float dtype and strides; n may be 0, and may differ between calls and between ranks.

        Raises:
            TypeError: keys is not a floating-point tensor.
            ValueError: keys has another shape or device than the queue.
        """
        _checks.require_float("keys", keys)
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys: got shape {_checks.shape_of(keys)}, expected (n, {self.dim})")
        _checks.require_same_device("keys", keys, "the queue", self.rows)
        with no_autocast(keys):
            rows = normalize(keys.to(accumulation_dtype(keys)), dim=1).to(self.rows.dtype)
            if self.gather_distributed and _distributed.world_size() > 1:
                rows = _distributed.gather_rows(rows)
            written = rows.shape[0]
            skipped = max(0, written - self.size)
            # Positions stay on the device: reading them on the host would wait for it at every step.
            target = torch.arange(skipped, written, device=rows.device).add_(self.position).remainder_(self.size)
            self.rows.index_copy_(0, target, rows[skipped:])
            self.position.add_(written).remainder_(self.size)
            self.count.add_(written).clamp_(max=self.size)

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, dim={self.dim}, dtype={self.rows.dtype}, gather_distributed={self.gather_distributed}"
        )
