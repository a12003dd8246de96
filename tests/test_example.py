"""docs/examples/pretrain.py, end to end at tiny settings."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

for module in ("kornia", "matplotlib", "PIL", "skimage", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402
from PIL import Image  # noqa: E402
from pretraining import stereo, views  # noqa: E402

TINY = ["--steps", "4", "--batch-size", "4", "--lambda-warmup", "2", "--lr", "0.02", "--no-amp"]
CHECKPOINT = "image-and-dense.pt"


def load(folder: Path, name: str = CHECKPOINT) -> dict:
    return torch.load(folder / name, weights_only=True)


def flat(state: object, prefix: str = "") -> dict[str, object]:
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(state, dict | list):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for name, value in pairs for key, leaf in flat(value, f"{prefix}/{name}").items()}
    return {prefix: state}


def assert_same(actual: dict, expected: dict, atol: float = 0.0) -> None:
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                actual[key], value, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
            )
        else:
            assert actual[key] == value, key


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run on the built-in photographs."""
    out = tmp_path_factory.mktemp("finished")
    pretrain.main([*TINY, "--out", str(out)])
    return out


def test_a_folder_of_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    Image.fromarray(noise(150, 90, 3)).save(images / "colour.jpg")
    Image.fromarray(noise(130, 140)).save(images / "deeper" / "grey.PNG")
    Image.fromarray(noise(40, 600, 4)).save(images / "alpha.png")
    Image.fromarray(noise(200, 200)).convert("P").save(images / "palette.gif")
    Image.fromarray(noise(16, 200, 3)).save(images / "small.png")
    (images / "broken.jpg").write_bytes(b"not an image")
    (images / "notes.txt").write_text("not an image either")
    pretrain.main([*TINY, "--images", str(images), "--out", str(out), "--compare", "--json", str(tmp_path / "r.json")])

    printed, errors = capfd.readouterr()
    assert "small.png: 200 x 16 pixels" in errors
    assert "broken.jpg" in errors
    assert "notes.txt" not in errors
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["rows"]) == ["random weights", "image term alone", "image and dense"]
    assert result["settings"]["images"] == "folder, 4"
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    for name, row in result["rows"].items():
        assert 0 < row["close"] < 1
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert float(line.removeprefix(name).split()[0]) == pytest.approx(row["close"], abs=1e-3)
    assert Image.open(out / "matches.png").width > 800
    image_only, both = load(out, "image-term-alone.pt"), load(out)
    torch.testing.assert_close(image_only["history"][:2], both["history"][:2], rtol=0, atol=0)  # lambda is still 0
    assert bool((both["history"][:, :2] > 0).all())
    dense_head = "encoder_q.head.dense_mlp.0.weight"  # only the dense term trains it
    assert float((image_only["model"][dense_head] - both["model"][dense_head]).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "empty"], "no usable image"),
        (["--images", "missing"], "is not a folder"),
        (["--steps", "0"], "--steps: got 0"),
        (["--lambda", "1.5"], "--lambda: got 1.5"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        pretrain.main(arguments)
    assert message in f"{caught.value} {capsys.readouterr().err}"


def test_same_result_twice(finished: Path, tmp_path: Path) -> None:
    pretrain.main([*TINY, "--out", str(tmp_path)])
    assert_same(load(tmp_path), load(finished))
    assert (tmp_path / "result.json").read_text() == (finished / "result.json").read_text()


def test_resume_is_exact(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in step 3, one step after the last checkpoint."""

    def interrupt(step: int, value: float, warmup: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return schedule(step, value, warmup)

    schedule = pretrain.lambda_at
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretrain, "lambda_at", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*TINY, "--out", str(tmp_path)])
    monkeypatch.setattr(pretrain, "lambda_at", schedule)
    assert load(tmp_path)["step"] == 2
    pretrain.main([*TINY, "--out", str(tmp_path), "--resume"])
    assert_same(load(tmp_path), load(finished))

    with pytest.raises(SystemExit, match="was made with"):
        pretrain.main([*TINY, "--out", str(tmp_path), "--resume", "--seed", "1"])


def test_queue_init(finished: Path, tmp_path: Path) -> None:
    """An empty queue: no negatives at the first step. What it was is stored, except for the default."""
    pretrain.main([*TINY, "--out", str(tmp_path), "--queue-init", "empty"])
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["queue_init"] == "empty"
    assert load(tmp_path)["history"][0].tolist() == [0, 0, 1]
    assert int(load(tmp_path)["model"]["dense_queue.count"]) == 4 * 4  # steps, batch
    assert "queue_init" not in json.loads((finished / "result.json").read_text())["settings"]
    with pytest.raises(SystemExit, match="was made with"):
        pretrain.main([*TINY, "--out", str(tmp_path), "--resume"])


def test_two_processes_equal_one(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parents[1])}
    ended = subprocess.run(
        [*command, str(EXAMPLES / "pretrain.py"), *TINY, "--out", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "warn" not in ended.stderr.lower(), ended.stderr
    assert ended.stdout.count("random weights") == 1
    # Rounding may flip the match of a position whose two best candidates are as good as equal: hence not closer.
    two, one = load(tmp_path), load(finished)
    assert_same(two["model"], one["model"], atol=3e-4)
    torch.testing.assert_close(two["history"], one["history"], rtol=0, atol=5e-3)
    assert (tmp_path / "matches.png").exists()


def test_views_do_not_depend_on_the_share() -> None:
    def draw(share: slice) -> tuple[torch.Tensor, torch.Tensor]:
        photographs = [torch.arange(3 * 200 * 220).view(3, 200, 220).to(torch.uint8)]
        generator = torch.Generator().manual_seed(3)
        return views.TwoViews(photographs, generator).draw(6, share, torch.device("cpu"))

    whole, head, tail = draw(slice(0, 6)), draw(slice(0, 2)), draw(slice(2, 6))
    for view in (0, 1):
        assert whole[view].shape == (6, 3, views.VIEW, views.VIEW)
        torch.testing.assert_close(torch.cat([head[view], tail[view]]), whole[view])
    assert not torch.equal(whole[0], whole[1])


def test_lambda_warms_up() -> None:
    assert [pretrain.lambda_at(step, 0.5, 3) for step in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert pretrain.lambda_at(0, 0.5, 0) == 0.5


def test_learning_rate() -> None:
    rates = [pretrain.learning_rate_at(step, 2.0, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.4)
    assert max(rates) == rates[4]
    assert rates[50] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.001


def test_true_columns() -> None:
    """Against a loop over pixels: left[y, x] is right[y, x - disparity], inf is unknown."""
    stride, rows, columns = 8, 6, 9
    rng = np.random.default_rng(0)
    disparity = rng.uniform(0, 30, (rows * stride, columns * stride)).astype(np.float32)
    disparity[rng.random(disparity.shape) < 0.2] = np.inf
    disparity[4, 4] = 4.0  # just inside the right image
    disparity[4, 12] = 12.5  # just outside
    actual = stereo.true_columns(torch.from_numpy(disparity), stride)
    assert actual.shape == (rows, columns)
    unknown = 0
    for row in range(rows):
        for column in range(columns):
            y, x = row * stride + stride // 2, column * stride + stride // 2
            pixel = x - float(disparity[y, x])
            if math.isinf(pixel) or pixel < 0:
                unknown += 1
                assert actual[row, column].isnan()
            else:
                assert float(actual[row, column]) == pytest.approx((pixel - stride // 2) / stride, abs=1e-5)
    assert 0 < unknown < rows * columns / 2
    assert not actual[0, 0].isnan()
    assert actual[0, 1].isnan()


def test_evaluation_of_a_perfect_backbone() -> None:
    """Raw 8 x 8 patches of noise find an exact shift; against the opposite shift they are all two cells off."""
    image = torch.rand(1, 3, 48, 80)
    shifted = torch.cat([image[..., 8:], torch.rand(1, 3, 48, 8)], 3)  # left[x] is right[x - 8]
    backbone = nn.PixelUnshuffle(8)

    def measure(disparity: float) -> stereo.Matches:
        known = torch.full((48, 80), disparity)
        known[:, 40:48] = torch.inf
        return stereo.evaluate(backbone, stereo.Pair(image, shifted, known, 8))

    matches = measure(8.0)
    assert matches.close == 1
    assert matches.median == 0
    assert int(matches.error.isnan().sum()) == 6 + 6  # the first column's match lies outside, the sixth is unknown
    wrong = measure(-8.0)
    assert wrong.median == 2
    assert wrong.close < 0.05  # the first column, which has no match in the right image, may land anywhere


def test_the_stereo_pair_is_not_trained_on() -> None:
    assert not [name for name in views.BUILT_IN if "stereo" in name or "motorcycle" in name]
    for photograph in views.load_photographs(None):
        assert min(photograph.shape[1:]) >= views.WINDOW
