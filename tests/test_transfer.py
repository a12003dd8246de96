"""The transfer suite: its tasks against plain loops, its views against their boxes, arms that pair."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from recipes import info_nce, matched
from torch.testing import assert_close

pytest.importorskip("skimage")
pytest.importorskip("kornia")

from kornia.color import rgb_to_grayscale

from benchmarks.__main__ import main
from benchmarks.transfer import page, pretraining, suite, tasks
from benchmarks.transfer.pretraining import Setting

SMALL = Setting("nearest", 0, 0.05, steps=4, view=32, window=40, batch=4, queue=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CamVid's layout and a few photographs, generated."""
    rng = np.random.default_rng(0)
    sizes = {f"photographs/{i}": (40 + i, 60, 3) for i in range(3)}
    for split, i in [*itertools.product(("train", "val"), range(5)), *itertools.product(["test"], range(3))]:
        sizes[f"camvid/{split}/0001TP_{30 * i:06}"] = (48, 64, 3)
        sizes[f"camvid/{split}annot/0001TP_{30 * i:06}"] = (48, 64)
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 12 if "annot" in name else 256, size)
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def photographs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 40, 70), (3, 55, 41), (3, 64, 64)]
    return [torch.randint(0, 256, size, generator=generator).to(torch.uint8) for size in sizes]


def cells(frames: int, generator: torch.Generator) -> tasks.Cells:
    features = (2 + torch.randn(frames, 6, 4, 5, generator=generator)).bfloat16()  # cosines near 1
    truth = torch.randint(0, 12, (frames, 32, 40), generator=generator).to(torch.uint8)
    return tasks.Cells(features, tasks.cell_counts(truth), [(i, i + 1) for i in range(frames - 1)])


def test_score_is_that_of_every_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 12, (2, 24, 33), generator=generator).to(torch.uint8)
    truth[truth == 4] = 5  # a class that never occurs has no IoU
    predicted = torch.randint(0, 12, (2, 3, 4), generator=generator)
    predicted[predicted == 4] = 6
    result = tasks.score(predicted, tasks.cell_counts(truth))
    pixels, truth = predicted.repeat_interleave(8, 1).repeat_interleave(8, 2), truth[:, :, :32]
    for label, seen in enumerate(result["classes"]):
        both = ((pixels == label) & (truth == label)).sum()
        either = (((pixels == label) & (truth != 11)) | (truth == label)).sum()
        assert seen == (None if label == 4 else round(float(both / either), 4))
    assert len(result["classes"]) == 11
    assert result["miou"] == pytest.approx(np.mean([x for x in result["classes"] if x is not None]), abs=1e-4)


def test_retrieval_and_propagation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "NEIGHBOURS", 3)
    train, asked = cells(3, torch.Generator().manual_seed(0)), cells(2, torch.Generator().manual_seed(1))
    memory, rows = tasks.remember(train), tasks.rows_of(asked)
    known, known_labels = memory
    cosine = F.normalize(rows.double(), dim=1) @ F.normalize(known.double(), dim=1).T
    nearest = cosine.argsort(1, descending=True)[:, :3]
    votes = F.one_hot(known_labels[nearest], 11) * (cosine.gather(1, nearest) / tasks.KNN_TEMPERATURE).exp()[..., None]
    assert torch.equal(tasks.retrieve(memory, rows), votes.sum(1).argmax(1))

    labels, truth = asked.counts[0].argmax(-1), asked.counts[1:, ::2, ::2]
    query, key = (F.normalize(x.double(), dim=0) for x in (asked.features[1][:, ::2, ::2], asked.features[0]))
    predicted = labels.flatten()[(query.flatten(1).T @ key.flatten(1)).argmax(1)]
    assert tasks.propagate(asked) == tasks.score(predicted, truth)
    assert tasks.propagate(asked, moved=False) == tasks.score(labels[None, ::2, ::2], truth)


def test_probe_stops_at_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "STILL", 1e-7)
    train = cells(40, torch.Generator().manual_seed(0))
    probe = tasks.fit_probe(train)
    some = tasks.thinned(train, 4)
    rows = probe.standardise(tasks.rows_of(some)).double()
    counts = some.counts.flatten(0, -2)[:, :11].double()
    for decay, weight in zip(tasks.DECAYS, probe.weights, strict=True):
        weight = weight.double().requires_grad_()
        likelihood = (counts * (rows @ weight[:-1] + weight[-1]).log_softmax(1)).sum() / counts.sum()
        (gradient,) = torch.autograd.grad(decay * weight[:-1].square().sum() - likelihood, weight)
        assert gradient.norm() < 3e-4


