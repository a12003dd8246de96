"""From another project's file to a Checkpoint."""

import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from densecl_ops import _checks
from densecl_ops.interop import names
from densecl_ops.interop.checkpoint import Checkpoint, State, raise_all

NAMES = (*names.FORMATS, "backbone")
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
    """Reads a training checkpoint of DenseCL, mmselfsup, mmpretrain, MoCo or lightly, or the backbone in any file.

    Entries that have no place in our modules go to `unmapped`. Whether the parts fit your modules is checked by
    `Checkpoint.load_into`.

    Args:
        source: A file, read with torch.load(weights_only=True) onto the CPU, or what is in it: a state dict, or a
            mapping with one under "state_dict" or "model". Tensors of a mapping are not copied, but for the queues.
        format: "densecl" (the official code, mmselfsup 0.x), "mmpretrain" (mmselfsup 1.x too), "moco" (v2) or
            "lightly". "backbone": the query backbone alone, of these or of any other file. Its network is found by
            the names of its stem and stages (a ResNet, ViT, Swin, ConvNeXt, ... of torchvision, timm or
            transformers). Default "auto": told from the names, "backbone" where no project's are there.
        prefix: What stands before all names of the model, such as "model."; entries outside it go to `unmapped`.
            Default None: it is found. An unknown network is read with format="backbone" and the prefix before it.

    Returns:
        Checkpoint, without what torch.compile, activation checkpointing and FSDP put into names. The children of a
        ResNet that nn.Sequential gave numbers have their names again.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: source or prefix has the wrong type.
        ValueError: The file holds more than weights_only allows; nothing in it is recognised; or several networks are.

    Example:
        >>> import torch
        >>> from densecl_ops.interop import read_checkpoint
        >>> names = "encoder.conv1.weight", "encoder.layer1.0.conv1.weight", "projector.0.weight"
        >>> read_checkpoint({"state_dict": {f"module.{name}": torch.ones(8, 8, 1, 1) for name in names}})
        Checkpoint(format='backbone', prefix='module.encoder.', backbone_q=2 entries, unmapped=1 entries (projector))
    """
    _checks.require_choice("format", format, ("auto", *NAMES))
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix: got {type(prefix).__name__}, expected a str or None")
    content = source if isinstance(source, Mapping) else _load(source)
    key = next((name for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), None)
    state: Mapping[str, Any] = content if key is None else content[key]
    _require_flat(state, "content" if key is None else f"content[{key!r}]")

    before = names.strip_wrappers(state) if prefix is None else prefix
    below = {name: name.removeprefix(before) for name in state if name.startswith(before)}
    if not below:
        there = list(names.find_networks(names.plain_names(state).values())) or _roots(state)
        raise ValueError(f"prefix: got {before!r}, with which no name begins, expected one of {', '.join(there)}")
    plain = names.plain_names(below.values())
    origin = {plain[name]: full for full, name in below.items()}
    if len(origin) != len(below):
        raise ValueError("checkpoint: got entries with and without the names of wrappers, expected each of them once")
    inside = {name: state[full] for name, full in origin.items()}

    found = names.recognise(inside, format, anywhere=prefix is None)
    if found is not None and format != "backbone":
        kind, root = found
    elif format in ("auto", "backbone"):
        kind, root = "backbone", _root_of_backbone(inside, found, before, format == "backbone" and prefix is not None)
    else:
        raise ValueError(_not_recognised(inside, before, repr(format)))
    rooted = {name.removeprefix(root): value for name, value in inside.items() if name.startswith(root)}
    if kind == "backbone":
        network = names.find_networks(inside).get(root)
        placed = {name for name in rooted if names.belongs(name, network)}
        parts = {"backbone_q": {name: value for name, value in rooted.items() if name in placed}}
    else:
        parts, placed = _take_apart(rooted, kind)
    used = {origin[root + name] for name in placed}
    return Checkpoint(
        format=kind,
        **parts,
        extra={} if key is None else {name: value for name, value in content.items() if name != key},
        unmapped={name: value for name, value in state.items() if name not in used},
        prefix=before + root,
        key=key,
    )


def _require_flat(state: Mapping[Any, Any], path: str) -> None:
    if not state:
        raise ValueError(f"source: got {path} without entries, expected a state dict")
    if any(isinstance(value, Mapping) for value in state.values()):
        raise ValueError(
            "source: got a mapping of mappings, expected one state dict. With content = torch.load(path), pass the one "
            f"you mean to read_checkpoint: {', '.join(_state_dicts(state, path)) or 'none of them holds weights'}"
        )
    wrong = {name: x for name, x in state.items() if not isinstance(name, str) or not isinstance(x, Tensor)}
    raise_all("checkpoint", [f"{name}: got {type(x).__name__}, expected a tensor" for name, x in wrong.items()])


