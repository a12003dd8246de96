"""The names that projects give to backbones, heads and queues, and those by which a network itself is known."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os.path import commonprefix

ALL_PARTS = ("backbone_q", "backbone_k", "head_q", "head_k", "image_queue", "dense_queue")

# Components that wrappers put into names: torch.compile, activation checkpointing and FSDP. No module calls its own
# children so. "module", of DataParallel and others, may be anybody's: it counts at the front of all names only.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Format:
    """Names of one project, below the prefix that DistributedDataParallel, torch.compile or a user put before all."""

    mark: str  # pattern of a name that no other format has
    names: Mapping[str, str]  # beginnings of theirs -> of ours: a part and its entry
    prefix: str = ""  # what the project itself puts before all names

    @property
    def theirs(self) -> dict[str, str]:
        """The inverse; of two places for one entry, the later one."""
        return {ours: theirs for theirs, ours in self.names.items()}


def _side(side: str, backbone: str, image: str, dense: str | None = None) -> dict[str, str]:
    """From what stands before the backbone and the two branches of the head."""
    names = {backbone: f"backbone_{side}."}
    for ours, theirs in (("image_mlp", image), ("dense_mlp", dense)):
        if theirs is not None:
            names |= {f"{theirs}{layer}.": f"head_{side}.{ours}.{layer}." for layer in (0, 2)}
    return names


IMAGE_QUEUE = {"queue": "image_queue.rows", "queue_ptr": "image_queue.position"}
TWO_QUEUES = IMAGE_QUEUE | {"queue2": "dense_queue.rows", "queue2_ptr": "dense_queue.position"}

FORMATS = {
    "densecl": Format(  # the official code, and mmselfsup 0.x
        r"encoder_q\.1\.mlp",
        {"backbone.": "backbone_q."}  # a second copy
        | TWO_QUEUES
        | _side("q", "encoder_q.0.", "encoder_q.1.mlp.", "encoder_q.1.mlp2.")
        | _side("k", "encoder_k.0.", "encoder_k.1.mlp.", "encoder_k.1.mlp2."),
    ),
    "mmpretrain": Format(  # and mmselfsup 1.x
        r"neck\.mlp|encoder_k\.module\.",
        TWO_QUEUES
        | _side("q", "backbone.", "neck.mlp.", "neck.mlp2.")
        | _side("k", "encoder_k.module.0.", "encoder_k.module.1.mlp.", "encoder_k.module.1.mlp2."),
    ),
    "moco": Format(  # v2, of facebookresearch; the one Linear of v1 has no place in our head
        r"encoder_q\.(conv1|layer1|fc)\.",
        IMAGE_QUEUE | _side("q", "encoder_q.", "encoder_q.fc.") | _side("k", "encoder_k.", "encoder_k.fc."),
        prefix="module.",
    ),
    "lightly": Format(  # as its examples call them, MoCo's and DenseCL's; others choose their own, so it is read only
        r"projection_head(_global)?\.layers\.",
        {
            theirs: ours
            for side, last in (("q", ""), ("k", "_momentum"))
            for image in (f"projection_head{last}.layers.", f"projection_head_global{last}.layers.")
            for theirs, ours in _side(side, f"backbone{last}.", image, f"projection_head_local{last}.layers.").items()
        },
    ),
}
WRITTEN = ("densecl", "mmpretrain", "moco")

# Kind -> what its names begin with: the stem, the stages, and all else that is its own, in the names of torchvision,
# timm, transformers and the projects that made them. What stands beside these (fc, projector, prototypes) is not.
NETWORKS = {
    "ResNet or HRNet": (
        r"conv1|stem",
        r"layer\d|res\d",
        r"(conv|bn|norm|gn|stage|transition)\d|(incre|downsamp)_modules|final_layer",
    ),
    "ViT or Swin": (
        r"patch_embed",
        r"blocks|layers|stages",
        r"(cls|class|dist|reg|register|mask)_tokens?|(abs_|absolute_)?pos_embed|rel_pos_bias|(pre_|fc_)?norm|norm_pre|ln\d",
    ),
    "ViT of torchvision": (r"conv_proj", r"encoder", r"class_token"),
    "model of transformers": (r"embeddings|embedder", r"encoder|layers|model", r"layernorm|norm"),
    "ConvNeXt or ResNetV2": (r"stem|downsample_layers", r"stages", r"norm|norm_pre|head\.norm"),
    "RegNet": (r"stem", r"s\d|trunk_output", r"final_conv"),
    "EfficientNet or MobileNet": (r"conv_stem", r"blocks", r"bn\d|conv_head|norm_head"),
    "CNN of torchvision": (r"features\.(0|conv0)", r"features", r"norm"),
}

# What no unknown network is taken to own, unless its prefix leads there.
NOT_BACKBONE = r"fc|heads?|classifier|prototypes|(proj|pred)\w*|\w*momentum\w*|target\w*|encoder_k"
KEY_SIDE = re.compile(r"momentum|(^|[._])(k|key|target|ema)[._]")

# The children of a ResNet by their place, where it was cut with nn.Sequential(*resnet.children()); the others (ReLU,
# pooling) have no entries.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4", "9": "fc"}


def renamed(name: str, begins: Mapping[str, str]) -> str | None:
    """With the longest of these beginnings replaced; None: it has none of them."""
    begin = max(filter(name.startswith, begins), key=len, default=None)
    return None if begin is None else begins[begin] + name.removeprefix(begin)


def recognise(names: Iterable[str], format: str, anywhere: bool) -> tuple[str, str] | None:  # noqa: A002
    """The format whose mark is among the names, and what stands before it; "" unless it may stand anywhere."""
    before = r"((?:[^.]+\.)*?)" if anywhere else "()"
    for known in [format] if format in FORMATS else FORMATS:
        for name in names:
            if found := re.match(f"{before}(?:{FORMATS[known].mark})", name):
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
    there, first = set(bare.values()), "4.0.conv1.weight"
    places = [name.removesuffix(first) for name in there if f".{name}".endswith(f".{first}")]
    cuts = [place for place in places if f"{place}1.weight" in there]
    children = {f"{cut}{number}.": f"{cut}{child}." for cut in cuts for number, child in CHILDREN.items()}
    return {name: renamed(plain, children) or plain for name, plain in bare.items()}


def find_networks(names: Iterable[str]) -> dict[str, str]:
    """Every prefix that has a stem and a stage below it, and the kind of network that they belong to."""
    children: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts) - 1):
            children[".".join([*parts[:depth], ""])] |= {parts[depth], ".".join(parts[depth : depth + 2])}
    return {
        prefix: kind
        for prefix, inside in children.items()
        for kind, (stem, stage, _) in NETWORKS.items()
        if all(any(re.fullmatch(pattern, child) for child in inside) for pattern in (stem, stage))
    }


def belongs(name: str, kind: str | None) -> bool:
    """Whether an entry, named from its network's prefix on, is the network's own; None: of a kind unknown here."""
    if kind is None:
        return re.match(rf"({NOT_BACKBONE})(\.|$)", name) is None
    return re.match(rf"({'|'.join(NETWORKS[kind])})(\.|$)", name) is not None