def test_views_lie_where_their_boxes_say() -> None:
    side, view = 56, 32
    place = (torch.arange(side) + 0.5) / side * 2 - 1
    window = torch.stack([place.expand(side, side), place[:, None].expand(side, side), torch.zeros(side, side)])
    uniform = torch.rand(8, 14, generator=torch.Generator().manual_seed(0))
    uniform[:, [9, 10, 12]] = 1  # no colours, no grey, no blur
    found = pretraining.augment(window.expand(8, 3, side, side) / 2 + 0.5, uniform, view)
    centre = (torch.arange(view) + 0.5) / view
    x0, y0, x1, y1 = found.boxes.T[..., None]
    x, y = x0 + (x1 - x0) * centre, y0 + (y1 - y0) * centre
    place = torch.stack([x[:, None, :].expand(-1, view, -1), y[:, :, None].expand(-1, -1, view)], 1)
    assert_close(found.images[:, :2] * 2 - 1, place, atol=1e-5, rtol=0)
    assert (x0 > x1).any(), "mirrored"


def test_grey() -> None:
    images = 0.3 + 0.4 * torch.rand(4, 3, 32, 32)
    uniform = torch.full((4, 14), 0.5)  # strengths in the middle change nothing
    uniform[:, 10] = torch.tensor([0.1, 0.9, 0.1, 0.9])  # two turn grey
    uniform[::2, 8] = torch.tensor([0.2, 0.9])  # another hue is of the same luma
    recoloured = pretraining._recolour(images, uniform.unbind(1))
    assert_close(recoloured[::2], rgb_to_grayscale(images[::2]).expand(-1, 3, -1, -1))
    assert_close(recoloured[1::2], images[1::2])


def test_consecutive_frames() -> None:
    names = ["A_000030", "A_000060", "A_000120", "A_000150", "B_f00150", "B_f00152"]
    assert tasks.consecutive(names) == [(0, 1), (2, 3), (4, 5)]


def test_arms_of_a_seed_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, same views: up to the dense term's first step, the same image term of a host."""
    monkeypatch.setattr(pretraining, "processor", lambda: SimpleNamespace(bfloat16=False))
    curves = {}
    for arm in (arm for arm in pretraining.ARMS if arm != "random"):
        _, facts = pretraining.pretrain(replace(SMALL, arm=arm, dense_from=0.5), photographs())
        curves[arm] = facts["image_loss"]
        alone = "byol" if arm.startswith("byol") else "image"
        assert curves[arm][:3] == pytest.approx(curves[alone][:3], abs=2e-4)
        assert (curves[arm][3] == curves[alone][3]) == (arm == alone), "the dense term trains"


@pytest.mark.parametrize("arm", ["byol_dense", "byol_contrast"])
def test_byol_terms(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's terms, from the model's own maps and projections, in float64."""
    monkeypatch.setattr(pretraining, "processor", lambda: SimpleNamespace(bfloat16=False))
    model = pretraining.Siamese(replace(SMALL, arm=arm)).train()
    pair = pretraining.draw(photographs(), 4, 40, 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model(*pair, 0.99)
        networks = model.backbone_q, model.backbone_k
        maps = [net(view.images.sub(0.45) / 0.226) for net, view in zip(networks, pair, strict=True)]
        query, key = model.head_q(maps[0]), model.head_k(maps[1])
        image = model.predict_image(query.image[..., None, None]).flatten(1)
        dense, positive = model.predict_dense(query.dense).flatten(2), matched(*maps, key.dense)
    image_loss, cosine = (2 - 2 * F.cosine_similarity(*x).mean() for x in ((image, key.image), (dense, positive)))
    contrast, _ = info_nce(dense, positive, F.normalize(key.pooled, dim=1), SMALL.temperature, exclude_own=True)
    wanted = torch.stack([image_loss, cosine if arm == "byol_dense" else contrast])
    assert_close(torch.stack(seen), wanted, rtol=0, atol=1e-4)


def test_suite_runs_each_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search, which never sees the test split, then the runs that are reported, at the rate that it found best."""
    data = f"--camvid {folder}/camvid --photographs {folder}/photographs --out {folder} --device cpu"
    command = f"transfer {data} --batch 2 --queue 8 --view 32 --window 40 --arms random place"
    search = f"{command} --part search --seeds 9 --rates 0.01 0.1 --steps 1".split()
    runs = f"{command} --seeds 3 --steps 2 --dense-from 0".split()
    main(search)
    main(runs)
    searched, found = suite.load(folder / "search"), page.by_arm(suite.load(folder))
    assert [record["setting"]["rate"] for record in searched] == [0.01, 0.1]
    assert not any(key.startswith("test") for record in searched for key in record)
    assert found["random"][3]["setting"]["rate"] == 0
    wanted = replace(SMALL, arm="place", seed=3, rate=suite.chosen_rate(searched, "place"), steps=2, batch=2, queue=8)
    assert found["place"][3]["setting"] == asdict(replace(wanted, dense_from=0.0))
    capsys.readouterr()
    main(search)
    main(runs)
    assert capsys.readouterr().out == ""


def test_paired_differences() -> None:
    # Mean 0.02, standard deviation 0.01, n = 3: 4.303 * 0.01 / sqrt(3).
    assert page.paired([0.01, 0.02, 0.03]) == "+0.020 (-0.005 to +0.045), 3 of 3 up"
