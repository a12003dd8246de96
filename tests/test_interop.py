"""Checkpoints of other projects against stand-ins: module trees with exactly their names, shapes and arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from densecl_ops import DenseCorrespondence, DenseProjectionHead, MomentumQueue
from densecl_ops.interop import Checkpoint, read_checkpoint, write_checkpoint

C, HIDDEN, D, K = 6, 5, 4, 8
PARTS = ("backbone_q", "backbone_k", "head_q", "head_k", "image_queue", "dense_queue")
PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)) + self.downsample(x))


def resnet(channels: int = C, classes: int | None = None) -> nn.Sequential:
    """Children of a torchvision ResNet in its order, with one stage of four."""
    children: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, channels, 3, bias=False),
        "bn1": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(2),
        "layer1": nn.Sequential(Block(channels)),
    }
    if classes is not None:
        children |= {"avgpool": nn.AdaptiveAvgPool2d(1), "fc": nn.Linear(channels, classes)}
    return nn.Sequential(OrderedDict(children))


class Neck(nn.Module):
    """DenseCL's neck: names and arithmetic of mmselfsup's."""

    def __init__(self, channels: int = C, hidden: int = HIDDEN, dim: int = D) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.mlp2 = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dense = self.mlp2(x)
        return self.mlp(F.adaptive_avg_pool2d(x, 1).flatten(1)), dense, F.adaptive_avg_pool2d(dense, 1).flatten(1)


def add_queue(module: nn.Module, name: str, position: int, size: int = K, dim: int = D) -> None:
    module.register_buffer(name, F.normalize(torch.randn(dim, size), dim=0))
    module.register_buffer(f"{name}_ptr", torch.tensor([position]))


def scramble(module: nn.Module) -> nn.Module:
    """No two entries alike, key side unlike query side."""
    for x in module.state_dict(keep_vars=True).values():
        if x.is_floating_point() and x.ndim != 2:
            x.data.add_(torch.rand(x.shape))
    return module


def densecl(channels: int = C, hidden: int = HIDDEN, dim: int = D, size: int = K) -> nn.Module:
    model = nn.Module()
    model.encoder_q = nn.Sequential(resnet(), Neck(channels, hidden, dim))
    model.encoder_k = nn.Sequential(resnet(), Neck(channels, hidden, dim))
    model.backbone = model.encoder_q[0]
    add_queue(model, "queue", 3, size, dim)
    add_queue(model, "queue2", 6, size, dim)
    return scramble(model)


def mmpretrain() -> nn.Module:
    model = nn.Module()
    model.backbone, model.neck, model.encoder_k = resnet(), Neck(), nn.Module()
    model.encoder_k.module = nn.Sequential(resnet(), Neck())
    model.encoder_k.register_buffer("steps", torch.tensor(1234))
    add_queue(model, "queue", 3)
    add_queue(model, "queue2", 6)
    return scramble(model)


def moco(channels: int = C, dim: int = D, size: int = K, version: int = 2) -> nn.Module:
    model = nn.Module()
    for side in ("encoder_q", "encoder_k"):
        encoder = resnet(classes=dim)
        if version == 2:
            encoder.fc = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))
        setattr(model, side, encoder)
    add_queue(model, "queue", 5, size, dim)
    wrapped = nn.Module()
    wrapped.module = scramble(model)  # as under DistributedDataParallel
    return wrapped


def full(model: nn.Module) -> dict[str, Any]:
    """What a trainer saves."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    return {
        "meta": {"epoch": 7, "iter": 99},
        "state_dict": OrderedDict((name, x.clone()) for name, x in model.state_dict().items()),
        "optimizer": optimizer.state_dict(),
    }


def modules() -> dict[str, nn.Module]:
    heads = {f"head_{x}": DenseProjectionHead(C, HIDDEN, D) for x in "qk"}
    queues = {f"{x}_queue": MomentumQueue(K, D) for x in ("image", "dense")}
    return {"backbone_q": resnet(), "backbone_k": resnet(), **heads, **queues}


def assert_same(seen: Any, wanted: Any, where: str = "") -> None:
    """Names, types, shapes and bits of nested dictionaries."""
    if isinstance(wanted, dict):
        assert list(map(str, sorted(seen, key=str))) == list(map(str, sorted(wanted, key=str))), where
        for name in wanted:
            assert_same(seen[name], wanted[name], f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(seen) == len(wanted), where
        for one, other in zip(seen, wanted, strict=True):
            assert_same(one, other, where)
    elif isinstance(wanted, Tensor):
        assert seen.dtype == wanted.dtype, where
        assert seen.shape == wanted.shape, where
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (seen, wanted)]
        assert torch.equal(*bits), where
    else:
        assert seen == wanted, where


