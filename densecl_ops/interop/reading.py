"""From another project's file to a Checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike, fspath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks
from densecl_ops.interop.checkpoint import Checkpoint, State, raise_all
from densecl_ops.interop.formats import FORMATS, LINEAR, NORM, TABLES, Format, detect, lightly_table, strip_wrappers

LAST_LAYER = {False: "image_mlp.2.weight", True: "image_mlp.5.weight"}  # without and with a norm layer
ONE_LINEAR = (
    "encoder_q.fc.weight: got the single Linear of MoCo v1, expected the two layers fc.0 and fc.2 of MoCo v2, the only "
    'head that fits ours; format="backbone" with prefix="{prefix}encoder_q." reads the backbone alone'
)
NOT_PLAIN = (
    "{path}: got a file that torch.load(weights_only=True) refuses ({reason}), expected tensors and plain values only. "
    "If you trust it, save its plain part where it was written:\n"
    '  c = torch.load("old.pth", map_location="cpu", weights_only=False)\n'
    '  torch.save({{k: c[k] for k in ("state_dict", "optimizer", "epoch") if k in c}}, "plain.pth")'
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
            mapping with one under "state_dict". Tensors of a mapping are not copied, but for the queues.
        format: "densecl" (the official code, mmselfsup 0.x), "mmpretrain" (mmselfsup 1.x too), "moco" (v2), "lightly"
            or "backbone" (plain ResNet names). Default "auto": told from the names.
        prefix: What stands before all names of the model, such as "model."; entries outside it go to `unmapped`.
            Default None: "module." (DistributedDataParallel) and "_orig_mod." (torch.compile) are taken off.

    Returns:
        Checkpoint. `write_checkpoint` with its format gives back the same entries bit for bit ("lightly": read only).

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
    bare = "state_dict" not in content
    state = content if bare else content["state_dict"]
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict: got {type(state).__name__}, expected a mapping of names to tensors")
    wrong = [f"{name}: got {type(x).__name__}, expected a tensor" for name, x in state.items() if not _entry(name, x)]
    raise_all("checkpoint", wrong)

    prefix = strip_wrappers(state) if prefix is None else prefix
    if format in ("auto", "backbone") and state and all(name.startswith(f"{prefix}backbone.") for name in state):
        prefix += "backbone."  # how OpenMMLab publishes a backbone
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not inside:
        raise ValueError(f"prefix: got {prefix!r}, expected one of the {len(state)} names to begin with it")
    found = detect(inside) if format == "auto" else format
    if found is None:
        raise ValueError(_not_recognised(inside))
    if found == "moco" and "encoder_q.fc.weight" in inside:
        raise ValueError(ONE_LINEAR.format(prefix=prefix))

    table = lightly_table(inside) if found == "lightly" else TABLES[found]
    parts, carried, problems = take_apart(inside, table)
    raise_all(f"{found} checkpoint", problems)
    return Checkpoint(
        format=found,
        **parts,
        extra={} if bare else {name: value for name, value in content.items() if name != "state_dict"},
        unmapped={name: value for name, value in state.items() if not name.startswith(prefix)}
        | {prefix + name: value for name, value in carried.items()},
        prefix=prefix,
        bare=bare,
    )


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
        elif table.carries(name):
            carried[name] = value
        else:
            problems.append(f"{name}: got shape {_checks.shape_of(value)}, expected no entry of this name")
    problems += [
        f"{part}: got no entry, expected {_example(part, table)}" for part in table.required if part not in parts
    ]
    for part in [part for part in table.heads if part in parts]:
        problems += _complete_head(parts[part], part, table)
    for part in ("backbone", "head"):
        problems += _differences(parts.get(f"{part}_q"), parts.get(f"{part}_k"), f"{part}_k", table)
    if table.repeats is not None:
        problems += _unequal_copies(parts.get("backbone_q", {}), copies, table.repeats, table)
    last = parts.get("head_q", {}).get(LAST_LAYER[table.normed])
    dim = last.shape[0] if last is not None and last.ndim == 2 else None
    for part in [part for part in table.queues if part in parts]:
        rows, wrong = _queue(parts[part], part, dim, table)
        problems += wrong
        parts[part] = rows
    return parts, carried, problems


def _complete_head(state: State, part: str, table: Format) -> list[str]:
    """Compares a head with what DenseProjectionHead has, after the two exact conversions that lightly's heads need."""
    if table.name == "lightly":
        for name, value in list(state.items()):
            if name.startswith("dense_mlp.") and name.endswith(".weight") and value.ndim == 2:
                state[name] = value[:, :, None, None]  # a Linear over the positions is a 1x1 conv
            elif table.normed and name in ("image_mlp.0.weight", "dense_mlp.0.weight") and value.ndim >= 1:
                bias = name.replace("weight", "bias")  # lightly has none before a norm; ours starts at 0, the same map
                state.setdefault(bias, value.new_zeros(value.shape[0]))
    first, last = (state.get(name) for name in ("image_mlp.0.weight", LAST_LAYER[table.normed]))
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        names = [table.name_of(part, name) for name in ("image_mlp.0.weight", LAST_LAYER[table.normed])]
        return [f"{' and '.join(names)}: got {_shape(first)} and {_shape(last)}, expected (hidden, C) and (D, hidden)"]
    sizes = (first.shape[1], first.shape[0], last.shape[0])
    expected: dict[str, tuple[int, ...]] = {}
    for layer in table.heads[part]:
        expected |= _layer_shapes(layer, *sizes, list(table.heads[part]), table.normed)
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


def _layer_shapes(
    layer: str, channels: int, hidden: int, dim: int, layers: list[str], normed: bool
) -> dict[str, tuple[int, ...]]:
    same_branch = [other for other in layers if other.partition(".")[0] == layer.partition(".")[0]]
    spatial = (1, 1) if layer.startswith("dense_mlp") else ()
    if layer == same_branch[0]:
        shapes: tuple[tuple[int, ...], ...] = ((hidden, channels, *spatial), (hidden,))
        return dict(zip((f"{layer}.{leaf}" for leaf in LINEAR), shapes, strict=True))
    if layer == same_branch[-1]:
        return dict(zip((f"{layer}.{leaf}" for leaf in LINEAR), ((dim, hidden, *spatial), (dim,)), strict=True))
    return {f"{layer}.{leaf}": () if leaf == "num_batches_tracked" else (hidden,) for leaf in NORM}


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
    source = table.backbones["backbone_q"]
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
    names = table.queues[part]
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
    return {"rows": rows, "position": position.reshape(()).clone(), "count": torch.tensor(len(rows))}, []


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
    if part in table.queues:
        return " and ".join(table.queues[part])
    if part in table.heads:
        return f"{next(iter(table.heads[part].values()))}.weight and so on"
    return f"{table.backbones[part]}conv1.weight and so on"


def _not_recognised(state: Mapping[str, Tensor]) -> str:
    shown = ", ".join(list(state)[:3])
    inner = next((name for name in state for mark in ("projection_head", "encoder_q.") if f".{mark}" in name), None)
    hint = ""
    if inner is not None:
        start = min(inner.find(mark) for mark in ("projection_head", "encoder_q.") if mark in inner)
        hint = f"; prefix={inner[:start]!r} may be what they lack"
    return f"format: got names such as {shown}, expected those of {', '.join(map(repr, FORMATS))}{hint}"
