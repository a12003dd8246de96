"""docs/recipes/moco.md: the subclass of facebookresearch/moco's MoCo, over a stand-in of it and over a clone."""

from __future__ import annotations

from typing import Any

import moco_worker as worker
import pytest
import torch
from helpers import assert_close, run_ranks
from recipes import TOLERANCE, Network, check_main, check_moco_step, hosts
from torch import Tensor, nn

HOSTS = hosts("moco")


def network(encoder: Any) -> Network:
    def maps(images: Tensor) -> tuple[Tensor]:
        return (encoder.layer4(encoder.relu(encoder.bn1(encoder.conv1(images)))),)

    return Network(encoder, encoder.fc, maps)


@pytest.mark.parametrize("host", HOSTS)
def test_step(host: str) -> None:
    model = worker.new_model(worker.recipe(host), K=13)
    shape = check_moco_step(model, model, network(model.encoder_q), network(model.encoder_k), images=worker.views(0))
    assert shape == (worker.BATCH, 8, 3, 2)


def test_names_and_options() -> None:
    """What main_moco.py passes by position, what main_lincls.py reads, what main_moco.py trains."""
    module = worker.recipe("stand-in")
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
    torch.manual_seed(0)
    model = worker.recipe("stand-in").DenseMoCo(lambda num_classes: worker.Encoder(num_classes, True), dim=5, K=10)
    for batch, position in ((6, 6), (5, 1)):
        image_loss, dense_loss, _ = model(*(view[:batch].float() for view in worker.views(0)))
        assert torch.isfinite(image_loss + dense_loss)
        assert int(model.dense_queue.position) == position


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    check_main(worker.recipe("stand-in"), capsys)


# ---- two processes -------------------------------------------------------------------------------------------------

needs_ranks = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module", params=HOSTS)
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """The steps of one process on the whole batch, and of two gloo processes on a half each."""
    ranks = run_ranks(worker.__file__, 2, tmp_path_factory.mktemp("ranks"), request.param)
    model = worker.new_model(worker.recipe(request.param))
    return worker.run(model, model, slice(None)), ranks


@needs_ranks
def test_two_ranks_equal_one_process(two_ranks: tuple[Any, list[Any]]) -> None:
    alone, ranks = two_ranks
    for step, expected in enumerate(alone):
        first, second = (results["right"][step] for results in ranks)
        assert_close((first["losses"] + second["losses"]) / 2, expected["losses"], TOLERANCE, "losses")
        assert torch.equal(torch.cat([first["rank"], second["rank"]]), expected["rank"])
        for actual in (first, second):
            assert actual["grad"].keys() == expected["grad"].keys()
            for name, value in expected["grad"].items():
                assert_close(actual["grad"][name], value, TOLERANCE, name)
            for name, value in expected["state"].items():
                assert_close(actual["state"][name].double(), value.double(), TOLERANCE, name)


@needs_ranks
def test_shuffles_and_must_undo_it(two_ranks: tuple[Any, list[Any]]) -> None:
    """The key encoders see all images, in another order than they came; left so, every key is off."""
    alone, ranks = two_ranks
    for step, expected in enumerate(alone):
        seen = torch.cat([results["right"][step]["keys"] for results in ranks])
        order = [next(i for i, image in enumerate(expected["keys"]) if torch.equal(image, one)) for one in seen]
        assert sorted(order) == list(range(worker.BATCH))
        assert sorted(order[:3]) != [0, 1, 2], "no image changed its rank"
        broken = sum(results["shuffle not undone"][step]["losses"] for results in ranks) / 2
        assert ((broken - expected["losses"]).abs() > 1e-3).all()
