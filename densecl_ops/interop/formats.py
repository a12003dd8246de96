"""Who names what how. One table per project; reading and writing follow it in opposite directions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

LINEAR = ("weight", "bias")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Format:
    """Names of one project, below the prefix that DistributedDataParallel, torch.compile or a user put before all.

    Attributes:
        name: Of the format.
        backbones: Part -> what stands before the ResNet's own names.
        heads: Part -> our layer -> their layer.
        queues: Part -> name of its (D, K) rows and of its position.
        required: Parts that every such checkpoint has. The others are all there or not at all.
        repeats: What stands before a second copy of the query backbone.
        carried: Entries, or beginnings of entries, that have no place in our modules and are kept apart.
        prefix: What the project itself puts before all names.
        children: Their names for the children of a ResNet, where they are not torchvision's.
        normed: Whether the heads have a norm layer.
    """

    name: str
    backbones: dict[str, str]
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    queues: dict[str, tuple[str, str]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    repeats: str | None = None
    carried: tuple[str, ...] = ()
    prefix: str = ""
    children: dict[str, str] = field(default_factory=dict)
    normed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.queues, *self.backbones, *self.heads)

    def locate(self, name: str) -> tuple[str, str] | None:
        """Part and our name of an entry, or None where it has no place in our modules."""
        for part, (rows, position) in self.queues.items():
            if name in (rows, position):
                return part, "rows" if name == rows else "position"
        layer, _, leaf = name.rpartition(".")
        for part, layers in self.heads.items():
            for ours, theirs in layers.items():
                if layer == theirs:
                    return part, f"{ours}.{leaf}"
        for part, before in self.backbones.items():
            if name.startswith(before) and not name.startswith(f"{before}fc."):
                child, dot, rest = name.removeprefix(before).partition(".")
                return part, self.children.get(child, child) + dot + rest
        return None

    def name_of(self, part: str, entry: str) -> str:
        """Their name of an entry: the inverse of `locate`."""
        if part in self.queues:
            return self.queues[part][entry == "position"]
        if part in self.heads:
            layer, _, leaf = entry.rpartition(".")
            return f"{self.heads[part].get(layer, f'{part}.{layer}')}.{leaf}"
        child, dot, rest = entry.partition(".")
        theirs = {ours: theirs for theirs, ours in self.children.items()}
        return self.backbones[part] + theirs.get(child, child) + dot + rest

    def carries(self, name: str) -> bool:
        return any(name == kept or (kept.endswith(".") and name.startswith(kept)) for kept in self.carried)


def two_layers(image: str, dense: str | None = None) -> dict[str, str]:
    layers = {f"image_mlp.{i}": f"{image}.{i}" for i in (0, 2)}
    return layers if dense is None else layers | {f"dense_mlp.{i}": f"{dense}.{i}" for i in (0, 2)}


TWO_QUEUES = {"image_queue": ("queue", "queue_ptr"), "dense_queue": ("queue2", "queue2_ptr")}
ALL_PARTS = ("backbone_q", "backbone_k", "head_q", "head_k", "image_queue", "dense_queue")

TABLES = {
    "densecl": Format(  # the official code, and mmselfsup 0.x
        "densecl",
        backbones={"backbone_q": "encoder_q.0.", "backbone_k": "encoder_k.0."},
        heads={f"head_{x}": two_layers(f"encoder_{x}.1.mlp", f"encoder_{x}.1.mlp2") for x in "qk"},
        queues=TWO_QUEUES,
        required=ALL_PARTS,
        repeats="backbone.",
    ),
    "mmpretrain": Format(  # and mmselfsup 1.x
        "mmpretrain",
        backbones={"backbone_q": "backbone.", "backbone_k": "encoder_k.module.0."},
        heads={
            "head_q": two_layers("neck.mlp", "neck.mlp2"),
            "head_k": two_layers("encoder_k.module.1.mlp", "encoder_k.module.1.mlp2"),
        },
        queues=TWO_QUEUES,
        required=ALL_PARTS,
        carried=("encoder_k.steps", "data_preprocessor."),
    ),
    "moco": Format(  # v2, of facebookresearch; v1 has one Linear
        "moco",
        backbones={"backbone_q": "encoder_q.", "backbone_k": "encoder_k."},
        heads={f"head_{x}": two_layers(f"encoder_{x}.fc") for x in "qk"},
        queues={"image_queue": ("queue", "queue_ptr")},
        required=("backbone_q", "head_q"),
        prefix="module.",
    ),
    "backbone": Format(
        "backbone", backbones={"backbone_q": ""}, required=("backbone_q",), carried=("fc.weight", "fc.bias")
    ),
}
FORMATS = (*TABLES, "lightly")


def lightly_table(names: Collection[str]) -> Format:
    """The names of lightly's examples: modules of the user's own naming, so the table follows what is there.

    The MoCo and BYOL examples call the head projection_head, the DenseCL ones projection_head_global and
    projection_head_local; the key side ends in _momentum. A backbone cut out of a ResNet as nn.Sequential has numbers
    where torchvision has names.
    """

    def below(root: str) -> bool:
        return any(name.startswith(f"{root}.") for name in names)

    image = "projection_head_global" if below("projection_head_global") else "projection_head"
    alone = "layers.0.weight" in names  # the caller's prefix ends at the head itself
    normed = ("layers.1.weight" if alone else f"{image}.layers.1.weight") in names
    heads = {}
    for part, suffix in (("head_q", ""), ("head_k", "_momentum")):
        theirs = (0, 1, 3) if normed else (0, 2)
        roots = {"image_mlp": (image, (0, 2, 5)), "dense_mlp": ("projection_head_local", (0, 1, 3))}
        heads[part] = {
            f"{branch}.{mine}": f"layers.{layer}" if alone else f"{root}{suffix}.layers.{layer}"
            for branch, (root, places) in roots.items()
            if branch == "image_mlp" or below(f"{root}{suffix}")
            for mine, layer in zip(places if normed else (0, 2), theirs, strict=True)
        }
    queues = {}
    for name in names:
        if name.rpartition(".")[2] == "bank":
            queues["dense_queue" if "local" in name else "image_queue"] = (name, f"{name}_ptr")
    cut = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    return Format(
        "lightly",
        backbones={"backbone_q": "backbone.", "backbone_k": "backbone_momentum."},
        heads=heads,
        queues=queues,
        required=("head_q",),
        carried=("prediction_head.",),
        children=cut if "backbone.0.weight" in names else {},
        normed=normed,
    )


def strip_wrappers(names: Collection[str]) -> str:
    """What DistributedDataParallel and torch.compile put before all names."""
    prefix = ""
    while True:
        for wrapper in ("module.", "_orig_mod."):
            if names and all(name.startswith(prefix + wrapper) for name in names):
                prefix += wrapper
                break
        else:
            return prefix


def detect(names: Collection[str]) -> str | None:
    """The format that these names, without their common prefix, belong to."""
    marks = (
        ("densecl", ("encoder_q.0.", "encoder_q.1.")),
        ("mmpretrain", ("neck.", "encoder_k.module.")),
        ("moco", ("encoder_q.",)),
        ("lightly", ("projection_head.", "projection_head_global.", "layers.0.")),
    )
    for name, beginnings in marks:
        if any(entry.startswith(beginnings) for entry in names):
            return name
    return "backbone" if "conv1.weight" in names else None
