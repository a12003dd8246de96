"""docs/recipes/plain-moco.md: the loop without a host."""

from __future__ import annotations

from recipes import Network, check_moco_step, example, views


def test_step() -> None:
    model = example("moco_loop").Trainer(queue_size=13, momentum=0.9).double()
    q, k = model.encoder_q, model.encoder_k
    networks = Network.of(q.backbone, q.head), Network.of(k.backbone, k.head)
    assert check_moco_step(model, model, *networks, images=views(6, 24, 16)) == (6, 64, 3, 2)
