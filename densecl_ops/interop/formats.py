"""The names that each project gives to backbones, heads and queues: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

ALL_PARTS = ("backbone_q", "backbone_k", "head_q", "head_k", "image_queue", "dense_queue")

# Components that wrappers put into names: torch.compile, activation checkpointing and FSDP. No module calls its own
# children so. "module", of DataParallel and others, may be anybody's: it counts at the front of all names only.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Format:
    """Names of one project, below the prefix that DistributedDataParallel, torch.compile or a user put before all.

    Attributes:
        name: Of the format.
        names: Part -> our names -> theirs. What ends in "." or is empty is the beginning of names; the rest stays.
        required: Parts that every such checkpoint has. The others are all there or not at all.
        ours: Whether heads and queues are our own modules, in our names and layout. Entries of anything else may
            stand beside them, and are kept apart.
        repeats: What stands before a second copy of the query backbone.
        carried: Entries, or beginnings of entries, that have no place in our modules and are kept apart.
        counter: Entry that counts the updates of the key side. At 0 the next update would copy the query side.
        prefix: What the project itself puts before all names.
        normed: Whether the heads have a norm layer.
    """

    name: str
    names: Mapping[str, Mapping[str, str]]
    required: tuple[str, ...] = ("backbone_q", "head_q")
    ours: bool = False
    repeats: str | None = None
    carried: tuple[str, ...] = ()
    counter: str | None = None
    prefix: str = ""
    normed: bool = False

    def locate(self, name: str) -> tuple[str, str] | None:
        """Part and our name of an entry by the longest beginning that fits; None: it has no place in our modules."""
        known = [(part, mine, theirs) for part, pairs in self.names.items() for mine, theirs in pairs.items()]
        fitting = [(part, mine, theirs) for part, mine, theirs in known if _begins(name, theirs)]
        part, mine, theirs = max(fitting, key=lambda found: len(found[2]), default=("", "", ""))
        entry = mine + name.removeprefix(theirs)
        no_place = not part or self.carries(name) or (part.startswith("backbone") and entry.startswith("fc."))
        return None if no_place else (part, entry)

    def name_of(self, part: str, entry: str) -> str:
        """Their name of an entry, the inverse of `locate`; our own where they have none."""
        pairs = self.names.get(part, {})
        fitting = [mine for mine in pairs if _begins(entry, mine)]
        if not fitting:
            return f"{part}.{entry}"
        mine = max(fitting, key=len)
        return pairs[mine] + entry.removeprefix(mine)

    def holds(self, part: str, entry: str) -> bool:
        """Whether the format has a name for this entry of ours."""
        return any(_begins(entry, mine) for mine in self.names[part])

    def carries(self, name: str) -> bool:
        return any(_begins(name, kept) for kept in self.carried)


def _begins(name: str, beginning: str) -> bool:
    return name.startswith(beginning) if beginning == "" or beginning.endswith(".") else name == beginning


TWO_QUEUES = {
    "image_queue": {"rows": "queue", "position": "queue_ptr"},
    "dense_queue": {"rows": "queue2", "position": "queue2_ptr"},
}

OTHERS = (
    Format(  # the official code, and mmselfsup 0.x
        "densecl",
        {
            **TWO_QUEUES,
            "backbone_q": {"": "encoder_q.0."},
            "head_q": {"image_mlp.": "encoder_q.1.mlp.", "dense_mlp.": "encoder_q.1.mlp2."},
            "backbone_k": {"": "encoder_k.0."},
            "head_k": {"image_mlp.": "encoder_k.1.mlp.", "dense_mlp.": "encoder_k.1.mlp2."},
        },
        required=ALL_PARTS,
        repeats="backbone.",
    ),
    Format(  # and mmselfsup 1.x
        "mmpretrain",
        {
            **TWO_QUEUES,
            "backbone_q": {"": "backbone."},
            "head_q": {"image_mlp.": "neck.mlp.", "dense_mlp.": "neck.mlp2."},
            "backbone_k": {"": "encoder_k.module.0."},
            "head_k": {"image_mlp.": "encoder_k.module.1.mlp.", "dense_mlp.": "encoder_k.module.1.mlp2."},
        },
        required=ALL_PARTS,
        carried=("encoder_k.steps", "data_preprocessor."),
        counter="encoder_k.steps",
    ),
    Format(  # v2, of facebookresearch; v1 has one Linear
        "moco",
        {
            "image_queue": {"rows": "queue", "position": "queue_ptr"},
            "backbone_q": {"": "encoder_q."},
            "head_q": {"image_mlp.": "encoder_q.fc."},
            "backbone_k": {"": "encoder_k."},
            "head_k": {"image_mlp.": "encoder_k.fc."},
        },
        prefix="module.",
    ),
    Format("backbone", {"backbone_q": {"": ""}}, required=("backbone_q",), carried=("fc.",)),
)

# Our recipes, called after the files of docs/examples: query backbone and head, key backbone and head. pretrain.py has
# the names of moco_loop.
RECIPES = {
    "with_moco": ("encoder_q.", "encoder_q.fc.", "encoder_k.", "encoder_k.fc."),
    "moco_loop": ("encoder_q.backbone.", "encoder_q.head.", "encoder_k.backbone.", "encoder_k.head."),
    "with_vit": ("encoder_q.vit.", "encoder_q.head.", "encoder_k.vit.", "encoder_k.head."),
    "with_fpn": ("encoder_q.pyramid.", "encoder_q.head.", "encoder_k.pyramid.", "encoder_k.head."),
    "with_lightly": ("backbone.", "projection_head.", "backbone_momentum.", "projection_head_momentum."),
    "with_lightning": ("backbone.", "head.", "backbone_k.", "head_k."),
    "with_solo_learn": ("backbone.", "head.", "momentum_backbone.", "head_k."),
    "byol_loop": ("online.backbone.", "online.head.", "target.backbone.", "target.head."),
    "with_byol_pytorch": ("learner.net.", "head.", "learner.target_encoder.net.", "target_head."),
}


def recipe(name: str, backbone_q: str, head_q: str, backbone_k: str, head_k: str) -> Format:
    before = {"image_queue": "image_queue.", "dense_queue": "dense_queue.", "backbone_q": backbone_q, "head_q": head_q}
    before |= {"backbone_k": backbone_k, "head_k": head_k}
    return Format(
        name,
        {part: {"": theirs} for part, theirs in before.items()},
        ours=True,
        prefix="module." if name == "with_moco" else "",
    )


TABLES = {table.name: table for table in OTHERS} | {name: recipe(name, *names) for name, names in RECIPES.items()}
FORMATS = (*TABLES, "lightly")


def lightly_table(names: Collection[str]) -> Format:
    """The names of lightly's examples: modules of the user's own naming, so the table follows what is there.

    The MoCo and BYOL examples call the head projection_head, the DenseCL ones projection_head_global and
    projection_head_local; the key side ends in _momentum. A backbone cut out of a ResNet as nn.Sequential has numbers
    where torchvision has names.
    """

    def below(root: str) -> bool:
        return any(name.startswith(root) for name in names)

    image = "projection_head_global" if below("projection_head_global.") else "projection_head"
    alone = "layers.0.weight" in names  # the caller's prefix ends at the head itself
    normed = ("layers.1.weight" if alone else f"{image}.layers.1.weight") in names
    theirs = (0, 1, 3) if normed else (0, 2)
    image_layers = (0, 2, 5) if normed else theirs  # ours makes vectors maps and back around the norm
    children = {"conv1.": "0.", "bn1.": "1.", "layer1.": "4.", "layer2.": "5.", "layer3.": "6.", "layer4.": "7."}
    table: dict[str, dict[str, str]] = {}
    for side, suffix in (("q", ""), ("k", "_momentum")):
        backbone, local = f"backbone{suffix}.", f"projection_head_local{suffix}."
        cut = {mine: backbone + number for mine, number in children.items()}
        table[f"backbone_{side}"] = cut if "backbone.0.weight" in names else {"": backbone}
        branches = [("image_mlp", "" if alone else f"{image}{suffix}.", image_layers)]
        branches += [("dense_mlp", local, theirs)] if below(local) else []
        table[f"head_{side}"] = {
            f"{branch}.{layer}.": f"{root}layers.{number}."
            for branch, root, layers in branches
            for layer, number in zip(layers, theirs, strict=True)
        }
    for name in names:
        if name.rpartition(".")[2] == "bank":
            table["dense_queue" if "local" in name else "image_queue"] = {"rows": name, "position": f"{name}_ptr"}
    return Format("lightly", table, required=("head_q",), carried=("prediction_head.",), normed=normed)


def strip_wrappers(names: Collection[str]) -> str:
    """What DistributedDataParallel and torch.compile put before all names."""
    prefix = ""
    while True:
        for wrapper in ("module.", *(f"{wrapper}." for wrapper in WRAPPERS)):
            if names and all(name.startswith(prefix + wrapper) for name in names):
                prefix += wrapper
                break
        else:
            return prefix


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def detect(names: Collection[str]) -> str | None:
    """The format that these names, without their common prefix, belong to."""
    recipes = [name for name in RECIPES if TABLES[name].name_of("head_q", "image_mlp.0.weight") in names]
    if recipes:  # of those that share the query side, the one that knows most of the names
        return max(recipes, key=lambda name: sum(TABLES[name].locate(entry) is not None for entry in names))
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
