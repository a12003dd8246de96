"""From another project's file to a Checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from os import PathLike, fspath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ops import _checks
from densecl_ops.head import DenseProjectionHead
from densecl_ops.interop.checkpoint import Checkpoint, State, raise_all
from densecl_ops.interop.formats import (
    FORMATS,
    TABLES,
    Format,
    detect,
    lightly_table,
    strip_wrappers,
    without_wrappers,
)

ONE_LINEAR = (
    "encoder_q.fc.weight: got the single Linear of MoCo v1, expected the two layers fc.0 and fc.2 of MoCo v2, the only "
    'head that fits ours; format="backbone" with prefix="{prefix}encoder_q." reads the backbone alone'
)
NOT_PLAIN = (
    "{path}: got a file that torch.load(weights_only=True) refuses ({reason}), expected tensors and plain values only. "
    "If you trust it, save its plain part where it was written:\n"
    '  c = torch.load("old.pth", map_location="cpu", weights_only=False)\n'
    '  torch.save({{k: c[k] for k in ("state_dict", "meta", "optimizer", "epoch") if k in c}}, "plain.pth")'
)


def read_checkpoint(
    source: str | PathLike[str] | Mapping[str, Any],
    format: str = "auto",  # noqa: A002
    *,
    prefix: str | None = None,
) -> Checkpoint:
    """Reads a checkpoint of DenseCL, mmselfsup, mmpretrain, MoCo or lightly, or a plain ResNet.

    Args:
        source: A file, read with torch.load(weights_only=True) onto the CPU, or what is in it: a state dict, or a
            mapping with one under "state_dict" or "model". Tensors of a mapping are not copied, but for the queues.
        format: "densecl" (the official code, mmselfsup 0.x), "mmpretrain" (mmselfsup 1.x too), "moco" (v2), "lightly",
            or one of our recipes by the name of its file: "with_moco", "moco_loop", ... (both
            of lightly: "with_lightly"). "backbone": plain ResNet names,
            or the query backbone alone of any of these, all else being `unmapped`. Default "auto": told from the names.
        prefix: What stands before all names of the model, such as "model."; entries outside it go to `unmapped`.
            Default None: "module." (DistributedDataParallel) and "_orig_mod." (torch.compile) are taken off. Inside
            names, what torch.compile, activation checkpointing and FSDP put there is taken out in any case.

    Returns:
        Checkpoint. `write_checkpoint` with its format gives back the same entries bit for bit; lightly's is read only.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: source, format or prefix has the wrong type.
        ValueError: The file holds more than weights_only allows, the format is not recognised, or entries are missing,
            unexpected, misshapen or contradict each other: all of them in one message.

    Example:
        >>> import torch
        >>> from densecl_ops.interop import read_checkpoint
        >>> weights = {"conv1.weight": torch.randn(64, 3, 7, 7), "bn1.weight": torch.ones(64)}
        >>> read_checkpoint({"state_dict": {f"backbone.{name}": w for name, w in weights.items()}})
        Checkpoint(format='backbone', backbone_q=2 entries)
    """
    _checks.require_choice("format", format, ("auto", *FORMATS))
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix: got {type(prefix).__name__}, expected a str or None")
    content = source if isinstance(source, Mapping) else _load(source)
    key = "state_dict" if "state_dict" in content else "model" if isinstance(content.get("model"), Mapping) else None
    state = content if key is None else content[key]
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict: got {type(state).__name__}, expected a mapping of names to tensors")
    wrong = [f"{name}: got {type(x).__name__}, expected a tensor" for name, x in state.items() if not _entry(name, x)]
    raise_all("checkpoint", wrong)

    prefix = strip_wrappers(state) if prefix is None else prefix
    if format in ("auto", "backbone") and state and all(name.startswith(f"{prefix}backbone.") for name in state):
        prefix += "backbone."  # how OpenMMLab publishes a backbone
    inside = _below(prefix, state)
    if not inside:
        raise ValueError(f"prefix: got {prefix!r}, expected one of the {len(state)} names to begin with it")
    found = detect(inside) if format in ("auto", "backbone") else format
    if format == "auto" and found is None:
        raise ValueError(_not_recognised(inside))
    if found == "moco" and format != "backbone" and "encoder_q.fc.weight" in inside:
        raise ValueError(ONE_LINEAR.format(prefix=prefix))
    table = lightly_table(inside) if found == "lightly" else TABLES[found or format]
    if format == "backbone":
        before, table = _backbone_of(table, inside)
        prefix, inside = prefix + before, _below(prefix + before, state)

    parts, carried, problems = take_apart(inside, table)
    raise_all(f"{table.name} checkpoint", problems)
    return Checkpoint(
        format=table.name,
        **parts,
        extra={} if key is None else {name: value for name, value in content.items() if name != key},
        unmapped={name: value for name, value in state.items() if not name.startswith(prefix)}
        | {prefix + name: value for name, value in carried.items()},
        prefix=prefix,
        key=key,
    )


def _backbone_of(table: Format, names: Collection[str]) -> tuple[str, Format]:
    """What stands before the query backbone of a training checkpoint, and a table of nothing else."""
    pairs = table.names["backbone_q"]
    before = pairs.get("", "backbone.")  # lightly's may have a name for every child instead
    if not any(name.startswith(before) for name in names):
        return "", TABLES["backbone"]
    below = {mine: theirs.removeprefix(before) for mine, theirs in pairs.items()}
    return before, replace(TABLES["backbone"], names={"backbone_q": below})


def _below(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The entries under a prefix, without it and without the names of wrappers."""
    below = [name for name in state if name.startswith(prefix)]
    inside = {without_wrappers(name.removeprefix(prefix)): state[name] for name in below}
    if len(inside) != len(below):
        raise ValueError("checkpoint: got entries with and without the names of wrappers, expected each of them once")
    return inside


