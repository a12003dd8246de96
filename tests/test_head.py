"""The projection head against its equations in numpy."""

from __future__ import annotations

from collections import UserList
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, numpy64
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densecl_ops import DenseCorrespondence, DenseProjectionHead, Projection, _maps
from densecl_ops.functional import location_correspondence


def make_head(**options: object) -> DenseProjectionHead:
    return DenseProjectionHead(5, 7, 4, **options).double()


def check_head(
    head: DenseProjectionHead, features: torch.Tensor, tolerance: float = 1e-12, **options: Any
) -> Projection:
    params, seen = {name: numpy64(value) for name, value in head.named_parameters()}, head(features)
    assert isinstance(seen, Projection)
    truth = oracle.head(params, numpy64(features), head.grid_size, **options)
    for name, actual, expected in zip(Projection._fields, seen, truth, strict=True):
        assert_close(actual, expected, tolerance, name)
    return seen


@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    grid_size=st.one_of(st.none(), st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    channels_last=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_head(
    batch: int, grid: tuple[int, int], grid_size: int | tuple[int, int] | None, channels_last: bool, seed: int
) -> None:
    head = make_head(grid_size=grid_size)
    features = torch.tensor(np.random.default_rng(seed).standard_normal((batch, 5, *grid)))
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    seen = check_head(head, features)
    assert seen.dense.shape == (batch, 4, *(head.grid_size or grid))
    assert seen.image.shape == seen.pooled.shape == (batch, 4)


def test_gradients() -> None:
    """Of features and parameters, by finite differences."""
    head, features = make_head(grid_size=(2, 3)), torch.randn(3, 5, 5, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def call(features: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), features))

    assert torch.autograd.gradcheck(call, (features, *parameters))


def test_tokens_and_vectors() -> None:
    head, features = make_head(), torch.randn(3, 5, 2, 6, dtype=torch.float64)
    as_map = check_head(head, features)
    tokens = head(features.flatten(2).transpose(1, 2).contiguous().transpose(1, 2))
    assert tokens.dense.shape == (3, 4, 12)
    for seen, wish in zip(tokens, as_map, strict=True):
        assert_close(seen, wish, 1e-12)
    with pytest.warns(UserWarning, match=r"features: got \(B, C\) vectors, .* num_classes=0"):
        vector = head(features[:, :, 0, 0])
    assert vector.dense.shape == (3, 4)
    for seen in (vector.dense, vector.pooled):
        assert_close(seen, as_map.dense[:, :, 0, 0], 1e-12)


@pytest.mark.parametrize(("options", "hidden", "out"), [({}, 2048, 128), ({"in_channels": 6, "out_channels": 4}, 6, 4)])
def test_architecture(options: dict[str, int], hidden: int, out: int) -> None:
    """The hidden layers are as wide as the backbone by default."""
    expected = {}
    for branch, kernel in (("image_mlp", ()), ("dense_mlp", (1, 1))):
        for layer, width in ((0, hidden), (2, out)):
            expected |= {f"{branch}.{layer}.weight": (width, hidden, *kernel), f"{branch}.{layer}.bias": (width,)}
    assert {name: tuple(p.shape) for name, p in DenseProjectionHead(**options).named_parameters()} == expected


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, lambda c: nn.GroupNorm(1, c), lambda c: nn.Identity()])
def test_norm_layer(norm_layer: object) -> None:
    """Between the first layer and the ReLU of each branch; on 1 x 1 maps in the image branch."""
    head, features = make_head(norm_layer=norm_layer), torch.randn(4, 5, 3, 2, dtype=torch.float64)
    norm = norm_layer(7).double()
    seen = check_head(head, features, norm=lambda x: numpy64(norm(torch.tensor(x)[..., None])[..., 0]))
    (seen.image.sum() + seen.dense.square().sum()).backward()  # the ReLU in place must not spoil what the norm saved


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    head, features = DenseProjectionHead(5, 7, 4, grid_size=2), torch.randn(2, 5, 4, 4)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        check_head(head, features, tolerance)
    assert check_head(head.to(dtype), features.to(dtype), tolerance).dense.dtype == dtype


@pytest.mark.parametrize("grid_size", [None, 2, (3, 4)])
def test_backward_hooks_and_determinism(grid_size: object) -> None:
    """Hooks on any layer, and no operator whose backward torch refuses under use_deterministic_algorithms on CUDA."""
    head, seen = make_head(grid_size=grid_size), []
    for layer in head.modules():
        layer.register_full_backward_hook(lambda module, *_: seen.append(module))
    features = torch.randn(2, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        head(features).dense.sum().backward()
    assert head.dense_mlp[0] in seen
    assert not [event.name for event in profile.events() if "adaptive" in event.name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [(3, 2), (4, 5)])
def test_pooling_rounds_once(dtype: torch.dtype, grid: tuple[int, int]) -> None:
    features = torch.randn(2, 3, 6, 6, dtype=dtype)
    with torch.autocast("cpu", dtype):
        seen = _maps.pool_to_grid("features", features, grid)
    assert seen.dtype == dtype
    truth = oracle.adaptive_pool(numpy64(features), grid)
    assert np.abs(numpy64(seen) - truth).max() <= np.abs(truth).max() * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "grid", [[2, 3], UserList([2, 3]), (np.int64(2), np.int32(3))], ids=["list", "config", "numpy"]
)
def test_sizes_from_a_configuration(grid: Any) -> None:
    """A list that is none of Python's, as OmegaConf has them, and numpy's numbers are taken as the pair they are."""
    features, boxes = torch.randn(2, 5, 4, 6), torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    head = DenseProjectionHead(np.int64(5), 7, np.int16(4), grid_size=grid)
    assert "in_channels=5, hidden_channels=7, out_channels=4, grid_size=(2, 3)" in repr(head)
    assert head(features).dense.shape == (2, 4, 2, 3)
    assert DenseCorrespondence(grid, mutual=np.True_)(features, features).index.shape == (2, 6)
    assert location_correspondence(boxes, boxes, grid).index.shape == (1, 6)
    for wrong in (np.array([2, 3]), b"23", torch.tensor(2)):
        with pytest.raises(TypeError, match=r"grid_size: got .*, expected an int"):
            DenseProjectionHead(5, grid_size=wrong)
