"""docs/recipes/vit.md: patch tokens instead of a map."""

from __future__ import annotations

import pytest
import torch
from recipes import Network, check_moco_step, example
from torch import Tensor


def network(encoder: torch.nn.Module) -> Network:
    def maps(images: Tensor) -> tuple[Tensor, ...]:
        tokens = encoder.vit(images)
        return (tokens[:, 1:].transpose(1, 2), tokens[:, 0])[: 1 + encoder.use_class_token]

    return Network(encoder, encoder.head, maps)


@pytest.mark.parametrize("use_class_token", [False, True])
def test_step(use_class_token: bool) -> None:
    recipe = example("with_vit")
    vit = recipe.ViT(size=32, width=24)
    model = recipe.DenseCL(vit, width=24, queue_size=10, use_class_token=use_class_token).double()
    networks = network(model.encoder_q), network(model.encoder_k)
    shape = check_moco_step(model, lambda *images: model(*images, momentum=0.9), *networks)
    assert shape == (4, 24, 16, 1)


def test_tokens_are_a_view() -> None:
    recipe = example("with_vit")
    encoder = recipe.Encoder(recipe.ViT(), 96, False)
    tokens: list[Tensor] = []
    encoder.vit.register_forward_hook(lambda _m, _i, out: tokens.append(out))
    features, projection = encoder(torch.rand(2, 3, 64, 64))
    assert features.untyped_storage().data_ptr() == tokens[0].untyped_storage().data_ptr()
    assert torch.equal(features, tokens[0][:, 1:].transpose(1, 2))
    assert projection.dense.shape == (2, 128, 64)
