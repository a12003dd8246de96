"""docs/examples/pretrain.py, end to end at tiny settings, and its parts."""
# ruff: noqa: E402

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipes
import torch
from helpers import assert_same, torchrun
from pages import DOCS, blocks
from torch import nn
from torch.utils.checkpoint import checkpoint

for module in ("kornia", "matplotlib", "PIL", "skimage", "tqdm"):
    pytest.importorskip(module)

import distributed_pretrain
import pretrain
import tifffile
from distributed_pretrain import TINY, run, run_until_sigterm
from PIL import Image
from pretraining import augment, backbones, checkpoints, decoding, images, options, processes, progress, stereo, streams

from densecl_ops.interop import read_checkpoint

CHECKPOINT = "image-and-dense.pt"


def load(folder: Path, name: str = CHECKPOINT) -> dict:
    return torch.load(folder / name, weights_only=True)


def train(out: Path, *arguments: object, **options: object) -> dict:
    """A run's last checkpoint."""
    run(out, *arguments, **options)
    return load(out)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven usable images of as many types, three files that are none, and links that lead nowhere new."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deeper").mkdir()
    shapes = {"colour.jpg": (150, 90, 3), "deeper/grey.PNG": (130, 140), "alpha.tga": (40, 600, 4)}
    shapes |= {name: (int(name[:2]), 200) for name in ("16.gif", "50.gif", "60.jp2", "70.jfif", "80.bmp")}
    for name, shape in shapes.items():
        Image.fromarray(noise(*shape)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "cut.jpg").write_bytes((folder / "colour.jpg").read_bytes()[:900])
    (folder / "notes.txt").write_text("not an image either")
    (folder / "deeper" / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run; its four steps end in the second epoch."""
    out = tmp_path_factory.mktemp("finished")
    train(out, "--images", folder, "--densecl", "--workers", "0")
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five of four images each, and their labels."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "label.cls").write_text("7")
    for name in "abcde":
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for item in range(4):
                Image.fromarray(noise(40, 40 + item)).save(folder / "image.png")
                tar.add(folder / "image.png", f"{item}.png")
                tar.add(folder / "label.cls", f"{item}.cls")
    return sorted(folder.glob("*.tar"))


def test_a_folder_of_images(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Batch norm, and the image term alone beside both."""
    out, result_file = tmp_path / "out", tmp_path / "r.json"
    arguments = ("--backbone", "small", "--images", folder, "--json", result_file, "--compare", "--tensorboard")
    both = train(out, *arguments)
    image_only = load(out, "image-term-alone.pt")

    printed, errors = capfd.readouterr()
    assert "skipped 16.gif: 200 x 16 pixels, smaller than 32" in errors
    assert [errors.count(f"skipped {name}") for name in ("broken.jpg", "cut.jpg", "notes.txt")] == [1, 1, 0]
    result = json.loads(result_file.read_text())
    assert list(result["rows"]) == ["random weights", "image term alone", "image and dense"]
    for name, row in result["rows"].items():
        assert 0 < row["close"] < 1
        close = re.search(rf"^{name} +(\d\S+)", printed, re.MULTILINE)
        assert float(close[1]) == pytest.approx(row["close"], abs=1e-3)
    assert Image.open(out / "matches.png").width > 800
    written = printed.split("written:\n  ")[1].split()
    assert sorted(written) == sorted(map(str, [*out.iterdir(), result_file]))
    assert torch.equal(image_only["history"][:2], both["history"][:2])  # lambda is still 0
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
        (["--help"], "--images DIR"),
        (["--images", "empty"], "no image found"),
        (["--images", "missing"], "is not a folder"),
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
    told = "\n".join([str(caught.value), *capfd.readouterr()])
    assert message in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.pt"))


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of srun or mpirun never train each alone."""
    for names in processes.LAUNCHERS:
        monkeypatch.setattr(os, "environ", dict(zip(names, "121", strict=True)))
        with pytest.raises(SystemExit, match="{} and {} say .* torchrun".format(*names)):
            options.parse([])
        os.environ |= {"MASTER_ADDR": "node", "MASTER_PORT": "1"}
        options.parse([])
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]


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
    seen, out, before = tmp_path / "images", tmp_path / "out", load(finished)
    shutil.copytree(finished, out)
    seen.mkdir()
    (seen / "linked").symlink_to(folder)
    Image.fromarray(noise(60, 60)).save(seen / "new.png")
    weights = "--weights", finished / "backbone.pth"
    arguments = ["--resume", "--workers", "0", "--accumulate", "2", *weights, "--images", seen, "--steps"]
    state = train(out, *arguments, "6")
    told = capfd.readouterr().err
    changes = "accumulate 1, now 2", "weights None, now", "images folder, 10, now folder, 11", "steps 4, now 6: the"
    for line in changes:
        assert f"resumed at step 4 with {line}" in told
    assert torch.equal(state["history"][:4], before["history"])
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
    assert_same(official.head_k, {name: model[f"encoder_k.head.{name}"] for name in official.head_k})
    assert_same(official.dense_queue, {name: model[f"dense_queue.{name}"] for name in official.dense_queue})
    for name in ("backbone.pth", CHECKPOINT, "densecl.pth"):
        model, _ = pretrain.make_model(options.parse([*TINY, "--weights", str(finished / name)]))
        for encoder in (model.encoder_q, model.encoder_k):
            assert_same(encoder.backbone.state_dict(), weights)
    with pytest.raises(SystemExit, match=r"--weights: .*backbone.pth does not fit this backbone"):
        pretrain.make_model(options.parse(["--backbone", "small", "--weights", str(finished / "backbone.pth")]))


def test_each_image_of_the_shards_once_per_epoch_on_any_number_of_readers(shards: list[Path]) -> None:
    def epoch(readers: int, number: int = 0) -> list[str]:
        return [name for r in range(readers) for _, name, _ in source.read((number, 0, 0), r, readers, 0)]

    source = streams.Shards(shards)
    assert len(set(epoch(1))) == 20
    assert sorted(epoch(1)) == sorted(epoch(3)) == sorted(epoch(1, 1))
    assert epoch(1) != epoch(1, 1)


PIXELS = torch.from_numpy(noise(3, 40, 60))
FORMS = (PIXELS, PIXELS / 255, PIXELS.permute(1, 2, 0).numpy(), Image.fromarray(PIXELS.permute(1, 2, 0).numpy()))


def test_forms_of_an_image_in_a_dataset() -> None:
    for form in FORMS:
        assert np.array_equal(np.asarray(streams.as_picture(form)), FORMS[2])
    for form in (2 * FORMS[1] - 1, FORMS[2][..., 0].astype(np.uint16), FORMS[2][..., 0].astype(np.float32)):
        with pytest.raises(ValueError, match=r"before they are normalised|expected 8 bits"):
            streams.as_picture(form)


def test_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    """Told once: equal projections. A head that has not learnt yet has their loss, but not their rank."""
    bar = progress.Progress(9, 0, 4, {}, True, None)
    cases = ((0.9, 0.5, True, 0), (1, 0.05, True, 0), (1, 0.5, False, 0), (0.995, 0.525, True, 1), (1, 0.5, True, 0))
    for loss, rank, training, told in cases:  # as shares of log(65) and of 64
        measured, output = [1.0, loss * math.log(65), 0.0], SimpleNamespace(rank=rank * 64, negatives=64)
        bar.step(0, torch.tensor(measured), 0.1, training, output, None)
        assert capsys.readouterr().err.count("are (almost) all equal") == told


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to catch")
@pytest.mark.parametrize("seen", [("folder, 10", 3, None), ("shards, 4", 1, (1, 1, 4)), ("dataset", 0, (1, 0, 4))])
def test_resume_after_sigterm_is_exact(
    seen: tuple, folder: Path, shards: list[Path], finished: Path, tmp_path: Path
) -> None:
    """In the middle of an epoch; a folder's images by two workers instead of none."""
    source, *_ = seen[0].split(",")
    options = {"dataset": [(form, "label") for form in FORMS for _ in range(3)]} if source == "dataset" else {}
    if source == "folder":
        arguments, whole = ["--images", folder, "--workers", 2], finished
    else:
        cut, whole = tmp_path / "cut.tar", tmp_path / "whole"
        cut.write_bytes(shards[1].read_bytes()[:700])  # in its first image
        arguments = ["--queue-init", "empty", "--matching", "mutual"]
        arguments += ["--workers", 0, "--shards", cut, *shards[2:]] if source == "shards" else []
        train(whole, *arguments, **options)

    out = tmp_path / "out"
    run_until_sigterm(out, *arguments, **options)
    assert load(out)["step"] == 2
    state = train(out, *arguments, "--resume", **options)
    assert_same(state, load(whole))
    assert (out / "result.json").read_text() == (whole / "result.json").read_text()
    result = json.loads((out / "result.json").read_text())
    assert (result["settings"]["images"], result["skipped"], state["places"].get(0)) == seen
    if source != "folder":  # no negatives at the first step, then those of four steps
        assert state["history"][0].tolist() == [0, 0, 1]
        assert int(state["model"]["dense_queue.count"]) == 4 * 4


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_backbones_of_other_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole maps, and weights that the package's own model loads."""
    module = pytest.importorskip(package)
    whole = module.models.resnet18() if package == "torchvision" else module.create_model("resnet18")
    if package == "timm":
        monkeypatch.setattr(backbones, "_of_torchvision", lambda name: None)
    network, *shape = backbones.build("resnet18")
    x = torch.randn(2, 3, 64, 96)
    assert (shape, network(x).shape) == ([512, 32], (2, 512, 2, 3))
    assert whole.load_state_dict(network.state_dict(), strict=False) == (["fc.weight", "fc.bias"], [])
    whole.eval(), network.eval()
    torch.testing.assert_close(whole(x), whole.fc(network(x).mean((2, 3))), rtol=1e-4, atol=1e-5)
    if package == "timm":  # a tag means weights: without a network, no random ones
        monkeypatch.setattr(module, "create_model", lambda *_, pretrained, **__: Path("no network").read_text())
        with pytest.raises(SystemExit, match=r"the weights of resnet50.a1_in1k cannot be had \(.*no network"):
            backbones.build("resnet50.a1_in1k")


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
)
def test_decoded_pixels(tmp_path: Path, name: str, picture, stored, how: dict, scaled: str | None) -> None:
    """Upright RGB of 8 bits; more bits are scaled by what the file says of its white, else by its own range."""
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


