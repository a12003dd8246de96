"""docs/recipes/moco.md: the subclass of facebookresearch/moco's MoCo, over a clone of it or else a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipe_worker as worker
import torch
from recipes import Network, check_main, check_moco_step
from torch import Tensor, nn


def network(encoder: Any) -> Network:
    def maps(images: Tensor) -> tuple[Tensor]:
        return (encoder.layer4(encoder.relu(encoder.bn1(encoder.conv1(images)))),)

    return Network(encoder, encoder.fc, maps)


def test_step() -> None:
    model = worker.dense_moco(13)
    images = worker.moco_views(0)
    shape = check_moco_step(model, model, network(model.encoder_q), network(model.encoder_k), images=images)
    assert shape == (worker.BATCH, 8, 3, 2)


def test_names_and_options() -> None:
    """What main_moco.py passes by position, what main_lincls.py reads, what main_moco.py trains."""
    module = worker.moco()
    model = module.DenseMoCo(worker.Encoder, 5, 10, 0.9, 0.07, False)
    assert (model.m, model.criterion.temperature, model.image_queue.size, model.dense_queue.size) == (0.9, 0.07, 10, 10)
    kept = {name for name in model.state_dict() if name.startswith("encoder_q.") and ".fc." not in name}
    own = {f"encoder_q.{name}" for name in worker.Encoder(7).state_dict() if not name.startswith("fc.")}
    assert kept == own
    assert not [name for name in model.state_dict() if name in ("queue", "queue_ptr")]
    for name, value in model.encoder_q.state_dict().items():
        assert torch.equal(value, model.encoder_k.state_dict()[name])
    assert not any(p.requires_grad for p in model.encoder_k.parameters())
    with pytest.raises(ValueError, match=r"^base_encoder: got Sequential without avgpool, expected a torchvision"):
        module.backbone_map(nn.Sequential(nn.Identity()), torch.randn(1, 3, 8, 8))


def test_batch_norm_and_any_batch() -> None:
    """Queue of 10, batches of 6 and 5: MoCo asserts that the batch divides K."""
    model = worker.moco().DenseMoCo(lambda num_classes: worker.Encoder(num_classes, True), dim=5, K=10)
    for batch, position in ((6, 6), (5, 1)):
        image_loss, dense_loss, _ = model(*(view[:batch].float() for view in worker.moco_views(0)))
        assert torch.isfinite(image_loss + dense_loss)
        assert int(model.dense_queue.position) == position


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    check_main(worker.moco(), capsys)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_shuffle_and_equal_one_process(tmp_path: Path) -> None:
    """Left as it was shuffled, every key is off: so it was shuffled, and that was undone."""
    alone, ranks = worker.check_two_ranks(tmp_path, "moco", "moco, shuffle not undone")
    for step, expected in enumerate(alone):
        broken = sum(results["moco, shuffle not undone"][step]["losses"] for results in ranks) / 2
        assert ((broken - expected["losses"]).abs() > 1e-3).all()
