"""docs/examples/pretrain.py, end to end at tiny settings, and its parts."""

from __future__ import annotations

import importlib.machinery
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same
from pages import DOCS, EXAMPLES, blocks
from torch import nn
from torch.utils.checkpoint import checkpoint

for module in ("kornia", "matplotlib", "PIL", "skimage", "tqdm"):
    pytest.importorskip(module)

from distributed_pretrain import pretrain, small_pair  # noqa: E402
from PIL import Image  # noqa: E402
from pretraining import (  # noqa: E402
    augment,
    backbones,
    checkpoints,
    decoding,
    images,
    options,
    processes,
    progress,
    stereo,
    streams,
)

from densecl_ops.interop import read_checkpoint  # noqa: E402

TINY = ["--steps", "4", "--batch-size", "4", "--lambda-warmup", "2", "--no-amp", "--backbone", "small_gn"]
CHECKPOINT, IMAGE_TERM = "image-and-dense.pt", "image-term-alone.pt"


def load(folder: Path, name: str = CHECKPOINT) -> dict:
    return torch.load(folder / name, weights_only=True)


def train(out: Path, *arguments: str | Path, name: str = CHECKPOINT, **options: object) -> dict:
    """A run's last checkpoint."""
    pretrain.main([*TINY, "--out", str(out), *map(str, arguments)], **options)
    return load(out, name)


@pytest.fixture(scope="module", autouse=True)
def _small_pair() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "load_pair", small_pair)
        yield


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven usable images, and three files that are none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deeper").mkdir()
    shapes = {"colour.jpg": (150, 90, 3), "deeper/grey.PNG": (130, 140), "alpha.png": (40, 600, 4)}
    shapes |= {f"{side}.gif": (side, 200) for side in (16, 50, 60, 70, 80)}
    for name, shape in shapes.items():
        Image.fromarray(noise(*shape)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "cut.jpg").write_bytes((folder / "colour.jpg").read_bytes()[:900])
    (folder / "notes.txt").write_text("not an image either")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run; its four steps end in the second epoch."""
    out = tmp_path_factory.mktemp("finished")
    train(out, "--images", folder, "--densecl", "--workers", "0")
    return out


def test_a_folder_of_images(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Batch norm, and the image term alone beside both."""
    out, result_file = tmp_path / "out", tmp_path / "r.json"
    arguments = ("--backbone", "small", "--images", folder, "--json", result_file, "--compare", "--tensorboard")
    both, image_only = train(out, *arguments), load(out, IMAGE_TERM)

    printed, errors = capfd.readouterr()
    assert "skipped 16.gif: 200 x 16 pixels, smaller than 32" in errors
    assert [errors.count(f"skipped {name}") for name in ("broken.jpg", "cut.jpg", "notes.txt")] == [1, 1, 0]
    result = json.loads(result_file.read_text())
    assert list(result["rows"]) == ["random weights", "image term alone", "image and dense"]
    assert (result["settings"]["images"], result["skipped"]) == ("folder, 10", 3)
    for name, row in result["rows"].items():
        assert 0 < row["close"] < 1
        close = re.search(rf"^{name} +(\d\S+)", printed, re.MULTILINE)
        assert float(close[1]) == pytest.approx(row["close"], abs=1e-3)
    assert Image.open(out / "matches.png").width > 800
    written = printed.split("written:\n  ")[1].split()
    assert sorted(written) == sorted(map(str, [*out.iterdir(), result_file]))
    torch.testing.assert_close(image_only["history"][:2], both["history"][:2], rtol=0, atol=0)  # lambda is still 0
    assert bool((both["history"][:, :2] > 0).all())
    dense_head = "encoder_q.head.dense_mlp.0.weight"  # only the dense term trains it
    assert float((image_only["model"][dense_head] - both["model"][dense_head]).abs().max()) > 1e-4

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "image-and-dense")).Reload()
    assert events.Tags()["images"] == ["matches"]
    for column, name in enumerate(("loss/image", "loss/dense", "dense/top-1")):
        assert events.Scalars(name)[-1].value == pytest.approx(float(both["history"][-1, column]), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "empty"], "no image found"),
        (["--images", "missing"], "is not a folder"),
        (["--images", "broken", "--steps", "1", "--workers", "0"], "no usable image"),
        (["--images", "broken", "--steps", "1", "--workers", "2"], "no usable image"),
        (["--shards", "empty.tar", "--steps", "1", "--workers", "2"], "got 1 files for 2 readers"),
        (["--shards", "empty.tar", "--steps", "1", "--workers", "0"], "no image in the stream"),
        (["--shards", "empty.tar", "--epochs", "1"], "--epochs: the number of images"),
        (["--shards", "no.tar"], "--shards: no.tar is not a file"),
        (["--weights", "no.pth"], "--weights: no.pth is not a file"),
        (["--weights", "empty.tar"], "--weights: empty.tar does not fit"),
        (["--steps", "0"], "--steps: got 0"),
        (["--lr", "nan"], "--lr: got nan"),
        (["--out", "empty.tar"], "--out: empty.tar is not a folder"),
        (["--json", "empty"], "--json: empty is a folder"),
        (["--lambda", "1.5"], "--lambda: got 1.5"),
        (["--accumulate", "5"], "expected a multiple of 5"),
        (["--backbone", "no_such_net"], "'no_such_net'"),
        (["--lambda-warmup", "50", "--epochs", "2"], "--lambda-warmup: got 50 of 1 steps"),
        (["--densecl", "--queue-init", "empty", "--steps", "3"], "--densecl: 3 steps of 32 images leave a queue of"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments, message
) -> None:
    """Told in one line, before the first step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "one.jpg").write_bytes(b"")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(SystemExit) as caught:
        pretrain.main(arguments)
    told = f"{caught.value} {capfd.readouterr().err}"
    assert message in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.pt"))


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of srun or mpirun never train each alone."""
    for rank, size, local in processes.LAUNCHERS:
        task = {rank: "1", size: "2", local: "1"}
        monkeypatch.setattr(os, "environ", task)
        with pytest.raises(SystemExit, match=f"{rank} and {size} say .* torchrun"):
            options.parse([])
        monkeypatch.setattr(os, "environ", task | {"MASTER_ADDR": "node", "MASTER_PORT": "1"})
        options.parse([])
        assert os.environ.items() >= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items()


