"""The names that each project gives to backbones, heads and queues: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os.path import commonprefix

from densecl_ops.interop.networks import name_children

ALL_PARTS = ("backbone_q", "backbone_k", "head_q", "head_k", "image_queue", "dense_queue")

# Components that wrappers put into names: torch.compile, activation checkpointing and FSDP. No module calls its own
# children so. "module", of DataParallel and others, may be anybody's: it counts at the front of all names only.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Format:
    """Names of one project, below the prefix that DistributedDataParallel, torch.compile or a user put before all.

    Attributes:
        mark: Pattern of a name that no other format has.
        names: The beginning of their names -> part and the beginning of ours.
        copy: What stands before a second copy of the query backbone.
        carried: Beginnings of entries that this project alone needs.
        prefix: What the project itself puts before all names.
    """

    mark: str
    names: Mapping[str, tuple[str, str]]
    copy: str | None = None
    carried: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def parts(self) -> set[str]:
        return {part for part, _ in self.names.values()}

    def locate(self, name: str) -> tuple[str, str] | None:
        """Part and our name of an entry of theirs; None: it has no place in our modules."""
        theirs = max((begin for begin in self.names if name.startswith(begin)), key=len, default=None)
        if theirs is None:
            return None
        part, ours = self.names[theirs]
        return part, ours + name.removeprefix(theirs)

    def name_of(self, part: str, entry: str) -> str | None:
        """Their name of an entry of ours, the inverse of `locate`; None: they have no place for it."""
        for theirs, (held, ours) in self.names.items():
            if held == part and entry.startswith(ours):
                return theirs + entry.removeprefix(ours)
        return None


def _names(side: str, backbone: str, image: str, dense: str | None = None) -> dict[str, tuple[str, str]]:
    """From what stands before the backbone and the two branches of the head."""
    names = {backbone: (f"backbone_{side}", "")}
    for ours, theirs in (("image_mlp", image), ("dense_mlp", dense)):
        if theirs is not None:
            names |= {f"{theirs}{layer}.": (f"head_{side}", f"{ours}.{layer}.") for layer in (0, 2)}
    return names


def _queue(part: str, name: str) -> dict[str, tuple[str, str]]:
    return {name: (part, "rows"), f"{name}_ptr": (part, "position")}


TWO_QUEUES = _queue("image_queue", "queue") | _queue("dense_queue", "queue2")

FORMATS = {
    "densecl": Format(  # the official code, and mmselfsup 0.x
        r"encoder_q\.1\.mlp",
        TWO_QUEUES
        | _names("q", "encoder_q.0.", "encoder_q.1.mlp.", "encoder_q.1.mlp2.")
        | _names("k", "encoder_k.0.", "encoder_k.1.mlp.", "encoder_k.1.mlp2."),
        copy="backbone.",
    ),
    "mmpretrain": Format(  # and mmselfsup 1.x
        r"neck\.mlp|encoder_k\.module\.",
        TWO_QUEUES
        | _names("q", "backbone.", "neck.mlp.", "neck.mlp2.")
        | _names("k", "encoder_k.module.0.", "encoder_k.module.1.mlp.", "encoder_k.module.1.mlp2."),
        carried=("encoder_k.steps", "data_preprocessor."),
    ),
    "moco": Format(  # v2, of facebookresearch; the one Linear of v1 has no place in our head
        r"encoder_q\.(conv1|layer1|fc)\.",
        _queue("image_queue", "queue")
        | _names("q", "encoder_q.", "encoder_q.fc.")
        | _names("k", "encoder_k.", "encoder_k.fc."),
        prefix="module.",
    ),
    "lightly": Format(  # as its examples call them, MoCo's and DenseCL's; others choose their own, so it is read only
        r"projection_head(_global)?\.layers\.",
        {
            name: place
            for side, last in (("q", ""), ("k", "_momentum"))
            for image in (f"projection_head{last}.layers.", f"projection_head_global{last}.layers.")
            for name, place in _names(side, f"backbone{last}.", image, f"projection_head_local{last}.layers.").items()
        },
    ),
}
WRITTEN = ("densecl", "mmpretrain", "moco")


def recognise(names: Iterable[str], format: str, anywhere: bool) -> tuple[str, str] | None:  # noqa: A002
    """The format whose mark is among the names, and what stands before it; "" unless it may stand anywhere."""
    before = r"((?:[^.]+\.)*?)" if anywhere else "()"
    for known, table in FORMATS.items():
        if format in ("auto", "backbone", known):
            for name in names:
                found = re.match(f"{before}(?:{table.mark})", name)
                if found:
                    return known, found[1]
    return None


def strip_wrappers(names: Collection[str]) -> str:
    """What DistributedDataParallel and torch.compile put before all names."""
    shared = re.match(rf"((module|{'|'.join(WRAPPERS)})\.)*", commonprefix(list(names)))  # noqa: RUF071  # in whole parts
    return "" if shared is None else shared[0]


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name, and the plain one: without wrappers, and with a ResNet's own names where it was cut into numbers."""
    bare = {name: without_wrappers(name) for name in names}
    named = name_children(set(bare.values()))
    return {name: named[inner] for name, inner in bare.items()}
