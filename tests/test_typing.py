"""A user's script with every public name, which type checkers read: no call is Any, and mistakes are seen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from densecl_ops import (
    Correspondence,
    DenseCorrespondence,
    DenseInfoNCELoss,
    DenseProjectionHead,
    MomentumQueue,
    Projection,
    functional,
    interop,
    metrics,
    visualize,
)

reduction: Literal["mean", "sum", "none"] = "mean"
head = DenseProjectionHead(8, 8, 16, grid_size=(2, 2), norm_layer=nn.BatchNorm2d)
match = DenseCorrespondence(grid_size=2, mutual=True, min_score=0.1, backend="auto")
criterion = DenseInfoNCELoss(0.2, reduction, learnable_temperature=False, backend="blockwise")
queue = MomentumQueue(32, 16, init="empty", dtype=torch.float32, gather_distributed=False)
first, second = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4)
MISTAKES = [
    'DenseInfoNCELoss(reduction="avg")',
    'MomentumQueue(init="zeros")',
    'DenseCorrespondence(backend="cuda")',
    "match(1, first)",
    "head(first).denze",
    "visualize.plot",
    "criterion.temperature = 'low'",
]


@pytest.mark.parametrize("flag", [True, False])
def test_the_script_runs(flag: bool) -> None:
    projection = assert_type(head(first), Projection)
    assert_type(projection.dense, Tensor)
    key = head(second)
    pairs = assert_type(match(first, second), Correspondence)
    assert_type(pairs.index, Tensor)
    assert_type(criterion(projection.dense, key.dense, queue, pairs), Tensor)
    with_rank = criterion(projection.dense, key.dense, queue, pairs, return_rank=True)
    loss, rank = assert_type(with_rank, tuple[Tensor, Tensor])
    assert loss.isfinite()
    both = criterion(projection.dense, key.dense, queue.rows, pairs.index, return_rank=flag)
    assert_type(both, Tensor | tuple[Tensor, Tensor])
    assert isinstance(both, tuple) == flag
    assert_type(queue.enqueue(key.pooled), None)
    assert_type(queue.rows, Tensor)
    assert_type(criterion.temperature, float | Tensor)
    negatives, own = assert_type(functional.in_batch_negatives(key.pooled), tuple[Tensor, Tensor])
    image = functional.dense_info_nce(projection.image, key.image, negatives, exclude=own, reduction="none")
    assert_type(image, Tensor)
    both_of = functional.dense_info_nce(projection.image, key.image, negatives, temperature=0.1, return_rank=True)
    assert_type(both_of, tuple[Tensor, Tensor])
    assert_type(functional.dense_correspondence(first, second, backend="eager"), Correspondence)
    boxes = assert_type(functional.boxes_from_torchvision([(0, 0, 4, 4)] * 4), Tensor)
    assert_type(functional.location_correspondence(boxes, boxes, 2), Correspondence)
    assert_type(metrics.contrastive_accuracy(rank), Tensor)
    assert_type(metrics.match_score(pairs), Tensor)
    assert_type(metrics.mutual_share(first, second), Tensor)
    checkpoint = interop.Checkpoint.from_modules(head_q=head, dense_queue=queue)
    assert_type(assert_type(checkpoint, interop.Checkpoint).load_into(head_q=head), list[str])
    assert all(map(callable, (interop.read_checkpoint, interop.write_checkpoint, visualize.plot_correspondence)))


@pytest.mark.parametrize("name", ["mypy", "pyright"])
def test_every_call_has_a_type_and_mistakes_are_seen(name: str, tmp_path: Path) -> None:
    """Strict mode and assert_type fail on Any; the mistakes stand on lines of their own after this file's."""
    pytest.importorskip(name)
    user, good, root = tmp_path / "user.py", Path(__file__).read_text(), str(Path(__file__).parents[1])
    user.write_text(good + "\n".join(MISTAKES) + "\n")
    options = ["--strict", f"--cache-dir={root}/.mypy_cache/user", "--config-file=", "--show-absolute-path", str(user)]
    if name == "pyright":  # in its strict mode an unknown or partly unknown type is an error
        (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportPrivateUsage": false}')
        options = ["--pythonpath", sys.executable, "--project", str(tmp_path)]
    command = [sys.executable, "-m", name, *options]
    environment = os.environ | {"MYPYPATH": root, "PYTHONPATH": root}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    seen = {int(line) for line in re.findall(r"user\.py:(\d+):.* error:", result.stdout)}
    lines = good.count("\n")
    assert seen == set(range(lines + 1, lines + 1 + len(MISTAKES))), result.stdout + result.stderr