def test_help_needs_no_scikit_image(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("pretraining")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(EXAMPLES / "pretrain.py"), run_name="__main__")
    assert "--images DIR" in capsys.readouterr().out


def test_names_of_timm_with_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for timm, without a network: no weights are no random ones."""

    def create_model(name: str, pretrained: bool, **_: object) -> str:
        if pretrained:
            raise OSError("no network")
        return "random"

    timm = types.ModuleType("timm")
    timm.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    timm.is_model, timm.create_model = bool, create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert backbones._of_timm("resnet50") == "random"
    with pytest.raises(SystemExit, match=r"the weights of resnet50.a1_in1k cannot be had \(no network\)"):
        backbones._of_timm("resnet50.a1_in1k")


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    """Stops; the last good checkpoint stays, and nothing is exported."""
    with pytest.raises(SystemExit, match=r"is not finite: stopped, and image-and-dense.pt holds the last good state"):
        train(tmp_path, "--steps", "9", "--lr", "1e20", "--save-every", "1")
    state = load(tmp_path)
    assert 0 < state["step"] < 9
    assert all(bool(x.isfinite().all()) for x in state["model"].values())
    assert not (tmp_path / "backbone.pth").exists()


def test_checkpoints_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk spoils none, the one before serves where the last is cut short, and no other run writes over them."""
    model, path = nn.Linear(300, 300), tmp_path / CHECKPOINT
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in (1, 2, 3):
        checkpoints.save(path, model, optimizer, step=step, settings={})

    def full(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match=r"No space left.*image-and-dense.pt is as it was"):
        checkpoints.write_whole(path, full)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["image-and-dense.previous.pt", CHECKPOINT]
    assert checkpoints.resume(path, model, optimizer, {})["step"] == 3
    whole = path.read_bytes()
    half = len(whole) // 2
    for spoilt in (whole[:half] + bytes(8) + whole[half + 8 :], whole[:half], b""):
        path.write_bytes(spoilt)
        assert checkpoints.resume(path, model, optimizer, {})["step"] == 2
        assert f"{CHECKPOINT}: damaged" in capsys.readouterr().err
    os.truncate(checkpoints.previous(path), 100)
    with pytest.raises(SystemExit, match=r"image-and-dense.pt and .*previous.pt cannot be read"):
        checkpoints.resume(path, model, optimizer, {})

    for other in ([], ["--lambda", "0"], ["--lambda", "0", "--resume"]):  # backbone.pth is of all
        with pytest.raises(SystemExit, match=r"is of another run; --resume .*goes on with it, --overwrite removes it"):
            train(tmp_path, *other)
    checkpoints.claim([path], options.parse(["--overwrite"]))
    assert not list(tmp_path.iterdir())


