"""docs/recipes/byol.md: the loop without a host."""

from __future__ import annotations

import numpy as np
from helpers import assert_close
from recipes import (
    TOLERANCE,
    byol_terms,
    check_all_trained,
    check_maps,
    check_momentum,
    disturb,
    example,
    inputs_of,
    parameters_of,
    views,
)


def test_step() -> None:
    model = example("byol_loop").Trainer(momentum=0.9).double()
    disturb(model.target)
    images = views(6, 24, 16)
    with inputs_of(model.online.head) as maps_q, inputs_of(model.target.head) as maps_k:
        image_loss, dense_loss = model(*images)
    check_maps(maps_q, tuple(map(model.online.backbone, images)))
    check_maps(maps_k, tuple(map(model.target.backbone, images)))
    heads, predictors = (model.online.head, model.target.head), (model.predictor, model.dense_predictor)
    cosine, dense = np.transpose(
        [byol_terms(maps, heads, predictors) for maps in zip(maps_q, maps_k[::-1], strict=True)]
    )
    assert_close(image_loss, (1 - cosine).sum(), TOLERANCE, "image term")
    assert_close(dense_loss, dense.mean(), TOLERANCE, "dense term")

    (image_loss + dense_loss).backward()
    check_all_trained(model, model.online, model.predictor, model.dense_predictor)
    before = parameters_of(model.target)
    model.update_target()
    check_momentum(model.online, model.target, before)
