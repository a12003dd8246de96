"""From a Checkpoint to another project's file."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks
from densecl_ops.interop.checkpoint import Checkpoint, State, raise_all
from densecl_ops.interop.formats import ALL_PARTS, TABLES, Format
from densecl_ops.interop.reading import head_shapes, take_apart

SAME_PARAMETER_ORDER = ("densecl", "mmpretrain", "densecl_ops")  # so that an optimizer's numbers mean the same


def write_checkpoint(
    checkpoint: Checkpoint,
    path: str | PathLike[str] | None = None,
    format: str | None = None,  # noqa: A002
    *,
    prefix: str | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint in another project's names. What that project has no place for is refused, not dropped.

    Two exceptions: "backbone" is for handing the query backbone on, and leaves the rest out; encoder_k.steps and
    data_preprocessor.* exist in "mmpretrain" only. There, encoder_k.steps is 1 where the source has none: at 0 the
    first step would overwrite the key encoder with the query encoder.

    Args:
        checkpoint: From read_checkpoint or Checkpoint.from_modules.
        path: Where to save. Default None: nowhere.
        format: "densecl" (the official code, mmselfsup 0.x), "mmpretrain" (mmselfsup 1.x too), "moco" (v2),
            "backbone", or one of our recipes by the name of its file: "with_moco", "moco_loop", ... (both of
            lightly: "with_lightly"). Default: the one
            that was read; "densecl" for the state of live modules.
        prefix: Put before all names. Default None: the source's where the format is the same; else "module." for
            "moco" and "with_moco", which train under DistributedDataParallel only, and none for the others.

    Returns:
        What was saved: checkpoint.extra and "state_dict", or a state dict alone for "backbone" and for sources that
        were one. Its tensors are the checkpoint's own, but for the queues.

    Raises:
        TypeError: checkpoint or prefix has the wrong type.
        ValueError: format is none of these, a part is missing, or one cannot be held: a dense branch or queue in
            MoCo's, a norm layer in any head, a queue that is not full yet, another project's optimizer state.

    Example:
        >>> from densecl_ops import DenseProjectionHead, MomentumQueue
        >>> from densecl_ops.interop import Checkpoint, write_checkpoint
        >>> head, queue = DenseProjectionHead(8, 8, 4), MomentumQueue(16, 4)
        >>> backbone = torch.nn.Sequential()
        >>> backbone.conv1 = torch.nn.Conv2d(3, 8, 1, bias=False)
        >>> checkpoint = Checkpoint.from_modules(
        ...     backbone_q=backbone, backbone_k=backbone, head_q=head, head_k=head, image_queue=queue, dense_queue=queue
        ... )
        >>> list(write_checkpoint(checkpoint)["state_dict"])[:5]
        ['queue', 'queue_ptr', 'queue2', 'queue2_ptr', 'encoder_q.0.conv1.weight']
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"checkpoint: got {type(checkpoint).__name__}, expected a Checkpoint")
    if format is None:
        format = "densecl" if checkpoint.format == "densecl_ops" else checkpoint.format  # noqa: A001
    _checks.require_choice("format", format, tuple(TABLES))
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix: got {type(prefix).__name__}, expected a str or None")
    table, same = TABLES[format], checkpoint.format == format
    if prefix is None:
        prefix = checkpoint.prefix if same else table.prefix

    parts = {part: getattr(checkpoint, part) for part in ALL_PARTS if getattr(checkpoint, part) is not None}
    if format == "backbone":
        parts = {part: state for part, state in parts.items() if part == "backbone_q"}
    problems = _unholdable(parts, table)
    if not same and format != "backbone":
        problems += _of_the_source(checkpoint, format)
    raise_all(f"checkpoint as {format!r}", problems)

    state = _rename(parts, table)
    raise_all(f"checkpoint as {format!r}", take_apart(state, table)[2])  # what is written must be readable
    if table.counter is not None and not same:
        state[table.counter] = torch.tensor(1, device="cpu")
    written: dict[str, Any] = {prefix + name: value for name, value in state.items()}
    if same:
        inside = _inside(checkpoint)
        outside = {name: x for name, x in checkpoint.unmapped.items() if not name.startswith(checkpoint.prefix)}
        written |= {prefix + name: value for name, value in inside.items()} | outside
    key = checkpoint.key if same else None if format == "backbone" else "state_dict"
    if key is not None:
        written = {**checkpoint.extra, key: written}
    if path is not None:
        torch.save(written, fspath(path))
    return written


def _inside(checkpoint: Checkpoint) -> State:
    """Entries kept apart that stood under the prefix, without it."""
    before = checkpoint.prefix
    return {name.removeprefix(before): x for name, x in checkpoint.unmapped.items() if name.startswith(before)}


def _unholdable(parts: dict[str, State], table: Format) -> list[str]:
    """What this format has no entry for."""
    if table.ours:
        return []
    problems = []
    for part, state in parts.items():
        if part not in table.names:
            problems.append(f"{part}: got {len(state)} entries, expected None, for the format has no place for them")
        elif part.startswith("head"):
            known = [name for name in head_shapes(1, 1, 1, normed=False) if table.holds(part, name)]
            problems += [
                f"{part}.{name}: got an entry, expected none but {', '.join(known)}: the format has no place for it"
                for name in state
                if name not in known
            ]
        elif part.endswith("queue"):
            problems += _unholdable_queue(part, state)
        else:
            problems += [
                f"{part}.{name}: got a classifier, expected a backbone without fc"
                for name in state
                if name.startswith("fc.")
            ]
    return problems


def _unholdable_queue(part: str, state: State) -> list[str]:
    names = ("rows", "position", "count")
    if set(state) != set(names):
        return [f"{part}: got {', '.join(state)}, expected {', '.join(names)}"]
    count, size = int(state["count"]), len(state["rows"])
    if count != size:
        return [
            f"{part}.count: got {count} of {size} rows, expected a full queue, for the format takes all as negatives"
        ]
    return []


def _of_the_source(checkpoint: Checkpoint, format: str) -> list[str]:  # noqa: A002
    """What only the project that wrote it understands."""

    def drop(field: str) -> str:
        how = f"dataclasses.replace(checkpoint, {field}={{}}) drops them"
        return f"of a {checkpoint.format} run, expected none: {how}"

    problems = []
    same_order = {checkpoint.format, format} <= {*SAME_PARAMETER_ORDER}
    if checkpoint.extra and not same_order and checkpoint.format != "densecl_ops":
        problems.append(f"extra: got {', '.join(map(str, checkpoint.extra))} {drop('extra')}")
    table = TABLES.get(checkpoint.format)
    left = [name for name in checkpoint.unmapped if not (table and table.carries(name.removeprefix(checkpoint.prefix)))]
    if left:
        problems.append(f"unmapped: got {', '.join(left[:3])} {drop('unmapped')}")
    return problems


def _rename(parts: dict[str, State], table: Format) -> State:
    """Their names and layouts; our queue rows are (K, D), theirs (D, K)."""
    state: State = {}
    for part, entries in sorted(parts.items(), key=lambda item: _place(item[0])):
        if part.endswith("queue") and not table.ours:
            state[table.name_of(part, "rows")] = entries["rows"].t().contiguous()
            state[table.name_of(part, "position")] = entries["position"].reshape(1).clone()
        else:
            state |= {table.name_of(part, name): value for name, value in entries.items()}
    if table.repeats is not None:
        copies: dict[str, Tensor] = {table.repeats + name: value for name, value in parts.get("backbone_q", {}).items()}
        state |= copies
    return state


def _place(part: str) -> int:
    """The order of nn.Module: buffers of the model itself, then the query encoder, then the key encoder."""
    return ("image_queue", "dense_queue", "backbone_q", "head_q", "backbone_k", "head_k").index(part)