def take_apart(state: Mapping[str, Tensor], table: Format) -> tuple[dict[str, State], State, list[str]]:
    """Parts in our names, entries kept apart, and everything wrong in their names."""
    parts: dict[str, State] = {}
    carried: State = {}
    problems: list[str] = []
    copies: State = {}
    for name, value in state.items():
        place = table.locate(name)
        if place is not None:
            parts.setdefault(place[0], {})[place[1]] = value
        elif table.repeats is not None and name.startswith(table.repeats):
            copies[name.removeprefix(table.repeats)] = value
        elif table.ours or table.carries(name):
            carried[name] = value
        else:
            problems.append(f"{name}: got shape {_checks.shape_of(value)}, expected no entry of this name")
    problems += [
        f"{part}: got no entry, expected {_example(part, table)}" for part in table.required if part not in parts
    ]
    if table.ours:
        return parts, carried, problems  # load_into compares them with the modules, entry by entry
    for part in [part for part in parts if part.startswith("head")]:
        if table.name == "lightly":
            parts[part] = _as_our_head(parts[part], table.normed)
        problems += _unlike_a_head(parts[part], part, table)
    for part in ("backbone", "head"):
        problems += _differences(parts.get(f"{part}_q"), parts.get(f"{part}_k"), f"{part}_k", table)
    if table.repeats is not None:
        problems += _unequal_copies(parts.get("backbone_q", {}), copies, table.repeats, table)
    last = parts.get("head_q", {}).get(_last_layer(table))
    dim = last.shape[0] if last is not None and last.ndim == 2 else None
    for part in [part for part in parts if part.endswith("queue")]:
        rows, wrong = _queue(parts[part], part, dim, table)
        problems += wrong
        parts[part] = rows
    return parts, carried, problems


def head_shapes(in_channels: int, hidden_channels: int, out_channels: int, normed: bool) -> dict[str, tuple[int, ...]]:
    """Entries of a DenseProjectionHead and their shapes."""
    with torch.device("meta"):
        norm_layer = nn.BatchNorm2d if normed else None
        head = DenseProjectionHead(in_channels, hidden_channels, out_channels, norm_layer=norm_layer)
    return {name: tuple(x.shape) for name, x in head.state_dict().items()}


def _last_layer(table: Format) -> str:
    return "image_mlp.5.weight" if table.normed else "image_mlp.2.weight"


def _as_our_head(state: State, normed: bool) -> State:
    """The two exact conversions that lightly's heads need."""
    ours = dict(state)
    for name, value in state.items():
        if name.startswith("dense_mlp.") and name.endswith(".weight") and value.ndim == 2:
            ours[name] = value[:, :, None, None]  # a Linear over the positions is a 1x1 conv
        elif normed and name in ("image_mlp.0.weight", "dense_mlp.0.weight") and value.ndim >= 1:
            bias = name.replace("weight", "bias")  # lightly has none before a norm; ours starts at 0, the same map
            ours.setdefault(bias, value.new_zeros(value.shape[0]))
    return ours


def _unlike_a_head(state: State, part: str, table: Format) -> list[str]:
    """Compares names and shapes with those of a DenseProjectionHead of the same sizes."""
    ends = "image_mlp.0.weight", _last_layer(table)
    first, last = (state.get(name) for name in ends)
    if first is None or last is None or first.ndim != 2 or last.ndim != 2 or 0 in (*first.shape, *last.shape):
        names = " and ".join(table.name_of(part, name) for name in ends)
        return [f"{names}: got {_shape(first)} and {_shape(last)}, expected (hidden, C) and (D, hidden)"]
    layout = head_shapes(first.shape[1], first.shape[0], last.shape[0], table.normed)
    expected = {name: shape for name, shape in layout.items() if table.holds(part, name)}
    problems = [
        f"{table.name_of(part, name)}: got {_shape(state.get(name))}, expected {shape}"
        for name, shape in expected.items()
        if name not in state or state[name].shape != shape
    ]
    return problems + [
        f"{table.name_of(part, name)}: got {_shape(value)}, expected no entry of this name"
        for name, value in state.items()
        if name not in expected
    ]


