"""docs/recipes/byol.md: the loop without a host."""

from __future__ import annotations

import numpy as np
import pytest
import recipes
from helpers import assert_close


@pytest.mark.parametrize("contrastive", [True, False])
def test_step(contrastive: bool) -> None:
    model = recipes.example("byol_loop").Trainer(momentum=0.9, contrastive=contrastive).double()
    recipes.disturb(model.target)
    images = recipes.views(6, 24, 16)
    with recipes.inputs_of(model.online.head) as maps_q, recipes.inputs_of(model.target.head) as maps_k:
        image_loss, dense_loss = model(*images)
    recipes.check_maps(maps_q, tuple(map(model.online.backbone, images)))
    recipes.check_maps(maps_k, tuple(map(model.target.backbone, images)))
    heads, predictors = (model.online.head, model.target.head), (model.predictor, model.dense_predictor)
    both = [recipes.byol_terms(maps, heads, predictors, contrastive) for maps in zip(maps_q, maps_k[::-1], strict=True)]
    cosine, dense = np.transpose(both)
    assert_close(image_loss, (1 - cosine).sum(), recipes.TOLERANCE, "image term")
    assert_close(dense_loss, dense.mean(), recipes.TOLERANCE, "dense term")

    (image_loss + dense_loss).backward()
    recipes.check_all_trained(model, model.online, model.predictor, model.dense_predictor)
    before = recipes.parameters_of(model.target)
    model.update_target()
    recipes.check_momentum(model.online, model.target, before)
