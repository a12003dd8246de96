"""Tables and initialisation of docs/conventions.md, on the libraries that are installed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from pages import DOCS
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from densecl_ops import DenseProjectionHead, MomentumQueue


def table(heading: str) -> list[list[str]]:
    """Cells of the page's table under a heading, without their backquotes."""
    section = (DOCS / "conventions.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("`", "") for cell in line[1:-1].split("|")] for line in lines]


# Library -> module, options, the update, and where the average is.
AVERAGES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "torch": ("torch.optim.swa_utils", {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, "update_parameters", "module"),
    "timm": ("timm.utils", {"decay": 0.9}, "update", "module"),
    "ema-pytorch": ("ema_pytorch", {"beta": 0.9, "update_after_step": 0, "update_every": 1}, "update", "ema_model"),
    "mmengine": ("mmengine.model", {"momentum": 0.1}, "update_parameters", "module"),
    "stable-pretraining": ("stable_pretraining", {}, "update_teacher", "teacher"),
}
WRAPPERS = table("Averaged weights")


@pytest.mark.parametrize(("wrapper", "rows", "position", "count"), WRAPPERS, ids=[row[0] for row in WRAPPERS])
def test_averaged_weights(wrapper: str, rows: str, position: str, count: str) -> None:
    library, name, option, value = re.fullmatch(r"(\S+) (\w+)(?:\((\w+)=(\w+)\))?", wrapper).groups()
    given = {option: value == "True"} if option else {}
    if library == "Lightning":  # the callback hands its options to AveragedModel
        callback = getattr(pytest.importorskip("lightning.pytorch.callbacks"), name)(**given)
        library, name, given = "torch", "AveragedModel", {"use_buffers": callback._use_buffers}
    module, options, update, place = AVERAGES[library]
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "queue": MomentumQueue(64, 4, init="empty")})
    average = getattr(pytest.importorskip(module), name)(model, **options, **given)
    states = []
    for _ in range(6):  # no batch norm anywhere: only the queue has buffers
        model["queue"].enqueue(torch.randn(5, 4))
        getattr(average, update)(*[model] * (place == "module"))
        states.append({name: x.clone() for name, x in model["queue"].state_dict().items()})

    def what(name: str) -> str:
        seen = getattr(average, place)["queue"].state_dict()[name]
        if torch.equal(seen, states[-1][name]):
            return "copied"
        if torch.equal(seen, states[0][name]):
            return "first update's"
        return "averaged" if seen.any() else "0"

    assert [what("rows"), what("position"), what("count")] == [rows, position, count]


MODELS = table("Backbones")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
CONFIGS: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 8, **PYRAMID},
    "ConvNext": PYRAMID,
    "Segformer": {},
    "Swin": {"embed_dim": 12, "depths": [1] * 4, "num_heads": [1] * 4},
    "ViT": TINY,
    "DeiT": TINY,
    "Dinov2": {"image_size": 224, "patch_size": 14, **TINY},
    "Dinov2WithRegisters": {"image_size": 224, "patch_size": 14, **TINY},
}


@pytest.mark.parametrize(("model", "form", "unused"), MODELS, ids=[row[0] for row in MODELS])
def test_backbones(model: str, form: str, unused: str) -> None:
    library, name = model.split()
    package, images, channels = pytest.importorskip(library), torch.randn(2, 3, 224, 224), None
    if library == "timm":
        network = package.create_model(name, num_classes=0)
        features, (_, channels) = network.forward_features(images), network(images).shape
    else:
        network = getattr(package, f"{name}Model")(getattr(package, f"{name}Config")(**CONFIGS[name]))
        features = network(images).last_hidden_state
    size = tuple(features.shape[1:])
    if len(size) == 2:
        seen = f"tokens, {size[0] - int(size[0] ** 0.5) ** 2} before"
    else:
        seen = {(7, 7, channels): "NHWC", (size[0], 7, 7): "NCHW"}[size]
    assert seen == form
    features.sum().backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert {re.sub(r"\.(dense\.)?(weight|bias)$", "", name) for name in missing} == ({unused} if unused else set())


def test_transformers_initialises_branches_apart(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")

    class Host(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.head_q = DenseProjectionHead(8, 8, 4)
            self.head_k, self.queue = copy.deepcopy(self.head_q), MomentumQueue(16, 4)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    host = Host(transformers.PretrainedConfig())
    assert not torch.equal(host.head_q.dense_mlp[0].weight, host.head_k.dense_mlp[0].weight)
    host.save_pretrained(tmp_path, state_dict=host.head_q.state_dict(prefix="head_q."))
    loaded = Host.from_pretrained(tmp_path).queue
    torch.testing.assert_close(loaded.rows.norm(dim=1), torch.ones(16))
    assert (int(loaded.position), int(loaded.count)) == (0, 16)
