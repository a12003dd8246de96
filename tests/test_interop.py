"""Checkpoints of other projects: states of exactly their names and layouts, made from modules of ours."""

import dataclasses
import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same
from pages import DOCS, block_with, blocks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

from densecl_ops import DenseProjectionHead, MomentumQueue
from densecl_ops.interop import Checkpoint, read_checkpoint, write_checkpoint

C, HIDDEN, D, K = 6, 5, 4, 8

# Our modules, and what stands for each of them in the names of a project.
OURS = "backbone_q head_q.image_mlp head_q.dense_mlp backbone_k head_k.image_mlp head_k.dense_mlp "
OURS += "image_queue dense_queue"
THEIRS = {
    "densecl": "encoder_q.0. encoder_q.1.mlp. encoder_q.1.mlp2. encoder_k.0. encoder_k.1.mlp. encoder_k.1.mlp2. "
    "queue queue2",
    "mmpretrain": "backbone. neck.mlp. neck.mlp2. encoder_k.module.0. encoder_k.module.1.mlp. encoder_k.module.1.mlp2. "
    "queue queue2",
    "moco": "module.encoder_q. module.encoder_q.fc. - module.encoder_k. module.encoder_k.fc. - module.queue -",
    "moco v1": "module.encoder_q. - - module.encoder_k. - - module.queue -",  # its one Linear is no head of ours
    "moco without key side": "module.encoder_q. module.encoder_q.fc. - - - - - -",
    "lightly": "model.backbone. model.projection_head_global.layers. model.projection_head_local.layers. "
    "model.backbone_momentum. model.projection_head_global_momentum.layers. "
    "model.projection_head_local_momentum.layers. - -",
}
NAMES = {project: dict(zip(OURS.split(), names.split(), strict=True)) for project, names in THEIRS.items()}
WRITTEN = [project for project in NAMES if project != "lightly"]
BESIDE = {  # what has no place in our modules
    "moco v1": {f"module.encoder_{side}.fc.weight": torch.ones(D, C) for side in "qk"},
    "mmpretrain": {"encoder_k.steps": torch.tensor(1234)},
    "lightly": {"criterion.memory_bank.bank": torch.ones(K, D)},
}


def resnet(classes: int | None = None) -> nn.Sequential:
    """Children of a torchvision ResNet in its order, with one stage of four."""
    block = OrderedDict(conv1=nn.Conv2d(C, C, 3, 2, 1, bias=False), bn1=nn.BatchNorm2d(C))
    stem = OrderedDict(conv1=nn.Conv2d(3, C, 3, bias=False), bn1=nn.BatchNorm2d(C), relu=nn.ReLU())
    children = OrderedDict(**stem, maxpool=nn.MaxPool2d(2), layer1=nn.Sequential(nn.Sequential(block)))
    if classes is not None:
        children.update(avgpool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(C, classes))
    return nn.Sequential(children)


def modules(channels: int = C, hidden: int = HIDDEN, dim: int = D, size: int = K) -> Any:
    """Of a run, in the order of an optimizer of densecl and mmpretrain; no two entries are alike."""
    parts = nn.ModuleDict()
    for side in "qk":
        parts.update({f"backbone_{side}": resnet(), f"head_{side}": DenseProjectionHead(channels, hidden, dim)})
    for x in parts.state_dict().values():
        x.add_(torch.rand(x.shape) if x.ndim == 1 else 0)
    for part, position in (("image_queue", 3), ("dense_queue", 6)):
        parts[part] = MomentumQueue(size, dim)
        parts[part].position.fill_(position)
    return parts


def entries(ours: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in ours.state_dict().items()}


def theirs(project: str, ours: Any = None) -> dict[str, Tensor]:
    """The state dict of the project's own run."""
    ours, state = ours or modules(), OrderedDict()
    for name, begin in NAMES[project].items():
        inside = ours.get_submodule(name).state_dict()
        if "queue" in name:
            inside = {"": inside["rows"].t(), "_ptr": inside["position"].reshape(1)}
        elif project == "lightly" and name.startswith("backbone"):
            inside = nn.Sequential(*ours[name].children()).state_dict()  # whose names are numbers
        elif project == "lightly":  # Linears alone
            inside = {entry: x.flatten(1) if x.ndim > 1 else x for entry, x in inside.items()}
        state |= {begin + entry: x.clone() for entry, x in inside.items() if begin != "-"}
    if project == "densecl":
        state |= {f"backbone.{entry}": x for entry, x in entries(ours["backbone_q"]).items()}
    return state | BESIDE.get(project, {})


