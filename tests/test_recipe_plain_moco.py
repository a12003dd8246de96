"""docs/recipes/plain-moco.md: the loop without a host."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers import assert_close
from pages import DOCS, blocks
from recipes import EXAMPLES, TOLERANCE, Network, check_moco_step, disturb, example, load, views


def test_step() -> None:
    model = example("moco_loop").Trainer(queue_size=13, momentum=0.9).double()
    q, k = model.encoder_q, model.encoder_k
    networks = Network.of(q.backbone, q.head), Network.of(k.backbone, k.head)
    assert check_moco_step(model, model, *networks, images=views(6, 24, 16)) == (6, 64, 3, 2)


def before(diff: str, lines: list[str]) -> Iterator[str]:
    """What the lines were before the diff."""
    after, removed = iter(lines), []
    for sign, line in ((line[:1], line[1:]) for line in diff.splitlines() if line):
        if sign == "-":
            removed.append(line)
            continue
        yield from itertools.takewhile(lambda other, line=line: other != line, after)
        yield from removed
        yield from [line] if sign == " " else []
        removed = []
    yield from after


def test_removed_lines_are_moco_v2(tmp_path: Path) -> None:
    """The page's diff, undone, gives a MoCo-v2 trainer, whose loss is the image term."""
    (diff,) = blocks(DOCS / "recipes" / "plain-moco.md", "diff")
    file = tmp_path / "moco_v2.py"
    file.write_text("\n".join(before(diff, (EXAMPLES / "moco_loop.py").read_text().splitlines())))
    assert "densecl_ops" not in file.read_text()
    torch.manual_seed(0)
    ours, theirs = (module.Trainer(queue_size=10).double() for module in (example("moco_loop"), load(file)))
    disturb(ours.encoder_q)
    for mine, other in ((ours.encoder_q, theirs.encoder_q), (ours.encoder_k, theirs.encoder_k)):
        other.backbone.load_state_dict(mine.backbone.state_dict())
        other.mlp.load_state_dict(mine.head.image_mlp.state_dict())
    theirs.queue.copy_(ours.image_queue.rows)
    for _ in range(3):  # batches of 4 wrap the queue of 10
        images = views()
        assert_close(ours(*images)[0], theirs(*images), TOLERANCE, "loss")
        assert_close(ours.image_queue.rows, theirs.queue, TOLERANCE, "queue")
        assert int(ours.image_queue.position) == int(theirs.position)