def _differences(query: State | None, key: State | None, part: str, table: Format) -> list[str]:
    """The key side has the names and shapes of the query side, or does not exist."""
    if query is None or key is None:
        return []
    shapes = {name: (_shape(query.get(name)), _shape(key.get(name))) for name in {**query, **key}}
    return [
        f"{table.name_of(part, name)}: got {k}, expected {q} as on the query side"
        for name, (q, k) in shapes.items()
        if q != k
    ]


def _unequal_copies(query: State, copies: State, repeats: str, table: Format) -> list[str]:
    source = table.name_of("backbone_q", "")
    problems = []
    for name in {**query, **copies}:
        one, other = query.get(name), copies.get(name)
        if one is None or other is None or one.shape != other.shape:
            problems.append(f"{repeats}{name}: got {_shape(other)}, expected {_shape(one)}, a copy of {source}{name}")
        elif not _same_bits(one, other):
            problems.append(f"{repeats}{name}: got other values than {source}{name}, expected a copy of it")
    return problems


def _queue(state: State, part: str, dim: int | None, table: Format) -> tuple[State, list[str]]:
    """The (D, K) rows and the position of another project as the state of a MomentumQueue."""
    names = table.name_of(part, "rows"), table.name_of(part, "position")
    rows, position = state.get("rows"), state.get("position")
    problems = []
    if rows is None or rows.ndim != 2 or not rows.is_floating_point() or dim not in (None, *rows.shape):
        problems.append(f"{names[0]}: got {_shape(rows)}, expected ({dim or 'D'}, K) floats")
    elif table.name == "lightly" and dim is not None and rows.shape[1] == dim:
        if rows.shape[0] == dim:
            problems.append(f"{names[0]}: got {_shape(rows)}, expected K other than D to tell (K, D) from (D, K)")
        rows = rows.t()  # lightly turned its bank from (D, K) to (K, D)
    elif dim is not None and rows.shape[0] != dim:
        problems.append(f"{names[0]}: got {_shape(rows)}, expected ({dim}, K)")
    if position is None or position.dtype != torch.int64 or position.shape != (1,):
        kind = "" if position is None else f" {position.dtype}"
        problems.append(f"{names[1]}: got {_shape(position)}{kind}, expected (1,) int64")
    elif rows is not None and not problems and not 0 <= int(position) < rows.shape[1]:
        problems.append(f"{names[1]}: got {int(position)}, expected 0 to {rows.shape[1] - 1}")
    if problems or rows is None or position is None:
        return state, problems
    rows = rows.t().contiguous()
    return {"rows": rows, "position": position.reshape(()).clone(), "count": position.new_tensor(len(rows))}, []


def _load(source: object) -> Mapping[str, Any]:
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, expected a path or a mapping")
    try:
        content = torch.load(fspath(source), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises KeyError, EOFError, RuntimeError and more for what is no checkpoint
        refused = re.search(r"GLOBAL (\S+)|Unsupported .*", str(error)) if isinstance(error, UnpicklingError) else None
        if refused is None:
            raise ValueError(f"{fspath(source)}: got a file that torch cannot read, expected a checkpoint") from error
        raise ValueError(NOT_PLAIN.format(path=fspath(source), reason=refused[1] or refused[0])) from error
    if not isinstance(content, Mapping):
        raise TypeError(f"source: got a file with a {type(content).__name__}, expected a mapping")
    return content


def _entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype and bits: NaN equals itself, 0.0 is not -0.0."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )


def _shape(value: Tensor | None) -> str:
    return "nothing" if value is None else _checks.shape_of(value)


def _example(part: str, table: Format) -> str:
    if part.endswith("queue"):
        return f"{table.name_of(part, 'rows')} and {table.name_of(part, 'position')}"
    first = "image_mlp.0.weight" if part.startswith("head") else "conv1.weight"
    return f"{table.name_of(part, first)} and so on"


def _not_recognised(state: Mapping[str, Tensor]) -> str:
    shown = ", ".join(list(state)[:3])
    inner = next((name for name in state for mark in ("projection_head", "encoder_q.") if f".{mark}" in name), None)
    hint = ""
    if inner is not None:
        start = min(inner.find(mark) for mark in ("projection_head", "encoder_q.") if mark in inner)
        hint = f"; prefix={inner[:start]!r} may be what they lack"
    return f"format: got names such as {shown}, expected those of {', '.join(map(repr, FORMATS))}{hint}"
