"""The names by which a network is known: where one stands in a state dict, and which entries are its own."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

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


def name_children(names: Collection[str]) -> dict[str, str]:
    """Each name, and what it is once the numbers of a cut ResNet are the names of its children."""
    first = "4.0.conv1.weight"
    places = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
    places = [place for place in places if f"{place}1.weight" in names]
    named = {name: name for name in names}
    for name in names:
        for place in places:
            if name.startswith(place):
                child, _, rest = name.removeprefix(place).partition(".")
                named[name] = f"{place}{CHILDREN.get(child, child)}.{rest}"
    return named
