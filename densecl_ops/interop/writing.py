"""From a Checkpoint to another project's file."""

from os import PathLike, fspath
from typing import Any

import torch

from densecl_ops import _checks
from densecl_ops.interop.checkpoint import Checkpoint, State, raise_all
from densecl_ops.interop.names import ALL_PARTS, FORMATS, WRITTEN, renamed

SAME_PARAMETER_ORDER = {"densecl", "mmpretrain"}  # so that an optimizer's numbers mean the same
CARRIED = ("encoder_k.steps", "data_preprocessor.")  # beginnings of what mmpretrain alone needs


def write_checkpoint(
    checkpoint: Checkpoint,
    path: str | PathLike[str] | None = None,
    format: str | None = None,  # noqa: A002
    *,
    prefix: str | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint in another project's names. What that project has no place for is refused, not dropped.

    Two exceptions: "backbone" leaves all else out; encoder_k.steps and data_preprocessor.* exist in "mmpretrain" only.
    There, encoder_k.steps is 1 where the source has none: at 0 the first step would overwrite the key encoder.

    Args:
        checkpoint: From read_checkpoint or Checkpoint.from_modules.
        path: Where to save. Default None: nowhere.
        format: "densecl" (the official code, mmselfsup 0.x), "mmpretrain" (mmselfsup 1.x too), "moco" (v2), or
            "backbone": the backbone's own names, and nothing else. Default: the one that was read, whose entries are
            then written back bit for bit; "densecl" for the state of live modules.
        prefix: Put before all names. Default None: the source's where the format is the same; else "module." for
            "moco", which trains under DistributedDataParallel only, and none for the others.

    Returns:
        What was saved: checkpoint.extra and "state_dict", or a state dict alone for "backbone" and for sources that
        were one. Its tensors are the checkpoint's own, but for the queues.

    Raises:
        TypeError: checkpoint or prefix has the wrong type.
        ValueError: format is none of these, a part is missing, or one cannot be held: a dense branch or queue in
            MoCo's, a norm layer in any head, a queue that is not full yet, another project's optimizer state.

    Example:
        >>> from densecl_ops.interop import read_checkpoint, write_checkpoint
        >>> weights = {"conv1.weight": torch.ones(64, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(64, 64, 1, 1)}
        >>> checkpoint = read_checkpoint({f"module.encoder_q.{name}": weight for name, weight in weights.items()})
        >>> list(write_checkpoint(checkpoint))
        ['module.encoder_q.conv1.weight', 'module.encoder_q.layer1.0.conv1.weight']
        >>> list(write_checkpoint(checkpoint, format="backbone"))
        ['conv1.weight', 'layer1.0.conv1.weight']
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"checkpoint: got {type(checkpoint).__name__}, expected a Checkpoint")
    if format is None:
        format = "densecl" if checkpoint.format == "densecl_ops" else checkpoint.format  # noqa: A001
    _checks.require_choice("format", format, (*WRITTEN, "backbone"))
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix: got {type(prefix).__name__}, expected a str or None")
    if format != "backbone":
        written = _training_state(checkpoint, format, prefix)
    elif checkpoint.backbone_q is None:
        raise ValueError(f"backbone_q: got a checkpoint ({checkpoint.format}) without it, expected one that has it")
    else:
        written = {(prefix or "") + name: x for name, x in checkpoint.backbone_q.items() if not name.startswith("fc.")}
    if path is not None:
        torch.save(written, fspath(path))
    return written


def _training_state(checkpoint: Checkpoint, format: str, prefix: str | None) -> dict[str, Any]:  # noqa: A002
    table, source, same = FORMATS[format], checkpoint.format, checkpoint.format == format
    if prefix is None:
        prefix = checkpoint.prefix if same else table.prefix
    state: State = {}
    problems: list[str] = []
    for part in ALL_PARTS:
        entries: State | None = getattr(checkpoint, part)
        held = any(ours.startswith(part) for ours in table.theirs)
        if entries is None:
            problems += [f"{part}: got None, expected its entries"] if held and not same else []
            continue
        if part.endswith("queue") and held:
            rows, position, count = (entries[name] for name in ("rows", "position", "count"))
            if int(count) != len(rows):  # the others take every row as a negative
                problems.append(f"{part}.count: got {int(count)} of {len(rows)} rows, expected a full queue")
            entries = {"rows": rows.t().contiguous(), "position": position.reshape(1).clone()}  # theirs are (D, K)
        for name, value in entries.items():
            theirs = renamed(f"{part}.{name}", table.theirs)
            if theirs is None or (part.startswith("backbone") and name.startswith("fc.")):
                problems.append(f"{part}.{name}: got an entry that the format has no place for, expected none")
            else:
                state[theirs] = value
    if not same:  # what only the project that wrote it understands
        understood = source == "densecl_ops" or {source, format} <= SAME_PARAMETER_ORDER
        unmapped = [x for x in checkpoint.unmapped if not x.removeprefix(checkpoint.prefix).startswith(CARRIED)]
        problems += [
            f"{field}: got {', '.join(map(str, names[:3]))} of a {source} run, expected none: "
            f"dataclasses.replace(checkpoint, {field}={{}}) drops them"
            for field, names in (("extra", [] if understood else list(checkpoint.extra)), ("unmapped", unmapped))
            if names
        ]
    raise_all(f"checkpoint as {format!r}", problems)

    if format == "densecl":
        state |= {f"backbone.{name}": value for name, value in (checkpoint.backbone_q or {}).items()}
    if format == "mmpretrain" and not same:
        state["encoder_k.steps"] = torch.tensor(1, device="cpu")
    written: dict[str, Any] = {prefix + name: value for name, value in state.items()}
    if not same:
        return {**checkpoint.extra, "state_dict": written}
    for name, value in checkpoint.unmapped.items():
        inside = name.startswith(checkpoint.prefix)
        written[prefix + name.removeprefix(checkpoint.prefix) if inside else name] = value
    return written if checkpoint.key is None else {**checkpoint.extra, checkpoint.key: written}