def _state_dicts(content: Mapping[Any, Any], path: str) -> Iterator[str]:
    """Every mapping inside that holds weights, as the expression that reaches it; an optimizer's names have no dot."""
    if any(isinstance(value, Tensor) and "." in str(name) for name, value in content.items()):
        yield path
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _state_dicts(value, f"{path}[{name!r}]")


def _root_of_backbone(inside: State, found: tuple[str, str] | None, before: str, unknown_too: bool) -> str:
    """What stands before the query backbone: of the known format, else of the only network that is no key side."""
    networks = names.find_networks(inside)
    of_format = [] if found is None else [found[1] + names.FORMATS[found[0]].theirs["backbone_q."]]
    query = [root for root in networks if not names.KEY_SIDE.search(root)]
    stems = {root: next(x for name, x in inside.items() if name.startswith(root)) for root in reversed(query)}
    query = list({stem.data_ptr(): root for root, stem in stems.items()}.values())  # one module may have two names
    for roots in ([""] if "" in networks else [], of_format, query):
        if len(roots) == 1 and any(name.startswith(roots[0]) for name in inside):
            return roots[0]
    if networks:
        what = f"{len(query)} networks" if query else "momentum encoders alone"
        kinds = ", ".join(f"{before + root!r} ({kind})" for root, kind in networks.items())
        raise ValueError(f'prefix: got {what}, expected a choice: format="backbone" and one of these prefixes: {kinds}')
    if not unknown_too or not any(names.belongs(name, None) for name in inside):
        raise ValueError(_not_recognised(inside, before, f"{', '.join(NAMES[:-1])} or a known network"))
    return ""


def _not_recognised(inside: State, before: str, expected: str) -> str:
    roots = [before + root for root in _roots(inside)]
    return (
        f"format: got names such as {', '.join(list(inside)[:3])}, expected those of {expected}. Known networks: "
        f'{", ".join(names.NETWORKS)}. Any other is read with format="backbone" and the prefix= before its names, of '
        f"{', '.join(map(repr, [before, *roots]))}"
    )


def _roots(full: Iterable[str]) -> list[str]:
    """The first of what stands before the first dots."""
    return list(dict.fromkeys(f"{name.partition('.')[0]}." for name in full if "." in name))[:8]


def _take_apart(state: State, format: str) -> tuple[dict[str, State], set[str]]:  # noqa: A002
    """Parts in our names, and the names that found a place in them."""
    known = names.FORMATS[format]
    parts: dict[str, State] = {}
    placed: set[str] = set()
    problems: list[str] = []
    for name, value in state.items():
        part, _, entry = (names.renamed(name, known.names) or "").partition(".")
        if not part or (part.startswith("backbone") and not names.belongs(entry, None)):
            continue
        placed.add(name)
        held = parts.setdefault(part, {})
        if format == "densecl" and entry in held and not _same(held[entry], value):
            problems.append(f"backbone.{entry}: got other values than encoder_q.0.{entry}, expected a copy of it")
        linear = format == "lightly" and entry.startswith("dense_mlp.") and value.ndim == 2
        held[entry] = value[:, :, None, None] if linear else value  # as a 1x1 convolution
    for part in [part for part in parts if part.endswith("queue")]:
        rows, position = parts[part].get("rows"), parts[part].get("position")
        if rows is None or rows.ndim != 2 or position is None or position.shape != (1,):
            shapes = " and ".join(str(x if x is None else tuple(x.shape)) for x in (rows, position))
            queue = known.theirs[f"{part}.rows"]
            problems.append(f"{queue} and {queue}_ptr: got shapes {shapes}, expected (D, K) and (1,)")
        else:  # ours are (K, D); those projects take every row as a negative
            own = {"rows": rows.t().contiguous(), "position": position.reshape(()).clone()}
            parts[part] = own | {"count": position.new_tensor(rows.shape[1])}
    raise_all(f"{format} checkpoint", problems)
    return parts, placed


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=0, atol=0, equal_nan=True)


def _load(source: object) -> Mapping[str, Any]:
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, expected a path or a mapping")
    try:
        content = torch.load(fspath(source), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises KeyError, EOFError, RuntimeError and more for what is no checkpoint
        refused = re.search(r"GLOBAL (\S+)|Unsupported .*", str(error))
        if refused is None:
            raise ValueError(f"{fspath(source)}: got a file that torch cannot read, expected a checkpoint") from error
        raise ValueError(NOT_PLAIN.format(path=fspath(source), reason=refused[1] or refused[0])) from error
    if not isinstance(content, Mapping):
        raise TypeError(f"source: got a file with a {type(content).__name__}, expected a mapping")
    return content