def test_what_a_resumed_run_may_change(
    folder: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen, out, before = shutil.copytree(folder, tmp_path / "images"), tmp_path / "out", load(finished)
    shutil.copytree(finished, out)
    Image.fromarray(noise(60, 60)).save(seen / "new.png")
    arguments = ["--resume", "--workers", "0", "--accumulate", "2", "--images", seen, "--steps"]
    state = train(out, *arguments, "6")
    told = capfd.readouterr().err
    for line in ("accumulate 1, now 2", "images folder, 10, now folder, 11", "steps 4, now 6: the learning rate"):
        assert f"resumed at step 4 with {line}" in told
    torch.testing.assert_close(state["history"][:4], before["history"], rtol=0, atol=0)
    assert bool((state["history"][4:, :2] > 0).all())
    for refused, why in (("5", "is of step 6, after the last one"), ("7 --seed 1", "was made with seed 0, not 1")):
        with pytest.raises(SystemExit, match=why):
            train(out, *arguments, *refused.split())


def test_weights_in_and_out(finished: Path) -> None:
    """Plain names, and the official code's; a run starts from either, or from a checkpoint."""
    model = load(finished)["model"]
    weights, official = load(finished, "backbone.pth"), read_checkpoint(finished / "densecl.pth")
    assert {name.split(".")[0] for name in weights} == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert_same(weights, {name: model[f"encoder_q.backbone.{name}"] for name in weights})
    for part, prefix in ((official.head_k, "encoder_k.head"), (official.dense_queue, "dense_queue")):
        assert_same(part, {name: model[f"{prefix}.{name}"] for name in part})
    for name in ("backbone.pth", CHECKPOINT, "densecl.pth"):
        model, _ = pretrain.make_model(options.parse([*TINY, "--weights", str(finished / name)]))
        for encoder in (model.encoder_q, model.encoder_k):
            assert_same(encoder.backbone.state_dict(), weights)
    with pytest.raises(SystemExit, match=r"--weights: .*backbone.pth does not fit this backbone"):
        pretrain.make_model(options.parse(["--backbone", "small", "--weights", str(finished / "backbone.pth")]))


def test_shards(tmp_path: Path) -> None:
    """Every reader has shards of its own; a run that stopped goes on at the place in the shard where it was."""
    paths = [tmp_path / f"{name}.tar" for name in "abcde"]
    (tmp_path / "label.cls").write_text("7")
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for item in range(4):
                Image.fromarray(noise(40, 40 + item)).save(tmp_path / "image.png")
                tar.add(tmp_path / "image.png", f"{item}.png")
                tar.add(tmp_path / "label.cls", f"{item}.cls")

    def epoch(readers: int, number: int = 0) -> list[str]:
        return [name for r in range(readers) for _, name, _ in source.read((number, 0, 0), r, readers, 0)]

    source = streams.Shards(paths)
    assert len(set(epoch(1))) == 20
    assert sorted(epoch(1)) == sorted(epoch(3)) == sorted(epoch(1, 1))
    assert epoch(1) != epoch(1, 1)

    paths[1].write_bytes(paths[1].read_bytes()[:700])  # cut short in its first image
    out = tmp_path / "out"
    arguments = ["--steps", "5", "--save-every", "3", "--workers", "0", "--lambda", "0", "--shards", *paths]
    whole = train(out, *arguments, name=IMAGE_TERM)
    result = json.loads((out / "result.json").read_text())
    assert list(result["rows"]) == ["random weights", "image term alone"]  # no dense term, no row that names it
    assert (result["settings"]["images"], result["skipped"]) == ("shards, 5", 1)
    assert whole["places"] == {0: (1, 1, 4)}  # after 16 images, 4 of the next epoch's second shard; its first is cut
    checkpoints.previous(out / IMAGE_TERM).replace(out / IMAGE_TERM)
    assert load(out, IMAGE_TERM)["step"] == 3
    assert_same(train(out, *arguments, "--resume", name=IMAGE_TERM), whole)


def test_iterable_dataset(tmp_path: Path) -> None:
    """With empty queues: no negatives at the first step."""

    class Numbers(torch.utils.data.IterableDataset):
        def __iter__(self):
            for n in range(3):
                yield Image.fromarray(noise(40, 50, 3)), n
                yield torch.from_numpy(noise(3, 40, 60)) / 255, n
                yield noise(40, 70), n

    state = train(tmp_path, "--queue-init", "empty", "--matching", "mutual", dataset=Numbers())
    assert (state["settings"]["images"], state["places"]) == ("dataset", {0: (1, 0, 7)})
    assert state["history"][0].tolist() == [0, 0, 1]
    assert int(state["model"]["dense_queue.count"]) == 4 * 4  # steps, batch
    tensor = torch.from_numpy(noise(3, 40, 60))
    for form in (tensor, tensor / 255, tensor.permute(1, 2, 0).numpy()):
        np.testing.assert_array_equal(np.asarray(streams.as_picture(form)), tensor.permute(1, 2, 0))


def test_linked_folders_and_types(tmp_path: Path) -> None:
    """A linked folder's images are found, once, and loops end; every type that Pillow reads is one."""
    (tmp_path / "disk" / "cats").mkdir(parents=True)
    train = tmp_path / "train"
    (train / "dogs").mkdir(parents=True)
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", ".pgm": "PPM", ".tga": "TGA"}
    for suffix in kinds.keys() & decoding.SUFFIXES:
        Image.new("L" if suffix == ".pgm" else "RGB", (64, 64)).save(train / "dogs" / f"a{suffix}", kinds[suffix])
    Image.new("RGB", (64, 64)).save(tmp_path / "disk" / "cats" / "b.png")
    Image.new("RGB", (64, 64)).save(train / "c.bmp")
    disk = tmp_path / "disk"
    for link, target in {"cats": disk / "cats", "more": disk, "loop": train, "self": train / "self"}.items():
        (train / link).symlink_to(target)
    source = images.Folder(train)
    found = [source.name(index) for index in range(len(source))]
    assert sorted(Path(name).suffix for name in found) == sorted([".bmp", ".png", *kinds])
    assert all(source.open(index).mode == "RGB" for index in range(len(source)))


def test_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    """Told once: equal projections. A head that has not learnt yet has their loss, but not their rank."""
    cases = ((1, 0.5, True), (0.995, 0.5 * 1.05, True), (1, 0.05, False), (0.9, 0.5, False))
    for loss, rank, collapsed in cases:  # as shares of log(65) and of 64
        assert progress.has_collapsed(loss * math.log(65), rank * 64, 64) == collapsed
    views = torch.randn(2, 4, 3, 32, 32)
    output = tiny_model()(*views, *torch.rand(2, 4, 4))._replace(rank=torch.tensor(32.0), negatives=torch.tensor(64))
    bar, measured = progress.Progress(9, 0, 4, {}, True, None), torch.tensor([1.0, math.log(65), 0.0])
    for training, told in ((False, 0), (True, 1), (True, 0)):
        bar.step(0, measured, 0.1, training, output, views)
        assert capsys.readouterr().err.count("are (almost) all equal") == told


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to catch")
def test_resume_after_sigterm_is_exact(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Signalled in the second step, in the middle of an epoch; with two workers instead of none."""

    def interrupt(step: int, value: float, warmup: int) -> float:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, value, warmup)

    schedule = pretrain.lambda_at
    arguments = ["--images", folder, "--workers", "2"]
    monkeypatch.setattr(pretrain, "lambda_at", interrupt)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, *arguments)
    monkeypatch.setattr(pretrain, "lambda_at", schedule)
    assert caught.value.code == 128 + signal.SIGTERM
    assert "after step 2" in capfd.readouterr().err
    assert load(tmp_path)["step"] == 2
    assert_same(train(tmp_path, *arguments, "--resume"), load(finished))
    assert (tmp_path / "result.json").read_text() == (finished / "result.json").read_text()


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_backbones_of_other_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole maps, and weights that the package's own model loads."""
    module = pytest.importorskip(package)
    if package == "timm":
        monkeypatch.setattr(backbones, "_of_torchvision", lambda name: None)
    network, *shape = backbones.build("resnet18")
    whole = module.models.resnet18() if package == "torchvision" else module.create_model("resnet18")
    x = torch.randn(2, 3, 64, 96)
    assert (shape, network(x).shape) == ([512, 32], (2, 512, 2, 3))
    left = whole.load_state_dict(network.state_dict(), strict=False)
    assert left == (["fc.weight", "fc.bias"], [])
    whole.eval(), network.eval()
    torch.testing.assert_close(whole(x), whole.fc(network(x).mean((2, 3))), rtol=1e-4, atol=1e-5)


GREY = np.resize(np.arange(256), (40, 64))
RGB = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
RGBA, CMYK = np.dstack([RGB, GREY // 2]), np.dstack([255 - RGB, 0 * GREY])
WHITE = {"extratags": [(281, "H", 1, 510, True)]}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # by 90 degrees


@pytest.mark.parametrize(
    ("name", "picture", "stored", "how", "scaled"),
    [
        ("grey.png", GREY, GREY.astype(np.uint8), {}, None),
        ("alpha.png", RGB, RGBA.astype(np.uint8), {}, None),
        ("palette.gif", GREY, 255 - GREY.astype(np.uint8), {"transparency": 3}, None),
        ("cmyk.tif", RGB, CMYK.astype(np.uint8), {"photometric": "separated"}, None),
        ("turned.png", RGB, np.rot90(RGB).astype(np.uint8), {"exif": TURNED}, None),
        ("16 of 16.png", GREY, GREY.astype(np.uint16) * 257, {}, None),
        ("12 of 16.png", GREY, GREY.astype(np.uint16) * 16, {}, "up to 4095"),
        ("8 of 32.tif", GREY, GREY.astype(np.int32), {}, "up to 255"),
        ("32 of 32.tif", GREY, GREY.astype(np.uint32) * 0x01010101, {}, "up to 4294967295"),
        ("white is 0.tif", GREY, 4095 - GREY.astype(np.uint16) * 16, {"photometric": "miniswhite"}, "up to 4095"),
        ("signed 16.tif", GREY, GREY.astype(np.int16) * 10 - 1000, {}, "from -1000 to 1550"),
        ("signed 8.tif", GREY, (GREY - 128).astype(np.int8), {}, "from -128 to 127"),
        ("stated.tif", GREY, GREY.astype(np.uint16) * 2, WHITE, None),
        ("12 of 16.pgm", GREY, GREY.astype(np.uint16) * 16, {}, None),
        ("colours, 12 of 16.tif", RGB, RGB.astype(np.uint16) * 16, {}, "up to 4095"),
        ("four bands, 12 of 16.tif", RGB, RGBA.astype(np.uint16) * 16, {}, "up to 4095"),
        ("colours, packed.tif", RGB, RGB.astype(np.uint16) * 16, {"compression": "zlib"}, "up to 4095"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_decoded_pixels(tmp_path: Path, name: str, picture, stored, how: dict, scaled: str | None) -> None:
    """Upright RGB of 8 bits; more bits are scaled by what the file says of its white, else by its own range."""
    import tifffile

    path = tmp_path / name
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 64 40 4080\n" + stored.astype(">u2").tobytes())
    elif path.suffix == ".tif":
        tifffile.imwrite(path, stored, **({"photometric": "rgb" if stored.ndim == 3 else "minisblack"} | how))
    else:
        image = Image.fromarray(stored)
        if path.suffix == ".gif":
            image.putpalette(np.arange(255, -1, -1, np.uint8).repeat(3).tobytes())
        image.save(path, **how)
    for file in (path, io.BytesIO(path.read_bytes())):
        image = decoding.decode(file)
        expected = np.broadcast_to(picture.reshape(40, 64, -1), (40, 64, 3))
        np.testing.assert_allclose(np.asarray(image).astype(int), expected, atol=int(".pgm" in name))
        assert image.info.get("scaled") == scaled


class Ramps:
    """One image whose red is x and whose green is y."""

    def __len__(self) -> int:
        return 1

    def name(self, _: int) -> str:
        return "ramps"

    def open(self, _: int) -> Image.Image:
        y, x = np.mgrid[:120, :200]
        return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


@pytest.mark.parametrize("window", [0, 60])
def test_boxes_say_where_the_views_come_from(window: int) -> None:
    """Each pixel of a view against the place that its box gives it, mirrored views too."""
    samples = images.Samples(Ramps(), seed=3, view=32, window=window)
    drawn = [samples[number, 0] for number in range(40)]
    views, boxes = torch.stack([x.images for x in drawn]).double(), torch.stack([x.boxes for x in drawn]).double()
    first, last = boxes.view(40, 2, 2, 2).unbind(2)  # corners, (image, view, x and y)
    at = (torch.arange(2, 30) + 0.5) / 32  # the outermost pixels are averages over less
    x, y = (first[..., None] + at * (last - first)[..., None] - 0.5).unbind(2)
    places = torch.stack([x[:, :, None].expand(-1, -1, 28, -1), y[..., None].expand(-1, -1, -1, 28)], 2)
    torch.testing.assert_close(views[:, :, :2, 2:-2, 2:-2], places, rtol=0, atol=1)
    low, high = torch.minimum(first, last), torch.maximum(first, last)
    width, height = (last - first).unbind(2)  # a negative width: mirrored
    area, ratio = width.abs() * height / (window**2 or 200 * 120), width.abs() / height
    assert bool(((area > 0.19) & (area < 1.01) & (ratio > 0.74) & (ratio < 1.34)).all())
    assert bool(((low >= 0) & (high <= torch.tensor([200, 120]))).all())
    assert bool((high.amax(1) - low.amin(1) <= (window or 200) + 1e-3).all())
    assert 20 < int((width < 0).sum()) < 60


def test_every_image_once_per_epoch_on_any_number_of_processes() -> None:
    def order(start: int = 0, **options: int) -> list[list[tuple[int, int]]]:
        return list(images.Order(7, seed=1, batch=6, steps=range(start, 7), **options))

    whole = order()
    numbers, indices = zip(*(sample for batch in whole for sample in batch), strict=True)
    assert numbers == tuple(range(42))
    epochs = [indices[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 6
    assert order(3) == whole[3:]
    shares = [order(parts=3, rank=rank, processes=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert [s for part in range(3) for share in shares for s in share[3 * step + part]] == batch


def test_augmentation() -> None:
    """Jitter without hue, as torchvision's documentation has it, on the image that is to have it alone."""
    pixels = torch.from_numpy(noise(2, 3, 16, 16))
    uniform = torch.tensor([[0.1, 0.7, 0.3, 0.5, 0.0, 0.9, 0.5, 0.9], [0.5] * 4 + [0.9] * 4])
    seen = augment.denormalize(augment.augment(pixels, uniform))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    x = (pixels[0].double() / 255 * 0.68).clamp(0, 1)
    x = (1.16 * x + (1 - 1.16) * (weights * x).sum(0).mean()).clamp(0, 1)
    x = (0.84 * x + (1 - 0.84) * (weights * x).sum(0)).clamp(0, 1)
    torch.testing.assert_close(seen[0].double(), x, rtol=0, atol=2e-3)
    torch.testing.assert_close(seen[1], pixels[1].float() / 255, rtol=0, atol=1e-6)


def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook for Weights & Biases, with a stand-in."""
    logged: list[tuple[dict, int]] = []
    wandb = types.SimpleNamespace(run=True, log=lambda numbers, step: logged.append((numbers, step)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(progress.Progress, "step", lambda *_: None)
    for block in blocks(DOCS / "pretraining.md"):
        exec(block, {})
    for step in range(11):
        progress.Progress.step(None, step, torch.tensor([1.0, 2.0, 0.5]), 0.1)
    assert [step for _, step in logged] == [0, 10]
    assert logged[1][0] == {"loss/image": 1, "loss/dense": 2, "dense/top-1": 0.5, "rate": 0.1}


def tiny_model(**options: object) -> pretrain.DenseCL:
    torch.manual_seed(0)
    return pretrain.DenseCL(pretrain.Encoder(backbones.build("small_gn")), queue_size=64, **options)


def test_nothing_changes_before_the_step_ends() -> None:
    """So that a forward pass repeated by activation checkpointing, after or in backward, gives the same gradients."""
    model, inputs = tiny_model(momentum=0.9), (*torch.randn(2, 4, 3, 32, 32), *torch.rand(2, 4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    gradients = []
    for output in (model(*inputs), checkpoint(model, *inputs, use_reentrant=False)):
        loss = output.image_loss + output.dense_loss
        gradients.append(torch.autograd.grad(loss, list(model.encoder_q.parameters())))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert_same(model.state_dict(), before)

    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(1)
    model.update([output._replace(image_key=torch.eye(128)[:6], dense_key=torch.eye(128)[9:15])])
    after, key = model.state_dict(), "head.image_mlp.0.weight"
    torch.testing.assert_close(after[f"encoder_k.{key}"], before[f"encoder_k.{key}"] + 0.1)
    for queue, first in (("image_queue", 0), ("dense_queue", 9)):
        rows = torch.cat([torch.eye(128)[first : first + 6], before[f"{queue}.rows"][6:]])
        assert torch.equal(after[f"{queue}.rows"], rows)


def test_matching_by_place() -> None:
    """The same crop: cell by cell; mirrored: the columns in reverse."""
    model, view = tiny_model(matching="place"), torch.randn(2, 3, 32, 32)
    box, mirrored = torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([[40.0, 0, 0, 40]])
    index = model(view, view, box.expand(2, 4), torch.cat([box, mirrored])).match.index.view(2, 4, 4)
    assert torch.equal(index[0].flatten(), torch.arange(16))
    assert torch.equal(index[1], index[0].flip(1))


def test_schedules() -> None:
    assert [pretrain.lambda_at(step, 0.5, 3) for step in range(5)] == [0, 0, 0, 0.5, 0.5]
    rates = [pretrain.learning_rate_at(step, 2.0, 100) for step in range(100)]
    assert [rates[0], max(rates), rates[50]] == pytest.approx([0.4, rates[4], 1.0])
    assert 0 < rates[99] < 0.001
    for arguments, steps, warmup in (("--epochs 0.5", 2, 0), ("--epochs 4", 10, 2), ("--lambda-warmup 7", 250, 7)):
        args = options.parse(["--batch-size", "4", *arguments.split()])
        options.settle(args, images=10)
        assert (args.steps, args.lambda_warmup) == (steps, warmup)


def test_evaluation_of_a_perfect_backbone() -> None:
    """Raw 8 x 8 patches of noise find an exact shift; against the opposite shift they are all two cells off."""
    image = torch.rand(1, 3, 48, 80)
    shifted = torch.cat([image[..., 8:], torch.rand(1, 3, 48, 8)], 3)  # left[x] is right[x - 8]
    for disparity, median in ((8.0, 0), (-8.0, 2)):
        known = torch.full((48, 80), disparity)
        known[:, 40:48] = torch.inf
        matches = stereo.evaluate(nn.PixelUnshuffle(8), stereo.Pair(image, shifted, known, 8))
        assert matches.median == median
        assert matches.close == 1 if median == 0 else matches.close < 0.05  # one column may land anywhere
        assert int(matches.error.isnan().sum()) == 6 + 6  # a match outside at one border, and the sixth is unknown


def test_the_stereo_pair_is_not_trained_on() -> None:
    assert not [name for name in images.BUILT_IN if "stereo" in name or "motorcycle" in name]
    source = images.BuiltIn()
    assert len(source) == 13
    assert max(min(source.open(index).size) for index in range(13)) == images.SHORT_SIDE