@pytest.mark.parametrize("window", [0, 60])
def test_boxes_say_where_the_views_come_from(window: int, tmp_path: Path) -> None:
    """Each pixel of a view, red its x and green its y, against the place that its box gives it, mirrored views too."""
    y, x = np.mgrid[:120, :200]
    Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)).save(tmp_path / "ramps.png")
    samples = images.Samples(images.Folder(tmp_path), seed=3, view=32, window=window)
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
    def order(**options: int) -> list[list[tuple[int, int]]]:
        return list(images.Order(7, seed=1, batch=6, steps=range(7), **options))

    samples = list(itertools.chain(*order()))
    assert [number for number, _ in samples] == list(range(42))
    epochs = [[index for _, index in samples[start : start + 7]] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    shares = (order(parts=3, rank=rank, processes=2) for rank in (0, 1))
    assert list(itertools.chain(*itertools.chain(*zip(*shares, strict=True)))) == samples


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
    logged = []
    wandb = SimpleNamespace(run=True, log=lambda numbers, step: logged.append((step, numbers)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(progress.Progress, "step", lambda *_: None)
    for block in blocks(DOCS / "pretraining.md"):
        exec(block, {})
    for step in range(11):
        progress.Progress.step(None, step, torch.tensor([1.0, 2.0, 0.5]), 0.1)
    numbers = {"loss/image": 1, "loss/dense": 2, "dense/top-1": 0.5, "rate": 0.1}
    assert logged == [(0, numbers), (10, numbers)]


def test_step() -> None:
    """The recipes' step. Nothing changes before its end, as a forward pass that is repeated in backward wants it."""
    model = pretrain.DenseCL(pretrain.Encoder(backbones.build("small_gn")), queue_size=64, momentum=0.9).double()
    recipes.disturb(model.encoder_q)
    twin, views, boxes = copy.deepcopy(model), recipes.views(), torch.rand(2, 4, 4)
    output = checkpoint(model, *views, *boxes, use_reentrant=False)
    (0.3 * output.image_loss + 0.7 * output.dense_loss).backward()
    assert_same(model.state_dict(), twin.state_dict())
    model.update([output])
    queues = twin.image_queue, twin.dense_queue
    image, dense, _ = recipes.moco_terms(twin.encoder_q, twin.encoder_k, queues, views)
    (0.3 * image + 0.7 * dense).backward()
    recipes.move(twin.encoder_q, twin.encoder_k)
    recipes.assert_close((output.image_loss, output.dense_loss), (image, dense))
    recipes.assert_same_step(model, twin)


def test_matching_by_place() -> None:
    """The same crop: cell by cell; mirrored: the columns in reverse."""
    model = pretrain.DenseCL(pretrain.Encoder(backbones.build("small_gn")), queue_size=64, matching="place")
    view = torch.randn(2, 3, 32, 32)
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
    """On a pair that is not trained on, raw 8 x 8 patches of noise find an exact shift; its opposite is two off."""
    assert not [name for name in images.BUILT_IN if "stereo" in name or "motorcycle" in name]
    assert max(min(image.size) for image in images.BuiltIn().images) == images.SHORT_SIDE
    image = torch.rand(1, 3, 48, 80)
    shifted = torch.cat([image[..., 8:], torch.rand(1, 3, 48, 8)], 3)  # left[x] is right[x - 8]
    for disparity, median in ((8.0, 0), (-8.0, 2)):
        known = torch.full((48, 80), disparity)
        known[:, 40:48] = torch.inf
        matches = stereo.evaluate(nn.PixelUnshuffle(8), stereo.Pair(image, shifted, known, 8))
        assert matches.median == median
        assert matches.close == 1 if median == 0 else matches.close < 0.05  # one column may land anywhere
        assert int(matches.error.isnan().sum()) == 6 + 6  # a match outside at one border, and the sixth is unknown


def test_two_processes(tmp_path: Path) -> None:
    """A run that was stopped ends like another: on two processes to the bit; on one, in two parts, to rounding."""
    errors = torchrun(distributed_pretrain.__file__, tmp_path)
    assert "warn" not in errors.lower()
    assert errors.count("stopped by SIGTERM after step 2") == 2
    whole, alone = load(tmp_path / "whole"), tmp_path / "alone"
    assert_same(load(tmp_path / "node0"), whole)
    assert load(alone)["step"] == 2
    run(alone, "--resume", "--accumulate", 2)
    for part, atol in {"history": 3e-3, "model": 3e-4}.items():
        torch.testing.assert_close(load(alone)[part], whole[part], rtol=0, atol=atol)
