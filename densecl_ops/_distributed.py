"""Keys over a process group: what is said before they travel, and how they travel.

Every rank first tells the others, over the host, how many keys it holds and of what kind, or that it is about to raise.
So a mistake on one rank raises on all of them, where a gather begun anyway would hang or mix up bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from densecl_ops import _checks

P = ParamSpec("P")
T = TypeVar("T")

_host_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


class Header(NamedTuple):
    """What a rank says of its keys. Ranks must agree on dim, dtype, requires_grad and size."""

    failed: int = 0  # 1: this rank is about to raise, and sends no keys
    keys: int = 0  # how many
    dim: int = 0
    dtype: int = 0  # place in _checks.FLOAT_DTYPES
    requires_grad: int = 0
    size: int = 0  # of the queue; 0: there is none
    synchronised: int = 1  # 0: this rank's queue may differ from the others'

    def describe(self, field: str) -> str:
        return f"{field} {_checks.FLOAT_DTYPES[self.dtype] if field == 'dtype' else getattr(self, field)}"


def require_group(process_group: Any) -> dist.ProcessGroup | None:
    """Passes None and a process group that this process is in."""
    if process_group is None or (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        return process_group
    if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: got a group that this process is not in, expected one of its own groups")
    raise TypeError(f"process_group: got {type(process_group).__name__}, expected a torch.distributed.ProcessGroup")


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to gather over; None where this process has nobody to gather from."""
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError("process_group: got a group that has been destroyed, expected one in use")
        return None
    group = dist.group.WORLD if process_group is None else process_group
    try:
        dist.get_rank(group)
    except ValueError:  # of an earlier init_process_group
        raise ValueError("process_group: got a group that has been destroyed, expected one in use") from None
    return group if dist.get_world_size(group) > 1 else None


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Has torch.compile break its graph here, once, instead of tracing into collectives. No import of the compiler."""
    if not torch.compiler.is_compiling():
        return function
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call,no-any-return]


def announce(prepare: Callable[[], Tensor], group: dist.ProcessGroup, **said: int) -> tuple[Tensor, list[Header]]:
    """Makes this rank's (n, D) keys by `prepare` and tells every rank of them, with `said` as further fields.

    Returns the keys, and all Headers in rank order. Raises on every rank if one raises, if the group does not serve its
    keys' device, or if the ranks do not agree.
    """
    _require_no_join()
    try:
        keys = prepare()
        devices = _devices_of(group)
        if keys.device.type not in devices:
            raise ValueError(
                f"keys: got a tensor on {keys.device}, expected one on {' or '.join(devices)}, "
                "which the backend of the process group serves"
            )
    except Exception:
        _all_headers(Header(failed=1), group)
        raise
    dtype = _checks.FLOAT_DTYPES.index(keys.dtype)
    headers = _all_headers(Header(0, len(keys), keys.shape[1], dtype, keys.requires_grad, **said), group)
    failed = ", ".join(f"rank {rank}" for rank, other in enumerate(headers) if other.failed)
    if failed:
        raise ValueError(
            f"keys: got an error on {failed} of the process group (raised there), expected keys that fit on every rank"
        )
    agreed = ("dim", "dtype", "requires_grad", "size")
    unequal = [field for field in agreed if len({getattr(other, field) for other in headers}) > 1]
    if unequal:
        seen = (
            f"{' and '.join(other.describe(field) for field in unequal)} on rank {rank}"
            for rank, other in enumerate(headers)
        )
        raise ValueError(f"keys: got {', '.join(seen)}, expected the same on every rank of the process group")
    return keys, headers


def _require_no_join() -> None:
    """In join(), ranks that have run out of batches answer DistributedDataParallel alone: the others would wait here.

    With throw_on_early_termination it raises on all of them before they come here. torch tells nobody outside of its
    Joinable classes whether a join() is on, so two private attributes are asked, and their lack is no error.
    """
    parallel = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)  # whose forward runs
    config = getattr(parallel, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise ValueError(
            "keys: got a gather inside DistributedDataParallel.join(), in which ranks without a batch take no part, "
            "expected equal numbers of batches and no join(), or gather_distributed=False"
        )


def gather(keys: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Concatenates the (n, D) keys of every rank in rank order; n, known from `sizes`, may differ and be 0."""
    largest = max(sizes)
    if largest == 0:
        return keys
    padded = torch.nn.functional.pad(keys, (0, 0, 0, largest - keys.shape[0])).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def send_from_first(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Overwrites the tensors of every rank with those of the group's first rank."""
    for tensor in tensors:
        sent = tensor.contiguous()  # gloo sends memory as it lies, which ranks may have in other orders
        dist.broadcast(sent, src=dist.get_global_rank(group, 0), group=group)
        if sent is not tensor:
            tensor.copy_(sent)


def _all_headers(header: Header, group: dist.ProcessGroup) -> list[Header]:
    """Over a host group: sizes that travelled through a GPU would have to be waited for."""
    mine = torch.tensor(header, dtype=torch.int64, device="cpu")  # whatever the default device is
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=_host_group(group))
    return [Header(*one.tolist()) for one in every]


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group itself where it serves host tensors; else a gloo twin, which its own ranks make at the first need."""
    if "cpu" in _devices_of(group):
        return group
    if group not in _host_groups:
        ranks = dist.get_process_group_ranks(group)
        _host_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _host_groups[group]


def _devices_of(group: dist.ProcessGroup) -> list[str]:
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
