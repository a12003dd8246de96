"""docs/conventions.md, line by line, on the libraries that are installed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pages import DOCS
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from densecl_ops import DenseProjectionHead, MomentumQueue


def table(heading: str) -> list[list[str]]:
    """Cells of the page's table under a heading, without their backquotes."""
    section = (DOCS / "conventions.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("`", "") for cell in line[1:-1].split("|")] for line in lines]


# ---- averaged weights -----------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.queue = nn.Linear(4, 4), MomentumQueue(64, 4, init="empty")


def averaged(wrapper: str, model: Model) -> tuple[Callable[[], Any], Callable[[], MomentumQueue]]:
    """The update of a wrapper that the page names, and its queue."""
    library, name = wrapper.split(" ", 1)
    name, _, option = name.partition("(")
    options = {} if not option else {option.split("=")[0]: option.rstrip(")").endswith("True")}
    if library in ("torch", "Lightning"):
        if library == "Lightning":  # the callback hands its options to AveragedModel
            callbacks = pytest.importorskip("lightning.pytorch.callbacks")
            options = {"use_buffers": callbacks.EMAWeightAveraging(**options)._use_buffers}
        wrapped = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), **options)
        return partial(wrapped.update_parameters, model), lambda: wrapped.module.queue
    if library == "timm":
        wrapped = getattr(pytest.importorskip("timm.utils"), name)(model, 0.9, **options)
        return partial(wrapped.update, model), lambda: wrapped.module.queue
    if library == "ema-pytorch":
        wrapped = pytest.importorskip("ema_pytorch").EMA(model, beta=0.9, update_after_step=0, update_every=1)
        return wrapped.update, lambda: wrapped.ema_model.queue
    if library == "mmengine":
        wrapped = getattr(pytest.importorskip("mmengine.model"), name)(model, momentum=0.1, **options)
        return partial(wrapped.update_parameters, model), lambda: wrapped.module.queue
    wrapped = getattr(pytest.importorskip("stable_pretraining"), name)(model)
    return wrapped.update_teacher, lambda: wrapped.teacher.queue


WRAPPERS = table("Averaged weights")


@pytest.mark.parametrize(("wrapper", "rows", "position", "count"), WRAPPERS, ids=[row[0] for row in WRAPPERS])
def test_averaged_weights(wrapper: str, rows: str, position: str, count: str) -> None:
    model = Model()
    update, queue = averaged(wrapper, model)
    states = []
    for _ in range(6):  # no batch norm anywhere: only the queue has buffers
        model.queue.enqueue(torch.randn(5, 4))
        update()
        states.append({name: value.clone() for name, value in model.queue.state_dict().items()})

    def what(name: str) -> str:
        seen = queue().state_dict()[name]
        if torch.equal(seen, states[-1][name]):
            return "copied"
        if torch.equal(seen, states[0][name]):
            return "first update's"
        return "averaged" if seen.any() else "0"

    assert [what("rows"), what("position"), what("count")] == [rows, position, count]


@pytest.mark.parametrize("norm", [False, True])
def test_lightning_averages_batch_norm_in_one_more_epoch(norm: bool) -> None:
    lightning = pytest.importorskip("lightning")
    callback = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4) if norm else nn.Identity())
            self.queue = MomentumQueue(64, 4, init="empty")

        def training_step(self, batch: list[Tensor], step: int) -> Tensor:
            self.queue.enqueue(batch[0])
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(6, 4)), batch_size=2)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = Module()
    lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[callback], **quiet).fit(module, data)
    assert int(module.queue.count) == (4 if norm else 3) * 6


# ---- backbones ------------------------------------------------------------------------------------------------------

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
    images = torch.randn(2, 3, 224, 224)
    if library == "timm":
        network = pytest.importorskip("timm").create_model(name, num_classes=0)
        features, vectors = network.forward_features(images), network(images)
        assert vectors.ndim == 2
    else:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
        network = getattr(transformers, f"{name}Model")(config)
        features = network(images).last_hidden_state
    channels, size = vectors.shape[1] if library == "timm" else None, tuple(features.shape[1:])
    if form == "NCHW":
        assert size[1:] == (7, 7)
    elif form == "NHWC":
        assert size == (7, 7, channels)
    else:
        before = size[0] - int(size[0] ** 0.5) ** 2
        assert (len(size), f"tokens, {before} before") == (2, form)
    features.sum().backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert {re.sub(r"\.(dense\.)?(weight|bias)$", "", name) for name in missing} == ({unused} if unused else set())


# ---- hosts ----------------------------------------------------------------------------------------------------------


def test_accelerate_leaves_other_methods_and_returns_float32() -> None:
    accelerate = pytest.importorskip("accelerate")

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DenseProjectionHead(8, 8, 4)

        def forward(self, features: Tensor) -> Any:
            projection = self.head(features)
            self.inside = projection.dense.dtype
            return projection

        def encode(self, features: Tensor) -> Any:
            return self.head(features)

    host = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(Host())
    features = torch.randn(2, 8, 3, 3)
    assert {x.dtype for x in host(features)} == {torch.float32}
    assert host.inside == torch.bfloat16
    assert host.encode(features).dense.dtype == torch.float32


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