MODELS = {"densecl": densecl, "mmpretrain": mmpretrain, "moco": moco}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_round_trip_bit_for_bit(name: str, wrapped: bool, bare: bool, tmp_path: Path) -> None:
    model: Any = MODELS[name]()
    if wrapped:
        model, inner = nn.Module(), model
        model.module = inner
    source = full(model)
    source["state_dict"][next(n for n in source["state_dict"] if n.endswith("bn1.weight"))][:2] = torch.tensor(
        [float("nan"), -0.0]
    )
    if name == "densecl":
        prefix = "module." * wrapped
        source["state_dict"][f"{prefix}backbone.bn1.weight"] = source["state_dict"][f"{prefix}encoder_q.0.bn1.weight"]
    source = source["state_dict"] if bare else source
    torch.save(source, tmp_path / "theirs.pth")
    checkpoint = read_checkpoint(tmp_path / "theirs.pth")
    assert checkpoint.format == name
    returned = write_checkpoint(checkpoint, tmp_path / "back.pth", format=name)
    assert_same(returned, source)
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), source)


@pytest.mark.parametrize("name", ["densecl", "mmpretrain"])
def test_loaded_modules_compute_what_theirs_do(name: str) -> None:
    model = MODELS[name]().double()
    ours = {part: module.double() for part, module in modules().items()}
    assert read_checkpoint(model.state_dict()).load_into(**ours) == []
    theirs_q = (model.encoder_q[0], model.encoder_q[1]) if name == "densecl" else (model.backbone, model.neck)
    theirs_k = model.encoder_k if name == "densecl" else model.encoder_k.module
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    for side, (backbone, neck) in (("q", theirs_q), ("k", theirs_k)):
        features = backbone(images)
        assert_close(ours[f"backbone_{side}"](images), features, 1e-14)
        for seen, wanted in zip(ours[f"head_{side}"](features), neck(features), strict=True):
            assert_close(seen, wanted, 1e-12)
    order = [p for x in ("backbone_q", "head_q", "backbone_k", "head_k") for p in ours[x].parameters()]
    assert_same(order, list(model.parameters()))  # so that an optimizer's numbers mean the same
    for queue, theirs in (("image_queue", "queue"), ("dense_queue", "queue2")):
        assert torch.equal(ours[queue].rows, getattr(model, theirs).T)
        assert int(ours[queue].position) == int(getattr(model, f"{theirs}_ptr"))
        assert int(ours[queue].count) == K


def test_between_formats() -> None:
    """densecl -> mmpretrain -> densecl loses nothing; the EMA counter is not 0, which would restart the key side."""
    source = full(densecl())
    there = write_checkpoint(read_checkpoint(source), format="mmpretrain")
    mmpretrain().load_state_dict(there["state_dict"])  # strict
    assert int(there["state_dict"]["encoder_k.steps"]) == 1
    assert_same(write_checkpoint(read_checkpoint(there)), there)  # by default the format that was read
    assert_same(write_checkpoint(read_checkpoint(there), format="densecl"), source)
    kept = write_checkpoint(read_checkpoint(full(mmpretrain())), format="mmpretrain")
    assert int(kept["state_dict"]["encoder_k.steps"]) == 1234
    stepless = dict(mmpretrain().state_dict())
    del stepless["encoder_k.steps"]
    assert_same(write_checkpoint(read_checkpoint(stepless), format="mmpretrain"), stepless)


def test_modules_to_file_and_back(tmp_path: Path) -> None:
    ours = modules()
    ours["image_queue"].enqueue(torch.randn(3, D))
    checkpoint = Checkpoint.from_modules(**ours, extra={"epoch": 4})
    wanted = {part: copy.deepcopy(dict(module.state_dict())) for part, module in ours.items()}
    ours["image_queue"].enqueue(torch.randn(3, D))  # the checkpoint is a copy
    nn.init.zeros_(ours["head_q"].image_mlp[0].weight)
    write_checkpoint(checkpoint, tmp_path / "run.pth")
    densecl().load_state_dict(torch.load(tmp_path / "run.pth", weights_only=True)["state_dict"])  # strict
    again = read_checkpoint(str(tmp_path / "run.pth"))
    assert again.extra == {"epoch": 4}
    for part in PARTS:
        assert_same(getattr(again, part), wanted[part], part)


