"""docs/recipes/solo-learn.md: the subclass of solo-learn's MoCoV2Plus, over a stand-in of it."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pages
import pytest
import recipes
import torch
from helpers import assert_close, numpy64
from standins import solo_methods
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CFG = SimpleNamespace(
    method_kwargs=type("Settings", (dict,), {"__getattr__": dict.__getitem__})(
        proj_hidden_dim=16, proj_output_dim=8, temperature=0.1, queue_size=12
    )
)


@pytest.fixture
def recipe() -> ModuleType:
    return recipes.example(
        "with_solo_learn", solo=solo_methods, solo__methods=solo_methods, solo__methods__mocov2plus=solo_methods
    )


@pytest.mark.parametrize(("small_crops", "checkpointed"), [(0, False), (2, False), (0, True)])
def test_step(recipe: ModuleType, small_crops: int, checkpointed: bool) -> None:
    model = recipe.DenseMoCoV2Plus(CFG).double()
    if checkpointed:
        model.criterion.forward = partial(checkpoint, model.criterion.forward, use_reentrant=False)
    recipes.disturb(model.backbone, model.head)
    host_queue = numpy64(model.queue).copy()
    truths = [recipes.truth_of(queue) for queue in model.dense_queues]
    crops = [*recipes.views(6, 64, 64), *recipes.views(6)[:small_crops]]
    pools = model.backbone.avgpool, model.momentum_backbone.avgpool
    with recipes.inputs_of(pools[0]) as maps_q, recipes.inputs_of(pools[1]) as maps_k:
        loss = model.training_step([torch.arange(6), crops, torch.arange(6)], 0)

    weights = recipes.parameters_of(model.head), recipes.parameters_of(model.head_k)
    queries, keys = ([oracle.head(w, m) for m in maps[:2]] for w, maps in zip(weights, (maps_q, maps_k), strict=True))
    assert (weights[0]["dense_mlp.0.weight"] != weights[1]["dense_mlp.0.weight"]).all()
    image, dense, class_losses, classifier = [], [], [], recipes.parameters_of(model.classifier)
    for query, key, image_rows, truth in zip(queries, keys[::-1], host_queue[::-1], truths[::-1], strict=True):
        index = oracle.match(query.grid, key.grid).index
        image.append(recipes.info_nce(query.image, key.image, image_rows.T, temperature=0.1).loss)
        dense.append(recipes.info_nce(query.dense, key.dense, truth, index=index, temperature=0.1).loss)
        logits = query.mean @ classifier["weight"].T + classifier["bias"]
        class_losses.append((np.log(np.exp(logits).sum(1)) - logits[np.arange(6), np.arange(6)]).mean())
    assert_close(model.logged["train_dense_loss"], np.mean(dense), recipes.TOLERANCE, "dense term")
    host_loss = np.mean(image) + np.mean(class_losses)
    assert_close(loss, 0.5 * host_loss + 0.5 * np.mean(dense), recipes.TOLERANCE, "loss")
    # One optimizer step and the host's end of a batch: everything trained is in a group once, and the dense head's
    # key moves with the rest.
    optimizer = torch.optim.SGD(model.learnable_params, lr=0.1)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    loss.backward()
    model.on_after_backward()
    for view in (0, 1):
        recipes.check_queue(model.dense_queues[view], truths[view], keys[view].pooled)
    recipes.check_all_trained(model, model.head)
    optimizer.step()
    before, model.trainer.global_step = recipes.parameters_of(model.head_k), 1
    model.on_train_batch_end(loss, [], 0)
    recipes.check_momentum(model.head, model.head_k, before)
    assert not model.backbone.layer4._forward_hooks
    assert not model.momentum_backbone.layer4._forward_hooks


def test_half_precision(recipe: ModuleType) -> None:
    """Under autocast the maps are half precision and channels_last; the dense loss stays float32."""
    model = recipe.DenseMoCoV2Plus(CFG)
    crops = [x.float() for x in recipes.views(6, 64, 64)]
    seen: list[Tensor] = []
    model.backbone.layer4.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step([torch.arange(6), crops, torch.arange(6)], 0)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model.logged["train_dense_loss"].dtype == torch.float32
    loss.backward()
    assert model.head.dense_mlp[0].weight.grad.isfinite().all()
    assert model.head.dense_mlp[0].weight.grad.any()


def test_one_line_of_main_pretrain_changes(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "with_solo_learn", recipe)
    space: dict[str, Any] = {"METHODS": {"mocov2plus": None}}
    exec("\n".join(pages.added_lines("recipes/solo-learn.md")), space)
    assert space["METHODS"]["mocov2plus"] is recipe.DenseMoCoV2Plus