def full(project: str, ours: Any = None) -> dict[str, Any]:
    """What a trainer saves."""
    ours = ours or modules()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1, momentum=0.9)
    sum(p.square().sum() for p in ours.parameters()).backward()
    optimizer.step()
    state = theirs(project, ours)
    return {"meta": {"epoch": 7, "iter": 99}, "state_dict": state, "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("project", WRITTEN)
@pytest.mark.parametrize("rename", [str, "module.{}".format, lambda x: x.replace(".layer1.", ".layer1._orig_mod.")])
@pytest.mark.parametrize("bare", [False, True])
def test_round_trip_bit_for_bit(project: str, rename: Any, bare: bool, tmp_path: Path) -> None:
    """Under DistributedDataParallel, too, and with names of compiled layers, which are plain in what is written."""
    source = full(project)
    state = {rename(entry): x for entry, x in source["state_dict"].items()}
    for entry in [entry for entry in state if entry.endswith("bn1.weight")]:
        state[entry] = torch.tensor([float("nan"), -0.0, *range(C - 2)])
    torch.save(state if bare else source | {"state_dict": state}, tmp_path / "theirs.pth")
    checkpoint = read_checkpoint(tmp_path / "theirs.pth")
    assert checkpoint.format == project.split()[0]
    returned = write_checkpoint(checkpoint, tmp_path / "back.pth", format=checkpoint.format)
    plain = {entry.replace("_orig_mod.", ""): x for entry, x in state.items()}
    assert_same(returned, plain if bare else source | {"state_dict": plain})
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), returned)


@pytest.mark.parametrize("project", NAMES)
def test_read_into_modules(project: str) -> None:
    """Bit for bit; what the project has not stays as it is."""
    ours, loaded = modules(), modules()
    state, wanted, before = theirs(project, ours), entries(ours), entries(loaded)
    missing = tuple(name for name, begin in NAMES[project].items() if begin == "-")
    checkpoint = read_checkpoint(state)
    held = {part: module for part, module in loaded.items() if getattr(checkpoint, part) is not None}
    kept = checkpoint.load_into(**held, keep_dense=True)
    assert list(checkpoint.unmapped) == list(BESIDE.get(project, {}))
    assert kept == [name for name in wanted if name.startswith(missing) and name.partition(".")[0] in held]
    assert_same(entries(loaded), {name: (before if name.startswith(missing) else wanted)[name] for name in wanted})
    order = [x for name, x in state.items() if name.endswith(("weight", "bias"))]
    for p, x in zip(loaded.parameters(), order, strict=False) if not missing else ():
        assert torch.equal(p, x), "an optimizer's numbers would mean others"


def test_between_formats(defaults: None) -> None:
    """Modules -> densecl -> mmpretrain -> modules loses nothing. An EMA counter of 0 would restart the key side."""
    with torch.device("cpu"):
        ours = modules().float()
        source, moco, steps = full("densecl", ours), theirs("moco"), torch.tensor(1)
        wanted = theirs("mmpretrain", ours) | {"encoder_k.steps": steps}
        live = Checkpoint.from_modules(**ours, extra={name: source[name] for name in ("meta", "optimizer")})
        for part in ("backbone_q", "head_q"):
            nn.init.zeros_(next(ours[part].parameters()))  # training goes on
    with torch.inference_mode():
        assert_same(write_checkpoint(live), source)
        there = write_checkpoint(read_checkpoint(source), format="mmpretrain")
        assert_same(there["state_dict"], wanted)
        assert_same(write_checkpoint(read_checkpoint(there), format="densecl"), source)
        stepless = {name: x for name, x in there["state_dict"].items() if name != "encoder_k.steps"}
        for state in (there, stepless):  # by default the format that was read
            assert_same(write_checkpoint(read_checkpoint(state)), state)
    read_checkpoint(there).load_into(**ours)
    assert_same(theirs("densecl", ours), source["state_dict"])
    live = dataclasses.replace(read_checkpoint(moco), format="densecl_ops", prefix="")
    for prefix, seen in ((None, "module.queue"), ("", "queue")):  # main_moco.py trains under DistributedDataParallel
        assert seen in write_checkpoint(live, format="moco", prefix=prefix)["state_dict"]