def test_moco_start() -> None:
    model = moco()
    checkpoint = read_checkpoint(model.state_dict())
    ours = {**modules(), **{f"head_{x}": DenseProjectionHead(C, C, D) for x in "qk"}}
    del ours["dense_queue"]
    before = {part: copy.deepcopy(ours[part].dense_mlp.state_dict()) for part in ("head_q", "head_k")}
    with pytest.raises(ValueError, match=r"head_q.dense_mlp.0.weight: got nothing.*keep_dense=True"):
        checkpoint.load_into(**ours)
    kept = checkpoint.load_into(**ours, keep_dense=True)
    names = [f"dense_mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    assert kept == [f"{part}.{name}" for part in ("head_q", "head_k") for name in names]
    for part in before:
        assert_same(dict(ours[part].dense_mlp.state_dict()), dict(before[part]))
    features = torch.randn(2, C, 3, 3)
    wanted = model.module.encoder_q.fc(features.mean((2, 3)))
    assert_close(ours["head_q"](features).image, wanted, 1e-6)
    assert torch.equal(ours["image_queue"].rows, model.module.queue.T)
    back = dataclasses.replace(checkpoint, format="densecl_ops", prefix="")
    moco().load_state_dict(write_checkpoint(back, format="moco")["state_dict"])  # strict: under main_moco.py's prefix
    assert "queue" in write_checkpoint(back, format="moco", prefix="")["state_dict"]


def test_moco_without_its_key_side_and_v1() -> None:
    state = {name: x for name, x in moco().state_dict().items() if ".encoder_q." in name}
    checkpoint = read_checkpoint(state)
    assert checkpoint.backbone_k is checkpoint.head_k is checkpoint.image_queue is None
    assert_same(write_checkpoint(checkpoint, format="moco"), state)
    with pytest.raises(ValueError, match=r"image_queue: got a checkpoint \(moco\) without it"):
        checkpoint.load_into(image_queue=MomentumQueue(K, D))
    old = moco(version=1).state_dict()  # its one Linear is no head of ours
    checkpoint, queue = read_checkpoint(old), MomentumQueue(K, D)
    assert checkpoint.head_q is checkpoint.head_k is None
    checkpoint.load_into(backbone_q=resnet(), backbone_k=resnet(), image_queue=queue)
    assert torch.equal(queue.rows, old["module.queue"].T)
    assert_same(write_checkpoint(checkpoint), dict(old))


@pytest.mark.parametrize("dense", [False, True])
def test_lightly(dense: bool) -> None:
    """Its MoCo and DenseCL examples: backbones cut into numbers, heads of Linears, over positions 1x1 convs."""
    model, names = nn.Module(), ("projection_head_global", "projection_head_local") if dense else ("projection_head",)
    for suffix in ("", "_momentum"):
        model.add_module(f"backbone{suffix}", nn.Sequential(*resnet().children()))
        for name in names:
            layers = nn.Sequential(nn.Linear(C, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D))
            model.add_module(f"{name}{suffix}", nn.Sequential(OrderedDict(layers=layers)))
    state = {f"model.{name}": x for name, x in scramble(model).state_dict().items()}
    checkpoint = read_checkpoint({"state_dict": {**state, "criterion.memory_bank.bank": torch.ones(K, D)}})
    assert (checkpoint.format, checkpoint.prefix) == ("lightly", "model.")
    assert list(checkpoint.unmapped) == ["criterion.memory_bank.bank"]
    images = torch.randn(2, 3, 16, 16)
    for side, suffix in (("q", ""), ("k", "_momentum")):
        parts: Any = {f"backbone_{side}": resnet(), f"head_{side}": DenseProjectionHead(C, HIDDEN, D)}
        assert bool(checkpoint.load_into(**parts, keep_dense=not dense)) == (not dense)
        backbone, head = parts.values()
        features = getattr(model, f"backbone{suffix}")(images)
        assert_close(backbone(images), features, 1e-6)
        assert_close(head(features).image, getattr(model, f"{names[0]}{suffix}")(features.mean((2, 3))), 1e-5)
        if dense:
            tokens = getattr(model, f"{names[1]}{suffix}")(features.flatten(2).transpose(1, 2))
            assert_close(head(features).dense.flatten(2), tokens.transpose(1, 2), 1e-5)
    with pytest.raises(ValueError, match="format: got 'lightly', expected one of 'densecl'"):
        write_checkpoint(checkpoint)


def holding(names: str) -> dict[str, Tensor]:
    """A state dict with a network below each name that ends in a dot, and one entry of each other name."""
    state = {}
    for name in names.split():
        inside = scramble(resnet()).state_dict() if name.endswith(".") else {"": torch.ones(4, 4)}
        state |= {name + entry: x for entry, x in inside.items()}
    return state


# A training file; its query backbone comes first.
BACKBONES = {
    "OpenMMLab's": "backbone.",
    "with a classifier": "module. module.fc.weight module.fc.bias",
    "moco v3": "module.base_encoder. module.momentum_encoder. module.predictor.0.weight",
    "solo-learn": "backbone. momentum_backbone. projector.0.weight classifier.weight",
    "BYOL": "online.backbone. target.backbone. online.head.0.weight",
    "our MoCo loop": "encoder_q.backbone. encoder_k.backbone. encoder_q.head.image_mlp.0.weight image_queue.rows",
    "SwAV": "module. module.projection_head.0.weight module.prototypes.weight",
    "an average beside it": "model. model_ema. model.fc.weight",
    "a teacher alone": "teacher.backbone. teacher.head.mlp.0.weight",
}
PLACES = {
    "densecl": "encoder_q.0.",
    "mmpretrain": "backbone.",
    "moco": "module.encoder_q.",
    "moco v1": "module.encoder_q.",
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", [*PLACES, *BACKBONES, "plain", "cut into numbers"])
def test_the_backbone_of_any_training_checkpoint(case: str, given: bool) -> None:
    """It alone is read, with or without its prefix, and written with plain names and nothing else."""
    if case in PLACES:
        model = moco(version=1) if case == "moco v1" else MODELS[case]()
        state, place = model.state_dict(), PLACES[case]
    elif case in BACKBONES:
        state, place = holding(BACKBONES[case]), BACKBONES[case].split()[0]
    else:
        model, place = (resnet(), "") if case == "plain" else (nn.Sequential(*resnet().children()), "features.")
        state = {place + name: x for name, x in model.state_dict().items()} | holding("head.weight")
    source = {"epoch": 3, "optimizer": {"state": {}}, "state_dict": state}
    checkpoint = read_checkpoint(source, format="backbone", prefix=place if given else None)
    assert (checkpoint.format, checkpoint.prefix) == ("backbone", place)
    written, wanted = write_checkpoint(checkpoint), resnet()
    assert list(written) == list(wanted.state_dict())
    inside = [x for name, x in state.items() if name.startswith(place) and ".fc." not in f".{name}"]
    own = [x for x, _ in zip(inside, written, strict=False)]
    assert_same(list(written.values()), own)
    assert len(checkpoint.unmapped) == len(state) - len(written)
    assert checkpoint.load_into(backbone_q=wanted) == []
    assert next(iter(write_checkpoint(checkpoint, prefix="backbone."))) == "backbone.conv1.weight"
    assert re.search(r"unmapped=\d+ entries \(\w+", repr(checkpoint)) or case == "OpenMMLab's"


def test_backbones_that_must_be_chosen() -> None:
    """Two networks, momentum encoders alone, and a network whose names nobody knows: refused, with what is there."""
    two = holding("module.student. module.teacher.")
    with pytest.raises(ValueError, match=r"2 networks.*'module.student.' \(ResNet or HRNet\), 'module.teacher.' \(Res"):
        read_checkpoint(two, format="backbone")
    assert len(read_checkpoint(two, format="backbone", prefix="module.teacher.").unmapped) == len(two) // 2
    alias = {f"net.{name.removeprefix('online.net.')}": x for name, x in holding("online.net.").items()}
    alias |= {f"online.{name}": x for name, x in alias.items()}
    assert read_checkpoint(alias, format="backbone").prefix == "net."  # one module under two names
    with pytest.raises(ValueError, match=r"momentum encoders alone.*'encoder_k.' \(ResNet or HRNet\)"):
        read_checkpoint(holding("encoder_k."))
    unknown = holding("net.layers.0.norm.weight net.neck.weight net.fc.weight net.projector.0.weight")
    with pytest.raises(ValueError, match=r"Known networks: ResNet or HRNet, .*prefix= before its names, of 'net.', ''"):
        read_checkpoint(unknown, format="backbone")
    assert list(write_checkpoint(read_checkpoint(unknown, "backbone", prefix="net."))) == [
        "layers.0.norm.weight",
        "neck.weight",
    ]
    state = holding("backbone.")
    for content, message in (
        ({"teacher": state, "student": {}, "epoch": 3}, r"content\['teacher'\] \(ResNet or HRNet under 'backbone.'\)"),
        ({"model": {"a": {"trunk": state}}}, r"content\['model'\]\['a'\]\['trunk'\] \(ResNet or HRNet"),
        ({"state_dict": {"a": unknown}}, r"content\['state_dict'\]\['a'\] \(no known network\)"),
        ({"teacher": {}}, "none of them holds tensors"),
    ):
        with pytest.raises(ValueError, match=f"got a mapping of mappings.*{message}"):
            read_checkpoint(content)


# One name of the stem, one of the stages, and all kinds of others; then what such files hold beside the network.
NETWORKS = {
    "timm, DINO, MAE": "patch_embed.proj.weight blocks.0.attn.qkv.weight cls_token pos_embed reg_token norm.weight "
    "| decoder_pos_embed decoder_blocks.0.weight head.mlp.0.weight",
    "mmpretrain": "patch_embed.projection.weight layers.0.ln1.weight cls_token ln1.weight | neck.fc0.weight",
    "Swin": "patch_embed.proj.weight layers.0.blocks.0.norm1.weight norm.weight | head.fc.weight",
    "ViT of torchvision": "conv_proj.weight encoder.layers.encoder_layer_0.ln_1.weight class_token | heads.head.weight",
    "ViT of transformers": "embeddings.patch_embeddings.projection.weight layers.0.attention.q_proj.weight "
    "layernorm.weight | pooler.dense.weight classifier.weight",
    "ResNet of transformers": "embedder.embedder.weight encoder.stages.0.layers.0.shortcut.weight | classifier.weight",
    "HRNet": "conv1.weight layer1.0.conv1.weight transition1.0.0.weight stage2.0.branches.0.0.conv1.weight | fc.weight",
    "ConvNeXt of timm": "stem.0.weight stages.0.blocks.0.gamma head.norm.weight | head.fc.weight",
    "ConvNeXt": "downsample_layers.0.0.weight stages.0.0.gamma norm.weight | head.weight",
    "RegNet": "stem.conv.weight s1.b1.conv1.conv.weight | head.fc.weight",
    "EfficientNet": "conv_stem.weight blocks.0.0.conv_dw.weight bn1.weight conv_head.weight | classifier.weight",
    "ConvNeXt of torchvision": "features.0.0.weight features.1.0.layer_scale | classifier.0.weight",
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks_known_by_their_names(case: str) -> None:
    own, beside = (names.split() for names in NETWORKS[case].split("|"))
    there = [f"module.net.{name}" for name in [*own, *beside]] + [f"module.momentum_net.{name}" for name in own]
    checkpoint = read_checkpoint(holding(" ".join([*there, "module.predictor.0.weight", "queue"])))
    assert checkpoint.prefix == "module.net."
    assert list(write_checkpoint(checkpoint)) == own


class Behind(nn.Module):
    """What FSDP's first version does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


WRAPPERS = {
    "none": lambda module: module,
    "compile": torch.compile,
    "DataParallel": lambda module: nn.DataParallel(module),
    "AveragedModel": lambda module: torch.optim.swa_utils.AveragedModel(module),
    "DistributedDataParallel": lambda module: nn.parallel.DistributedDataParallel(module),
    "checkpoint": checkpoint_wrapper,
    "FSDP": Behind,
}


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", WRAPPERS)
def test_wrapped_modules(outer: str, inner: str) -> None:
    """Plain names out of wrapped modules, and plain names into them."""
    plain, wrapped = scramble(resnet()), resnet()
    wrapped.layer1[0] = WRAPPERS[inner](wrapped.layer1[0])
    wrapped = WRAPPERS[outer](wrapped)
    assert Checkpoint.from_modules(backbone_q=plain).load_into(backbone_q=wrapped) == []
    checkpoint = Checkpoint.from_modules(backbone_q=wrapped)
    assert_same(dict(checkpoint.backbone_q), dict(plain.state_dict()))
    assert list(write_checkpoint(checkpoint, format="backbone")) == list(plain.state_dict())
    with pytest.raises(ValueError, match=r"backbone_q.layer1.0.conv1.weight: got nothing, expected shape"):
        dataclasses.replace(checkpoint, backbone_q={}).load_into(backbone_q=wrapped)


@pytest.mark.usefixtures("one_process")
def test_shards_are_gathered_and_filled() -> None:
    plain, sharded = scramble(resnet()), resnet()
    fully_shard(sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    assert Checkpoint.from_modules(backbone_q=plain).load_into(backbone_q=sharded) == []
    state = Checkpoint.from_modules(backbone_q=sharded).backbone_q
    assert {type(value) for value in state.values()} == {Tensor}
    assert_same(dict(state), dict(plain.state_dict()))


def test_a_key_side_that_is_an_average() -> None:
    """The first update after loading averages; it would copy the query side over what was loaded."""
    query, key = resnet(), torch.optim.swa_utils.AveragedModel(resnet(), avg_fn=lambda k, q, n: k)
    loaded = scramble(resnet())
    Checkpoint.from_modules(backbone_k=loaded).load_into(backbone_k=key)
    key.update_parameters(query)
    assert_same(dict(key.module.named_parameters()), dict(loaded.named_parameters()))


def test_a_file_of_compiled_parts() -> None:
    """torch.compile of a part of the model leaves its name inside those of the file."""
    state = moco().state_dict()
    inside = {name.replace("encoder_q.", "encoder_q._orig_mod."): x for name, x in state.items()}
    assert_same(write_checkpoint(read_checkpoint(inside)), dict(state))
    with pytest.raises(ValueError, match="with and without the names of wrappers"):
        read_checkpoint(inside | dict(state))


@pytest.mark.parametrize("name", MODELS)
def test_under_inference_mode_and_other_defaults(name: str, defaults: None) -> None:
    with torch.device("cpu"):
        source = full(MODELS[name]())
        ours = {part: x.to(torch.float32) for part, x in modules().items()}
        if name == "moco":
            ours = {"backbone_q": ours["backbone_q"], "image_queue": ours["image_queue"]}
    with torch.inference_mode():
        checkpoint = read_checkpoint(copy.deepcopy(source))
        assert_same(write_checkpoint(checkpoint), source)
        if name == "densecl":
            there = write_checkpoint(checkpoint, format="mmpretrain")["state_dict"]
            assert {x.device.type for x in there.values()} == {"cpu"}
    checkpoint.load_into(**ours)
    for part in ours:
        assert all(x.device.type == "cpu" for x in ours[part].state_dict().values())


# Entry of a file, what it is instead (None: not there), and the message. The rest load_into can tell.
WRONG = [
    ("densecl", "queue_ptr", None, r"queue and queue_ptr: got shapes \(4, 8\) and None, expected \(D, K\) and \(1,\)"),
    ("densecl", "queue_ptr", torch.tensor(1), r"queue_ptr: got shapes \(4, 8\) and \(\), expected"),
    ("densecl", "queue", [1.0], "queue: got list, expected a tensor"),
    ("densecl", "backbone.bn1.bias", torch.zeros(C), "got other values than encoder_q.0.bn1.bias, expected a copy"),
    ("moco", "module.queue", None, r"queue and queue_ptr: got shapes None and \(1,\), expected"),
    ("mmpretrain", "queue2", torch.ones(8), r"queue2 and queue2_ptr: got shapes \(8,\) and \(1,\), expected"),
]


@pytest.mark.parametrize(("name", "entry", "value", "message"), WRONG)
def test_what_does_not_fit_is_named(name: str, entry: str, value: Any, message: str) -> None:
    state = dict(MODELS[name]().state_dict()) | {entry: value}
    with pytest.raises(ValueError, match=message):
        read_checkpoint({name: x for name, x in state.items() if x is not None})


def test_all_mismatches_in_one_message_and_nothing_loaded() -> None:
    ours = {**modules(), "head_k": DenseProjectionHead(C, HIDDEN + 1, D), "dense_queue": MomentumQueue(K + 1, D)}
    before = copy.deepcopy({part: dict(module.state_dict()) for part, module in ours.items()})
    changed = {**densecl().state_dict(), "encoder_k.0.extra": torch.ones(4, 8)}
    del changed["encoder_q.1.mlp2.0.bias"]
    message = (
        r"(?s)backbone_k.extra: got shape \(4, 8\), expected no such entry.*head_q.dense_mlp.0.bias: got nothing, "
        r"expected.*head_k.image_mlp.0.weight: got shape \(5, 6\), expected \(6, 6\).*dense_queue.rows: got shape"
    )
    with pytest.raises(ValueError, match=message):
        read_checkpoint(changed).load_into(**ours)
    assert_same({part: dict(module.state_dict()) for part, module in ours.items()}, before)
    with pytest.raises(ValueError, match=r"backbone_q.fc.weight: got nothing"):
        read_checkpoint(densecl().state_dict()).load_into(backbone_q=resnet(classes=10))


def test_a_module_on_meta_is_refused() -> None:
    """torch only warns, and loads nothing."""
    with pytest.raises(ValueError, match=r"backbone_q: got a module on meta, expected one with values.*to_empty"):
        read_checkpoint(densecl().state_dict()).load_into(backbone_q=resnet().to("meta"), head_q=modules()["head_q"])


def test_nothing_is_loaded_where_a_module_itself_refuses() -> None:
    """A queue looks at position and count, after the backbone and an average took theirs."""
    state = densecl().state_dict()
    state["queue_ptr"][0] = K
    average = torch.optim.swa_utils.AveragedModel(resnet())
    ours = {**modules(), "backbone_k": average}
    before = copy.deepcopy({part: dict(module.state_dict()) for part, module in ours.items()})
    with pytest.raises(ValueError, match=r"(?s)image_queue: got entries that the module refuses.*position"):
        read_checkpoint(state).load_into(**ours)
    assert_same({part: dict(module.state_dict()) for part, module in ours.items()}, before)


@pytest.mark.parametrize("cut", [False, True])
def test_a_cut_resnet_has_its_names(cut: bool) -> None:
    """Numbers that nn.Sequential gave are names in every file, and numbers again in the module."""
    named, numbered = resnet(), nn.Sequential(*resnet(classes=3).children())[:-2]
    first, second = (numbered, named) if cut else (named, numbered)
    checkpoint = Checkpoint.from_modules(backbone_q=scramble(first))
    assert list(write_checkpoint(checkpoint, format="backbone")) == list(named.state_dict())
    checkpoint.load_into(backbone_q=second)
    assert_same(list(first.state_dict().values()), list(second.state_dict().values()))


def test_what_a_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    ours = modules()

    def refused(message: str, format: str = "densecl", **changes: nn.Module) -> None:  # noqa: A002
        with pytest.raises(ValueError, match=message):
            write_checkpoint(Checkpoint.from_modules(**{**ours, **changes}), tmp_path / "no.pth", format)
        assert not (tmp_path / "no.pth").exists()

    normed = DenseProjectionHead(C, HIDDEN, D, norm_layer=nn.BatchNorm2d)
    refused("head_q.image_mlp.5.weight: got an entry that the format has no place for", head_q=normed)
    refused("(?s)head_k.dense_mlp.0.weight: got an entry.*dense_queue.rows: got an entry", "moco")
    refused("image_queue.count: got 0 of 8 rows, expected a full", image_queue=MomentumQueue(K, D, init="empty"))
    refused("backbone_q.fc.weight: got an entry", backbone_q=resnet(classes=3))
    partial = Checkpoint.from_modules(head_q=ours["head_q"])
    with pytest.raises(ValueError, match=r"(?s)backbone_q: got None.*dense_queue: got None"):
        write_checkpoint(partial)
    with pytest.raises(ValueError, match=r"backbone_q: got a checkpoint \(densecl_ops\) without it"):
        write_checkpoint(partial, format="backbone")
    whole = Checkpoint.from_modules(backbone_q=resnet(classes=3))
    assert list(write_checkpoint(whole, format="backbone")) == list(resnet().state_dict())
    started = dataclasses.replace(
        Checkpoint.from_modules(**ours), format="moco", extra={"optimizer": {}}, unmapped={"x": torch.ones(1)}
    )
    with pytest.raises(ValueError, match=r"(?s)extra: got optimizer of a moco run.*unmapped: got x.*unmapped=\{\}"):
        write_checkpoint(started, format="densecl")
    write_checkpoint(dataclasses.replace(started, extra={}, unmapped={}), format="densecl")


class Foreign:
    pass


def test_arguments_and_files(tmp_path: Path) -> None:
    torch.save({"state_dict": densecl().state_dict(), "message_hub": Foreign()}, tmp_path / "hub.pth")
    with pytest.raises(ValueError, match=r"(?s)weights_only=True\) refuses.*Foreign.*weights_only=False"):
        read_checkpoint(tmp_path / "hub.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:200])
    folder, state = tmp_path, densecl().state_dict()
    for call, error, message in (
        (lambda: read_checkpoint(folder / "list.pth"), TypeError, "got a file with a list"),
        (lambda: read_checkpoint(folder / "text.pth"), ValueError, r"text.pth: got a file that torch cannot read"),
        (lambda: read_checkpoint(folder / "cut.pth"), ValueError, r"cut.pth: got a file that torch cannot read"),
        (lambda: read_checkpoint(folder / "none.pth"), FileNotFoundError, "none.pth"),
        (lambda: read_checkpoint(3), TypeError, "source: got int, expected a path or a mapping"),
        (lambda: read_checkpoint({"state_dict": 3}), ValueError, "state_dict: got int"),
        (lambda: read_checkpoint(holding("net.weight")), ValueError, "got names such as net.weight, expected those of"),
        (lambda: read_checkpoint({}), ValueError, "prefix: got ''"),
        (
            lambda: read_checkpoint(holding("fc.weight"), "backbone", prefix=""),
            ValueError,
            "got names such as fc.weight",
        ),
        (lambda: read_checkpoint({}, format="mmcv"), ValueError, "format: got 'mmcv'"),
        (lambda: read_checkpoint(holding("."), format="moco"), ValueError, r"got names .*, expected those of 'moco'"),
        (lambda: read_checkpoint({}, prefix=3), TypeError, "prefix: got int"),
        (
            lambda: read_checkpoint(state, prefix="model."),
            ValueError,
            r"prefix: got 'model.', .* one of encoder_q.0., ",
        ),
        (lambda: write_checkpoint(Checkpoint(), format="lightly"), ValueError, "format: got 'lightly'"),
        (lambda: write_checkpoint(Checkpoint(), prefix=3), TypeError, "prefix: got int"),
        (lambda: write_checkpoint({}), TypeError, "checkpoint: got dict"),
        (lambda: Checkpoint().load_into(head_q={}), TypeError, "head_q: got dict, expected a torch.nn.Module"),
        (lambda: Checkpoint().load_into(), ValueError, "got no module"),
        (lambda: Checkpoint().load_into(keep_dense=1), TypeError, "keep_dense: got 1"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_advice_for_files_that_hold_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two lines keep what mmengine resumes from: meta, with epoch and iter."""
    monkeypatch.chdir(tmp_path)
    source = full(mmpretrain())
    torch.save(source | {"message_hub": Foreign()}, "old.pth")
    with pytest.raises(ValueError, match="If you trust it") as refusal:
        read_checkpoint("old.pth")
    exec("\n".join(line.strip() for line in str(refusal.value).splitlines()[1:]), {"torch": torch})
    assert_same(write_checkpoint(read_checkpoint("plain.pth")), source)


def test_saved_matches_and_projections() -> None:
    """torch.load takes them with its defaults, to look at them later."""
    maps = torch.randn(2, 16, 7, 7)
    for saved in (DenseCorrespondence()(maps, maps), DenseProjectionHead(16)(maps)):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert type(loaded) is type(saved)
        assert_same(list(loaded), list(saved))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snippets, on files with heads and queues of the paper's sizes; a small ResNet stands for torchvision's."""
    if importlib.util.find_spec("torchvision"):
        monkeypatch.setattr("torchvision.models.resnet50", lambda: resnet(classes=10))
    else:
        torchvision: Any = ModuleType("torchvision")
        torchvision.models = SimpleNamespace(resnet50=lambda: resnet(classes=10))
        monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.chdir(tmp_path)
    theirs = full(densecl(2048, 2048, 128, 65536))
    torch.save(theirs, "densecl.pth")
    start = moco(2048, 128, 65536)
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": start.state_dict()}, "moco_v2.pth.tar")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    for block in blocks:
        if "import transformers" not in block or importlib.util.find_spec("transformers"):
            exec(block, namespace)
    back = torch.load("continued.pth", weights_only=True)
    assert_same(back["state_dict"], theirs["state_dict"])
    assert_same(back["optimizer"], theirs["optimizer"])
    assert torch.load("for_mmpretrain.pth", weights_only=True)["state_dict"]["encoder_k.steps"] == 1
    assert list(torch.load("for_detection.pth", weights_only=True)) == list(resnet().state_dict())
    assert list(torch.load("plain.pth", weights_only=True)) == list(resnet().state_dict())
    parts = namespace["parts"]
    assert torch.equal(parts["image_queue"].rows, start.module.queue.T)
    assert torch.equal(parts["head_k"].image_mlp[2].weight, start.module.encoder_k.fc[2].weight)
    assert torch.equal(parts["head_k"].dense_mlp[0].weight, parts["head_q"].dense_mlp[0].weight)
    if "DenseCL" in namespace:
        hosted = namespace["DenseCL"](namespace["transformers"].PretrainedConfig())
        only = {name: x for name, x in hosted.state_dict().items() if "backbone" in name}
        hosted.save_pretrained(tmp_path / "hosted", state_dict=only)
        again = namespace["DenseCL"].from_pretrained(tmp_path / "hosted")
        assert again(*torch.randn(2, 4, 3, 64, 64))["loss"].isfinite()


@pytest.mark.parametrize("package", ["torchvision", "timm", "transformers"])
def test_page_on_weights(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's block of docs/use-the-weights.md, on a ResNet-50 without classifier."""
    pytest.importorskip(package)
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    weights = timm.create_model("resnet50", num_classes=0).state_dict()
    torch.save(weights, "backbone.pth")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.with_name("use-the-weights.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(next(block for block in blocks if f"import {package}" in block), space)
    loaded = {name.removeprefix("_backbone."): x for name, x in space["model"].state_dict().items()}
    assert_same({name: loaded[name] for name in weights}, dict(weights))