def holding(names: str) -> dict[str, Tensor]:
    """A state dict with a network below each name that ends in a dot, and one entry of each other name."""
    state = {}
    for name in names.split():
        inside = modules()["backbone_q"].state_dict() if name.endswith(".") else {"": torch.ones(4, 4)}
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
NUMBERED = {f"features.{name}": x for name, x in entries(nn.Sequential(*resnet().children())).items()}
FILES = {case: (names.split()[0], holding(names)) for case, names in BACKBONES.items()}
FILES |= {project: (NAMES[project]["backbone_q"], theirs(project)) for project in NAMES}
FILES["cut into numbers"] = "features.", NUMBERED | holding("head.weight")
NET = holding("net.")
FILES["one module under two names"] = "net.", NET | {f"online.{name}": x for name, x in NET.items()}
FILES["plain"] = "", dict(resnet().state_dict()) | holding("head.weight")


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", FILES)
def test_the_backbone_of_any_training_checkpoint(case: str, given: bool) -> None:
    """It alone is read, with or without its prefix, and written with plain names and nothing else."""
    place, state = FILES[case]
    source = {"epoch": 3, "optimizer": {"state": {}}, "state_dict": state}
    checkpoint = read_checkpoint(source, format="backbone", prefix=place if given else None)
    assert (checkpoint.format, checkpoint.prefix) == ("backbone", place)
    written, wanted = write_checkpoint(checkpoint), resnet()
    assert list(written) == list(wanted.state_dict())
    inside = [x for name, x in state.items() if name.startswith(place) and ".fc." not in f".{name}"]
    assert_same(list(written.values()), inside[: len(written)])
    assert len(checkpoint.unmapped) == len(state) - len(written)
    assert checkpoint.load_into(backbone_q=wanted) == []
    assert next(iter(write_checkpoint(checkpoint, prefix="backbone."))) == "backbone.conv1.weight"
    assert re.search(r"unmapped=\d+ entries \(\w+", repr(checkpoint)) or case == "OpenMMLab's"


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


WRAPPERS = {
    "none": lambda module: module,
    "compile": torch.compile,
    "DataParallel": lambda module: nn.DataParallel(module),
    "AveragedModel": lambda module: AveragedModel(module),
    "DistributedDataParallel": lambda module: nn.parallel.DistributedDataParallel(module),
    "checkpoint": checkpoint_wrapper,
    "FSDP": lambda module: nn.Sequential(OrderedDict(_fsdp_wrapped_module=module)),  # of its first version
    "cut into numbers": lambda module: nn.Sequential(*module.children()),
    "FSDP2": lambda module: fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,))),
}


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", [*WRAPPERS][:-2])  # nothing may copy FSDP2's, and a block has no names to find again
def test_wrapped_modules(outer: str, inner: str) -> None:
    """Plain names out of wrapped modules, and plain names into them; a cut ResNet has its names in every file."""
    plain, wrapped = resnet(), resnet()
    wrapped.layer1[0] = WRAPPERS[inner](wrapped.layer1[0])
    wrapped = WRAPPERS[outer](wrapped)
    assert Checkpoint.from_modules(backbone_q=plain).load_into(backbone_q=wrapped) == []
    checkpoint = Checkpoint.from_modules(backbone_q=wrapped)
    assert {type(value) for value in checkpoint.backbone_q.values()} == {Tensor}
    averages = [x for name, x in wrapped.state_dict().items() if name.endswith("n_averaged")]
    assert all(averages), "the next update would copy over what was loaded"
    assert_same(dict(checkpoint.backbone_q), dict(plain.state_dict()))
    assert list(write_checkpoint(checkpoint, format="backbone")) == list(plain.state_dict())
    with pytest.raises(ValueError, match=r"backbone_q.layer1.0.conv1.weight: got nothing, expected shape"):
        dataclasses.replace(checkpoint, backbone_q={}).load_into(backbone_q=wrapped)


DENSECL = theirs("densecl")
UNKNOWN = "net.layers.0.norm.weight net.neck.weight net.fc.weight net.projector.0.weight"


def read(source: Any, *args: Any, **options: Any) -> Callable[[], Any]:
    """Of a text for `holding`, or of anything else."""
    return lambda: read_checkpoint(holding(source) if isinstance(source, str) else source, *args, **options)


def write(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: write_checkpoint(Checkpoint.from_modules(**{**modules(), **changes}), "no.pth", name)


def mismatched() -> None:
    others = {"backbone_q": resnet().to("meta"), "head_k": DenseProjectionHead(C, HIDDEN + 1, D)}
    state = DENSECL | {"encoder_k.0.extra": torch.ones(4, 8)}
    del state["encoder_q.1.mlp2.0.bias"]
    read_checkpoint(state).load_into(**{**modules(), **others, "dense_queue": MomentumQueue(K + 1, D)})


NORMED = DenseProjectionHead(C, HIDDEN, D, norm_layer=nn.BatchNorm2d)
NESTED = "got a mapping of mappings.*"
REFUSED = [
    (
        read({name: DENSECL[name] for name in DENSECL if name != "queue_ptr"}),
        r"queue_ptr: got shapes \(4, 8\) and None, expected \(D, K\) and",
    ),
    (read(theirs("mmpretrain") | {"queue2": torch.ones(8)}), r"queue2 and queue2_ptr: got shapes \(8,\) and \(1,\)"),
    (read(DENSECL | {"queue": [1.0]}), "queue: got list, expected a tensor"),
    (read(DENSECL | {"backbone.bn1.bias": torch.zeros(C)}), "got other values than encoder_q.0.bn1.bias"),
    (read(holding("net. net._orig_mod.")), "with and without the names of wrappers"),
    (read("student. teacher."), r"2 networks.*'student.' \(ResNet or HRNet\), 'teacher.' \(ResNet"),
    (read("encoder_k."), r"momentum encoders alone.*'encoder_k.' \(ResNet or HRNet\)"),
    (read(UNKNOWN, "backbone"), "Known networks: ResNet or HRNet, .*prefix= before its names, of '', 'net.'"),
    (read("fc.weight", "backbone", prefix=""), "got names such as fc.weight"),
    (read(".", "moco"), "got names .*, expected those of 'moco'"),
    (read(DENSECL, prefix="model."), "prefix: got 'model.', .* one of encoder_q.0., "),
    (read({"teacher": holding("net."), "adam": {"step": torch.ones(1)}}), rf"{NESTED}: content\['teacher'\]$"),
    (read({"model": {"a": {"b": holding("x.")}, "c": {}}}), rf"{NESTED}: content\['model'\]\['a'\]\['b'\]$"),
    (read({"teacher": {}}), f"{NESTED}none of them holds weights"),
    (read(3), "source: got int, expected a path or a mapping"),
    (read({"state_dict": 3}), "state_dict: got int"),
    (read({}), "source: got content without entries, expected a state dict"),
    (read({}, "mmcv"), "format: got 'mmcv'"),
    (read({}, prefix=3), "prefix: got int"),
    (lambda: read_checkpoint(theirs("moco")).load_into(**modules()), r"(?s)nothing.*keep_dense.*queue: got.*\(moco\)"),
    (write("densecl", head_q=NORMED), "head_q.image_mlp.5.weight: got an entry that the format has no place for"),
    (write("moco"), "(?s)head_k.dense_mlp.0.weight: got an entry.*dense_queue.rows: got an entry"),
    (write("mmpretrain", image_queue=MomentumQueue(K, D, init="empty")), "image_queue.count: got 0 of 8 rows"),
    (write("densecl", backbone_q=resnet(classes=3)), "backbone_q.fc.weight: got an entry"),
    (write("densecl", backbone_q=None, head_k=None), "(?s)backbone_q: got None.*head_k: got None"),
    (write("backbone", backbone_q=None), r"backbone_q: got a checkpoint \(densecl_ops\) without it"),
    (write("lightly"), "format: got 'lightly', expected one of 'densecl'"),
    (
        lambda: write_checkpoint(read_checkpoint(full("moco v1")), format="densecl"),
        r"(?s)extra: got meta, optimizer of a moco run.*unmapped: got module.encoder_q.fc.weight.*unmapped=\{\}",
    ),
    (lambda: write_checkpoint(Checkpoint(), prefix=3), "prefix: got int"),
    (lambda: write_checkpoint({}), "checkpoint: got dict"),
    (lambda: Checkpoint().load_into(head_q={}), "head_q: got dict, expected a torch.nn.Module"),
    (lambda: Checkpoint().load_into(), "got no module"),
    (lambda: Checkpoint().load_into(keep_dense=1), "keep_dense: got 1"),
    (
        mismatched,  # all in one message
        r"(?s)backbone_q: got a module on meta.*to_empty.*backbone_k.extra: got shape \(4, 8\), expected no such entry"
        r".*head_q.dense_mlp.0.bias: got nothing.*head_k.image_mlp.0.weight: got shape \(5, 6\), expected \(6, 6\)"
        r".*dense_queue.rows: got shape",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not read, written or loaded, and why. Nothing is left of it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        call()
    assert not list(tmp_path.iterdir())


def test_an_unknown_network_below_its_prefix() -> None:
    unknown = read_checkpoint(holding(UNKNOWN), "backbone", prefix="net.")
    assert list(write_checkpoint(unknown)) == ["layers.0.norm.weight", "neck.weight"]


def test_nothing_is_loaded_where_a_module_itself_refuses() -> None:
    """A queue looks at position and count, after the backbone and an average took theirs."""
    ours = modules()
    ours["backbone_k"] = AveragedModel(resnet())
    before = entries(ours)
    with pytest.raises(ValueError, match=r"(?s)image_queue: got entries that the module refuses.*position"):
        read_checkpoint(DENSECL | {"queue_ptr": torch.tensor([K])}).load_into(**ours)
    assert_same(entries(ours), before)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lines of advice for a file that holds more keep what mmengine resumes from: meta, with epoch and iter."""
    monkeypatch.chdir(tmp_path)
    source = full("mmpretrain")
    torch.save(source | {"message_hub": SimpleNamespace()}, "old.pth")
    with pytest.raises(
        ValueError, match=r"(?s)weights_only=True\) refuses.*SimpleNamespace.*If you trust it"
    ) as refusal:
        read_checkpoint("old.pth")
    exec("\n".join(line.strip() for line in str(refusal.value).splitlines()[1:]), {"torch": torch})
    assert_same(write_checkpoint(read_checkpoint("plain.pth")), source)
    torch.save([1], "list.pth")
    Path("text.pth").write_text("hello")
    Path("cut.pth").write_bytes(Path("list.pth").read_bytes()[:200])
    for name, error, message in (
        ("list.pth", TypeError, "got a file with a list"),
        ("text.pth", ValueError, "text.pth: got a file that torch cannot read"),
        ("cut.pth", ValueError, "cut.pth: got a file that torch cannot read"),
        ("none.pth", FileNotFoundError, "none.pth"),
    ):
        with pytest.raises(error, match=message):
            read_checkpoint(name)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snippets, on files with heads and queues of the paper's sizes; a small ResNet stands for torchvision's."""
    monkeypatch.chdir(tmp_path)
    source, start = (full(name, modules(2048, 2048, 128, 65536)) for name in ("densecl", "moco"))
    torch.save(source, "densecl.pth")
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": start["state_dict"]}, "moco_v2.pth.tar")
    space: dict[str, Any] = {"torchvision": SimpleNamespace(models=SimpleNamespace(resnet50=lambda: resnet(10)))}
    for block in blocks(DOCS / "checkpoints.md"):
        if "import transformers" not in block or importlib.util.find_spec("transformers"):
            exec(block.replace("import torchvision", ""), space)
    back = torch.load("continued.pth", weights_only=True)
    assert_same(back, source | {"meta": back["meta"]})
    for name in ("for_detection.pth", "plain.pth"):
        assert list(torch.load(name, weights_only=True)) == list(resnet().state_dict())
    last = space["parts"]["head_k"].image_mlp[2].weight
    assert torch.equal(last, start["state_dict"]["module.encoder_k.fc.2.weight"])
    assert torch.equal(*(space["parts"][head].dense_mlp[0].weight for head in ("head_q", "head_k")))


@pytest.mark.parametrize("package", ["torchvision", "timm", "transformers"])
def test_page_on_weights(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's block of docs/use-the-weights.md, on a ResNet-50 without classifier."""
    pytest.importorskip(package)
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    weights = timm.create_model("resnet50", num_classes=0).state_dict()
    torch.save(weights, "backbone.pth")
    space: dict[str, Any] = {}
    exec(block_with(f"import {package}", "use-the-weights.md"), space)
    loaded = {name.removeprefix("_backbone."): x for name, x in space["model"].state_dict().items()}
    assert_same({name: loaded[name] for name in weights}, dict(weights))
