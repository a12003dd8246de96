"""The projection head against its equations in numpy."""

from __future__ import annotations

import copy
import pickle
from collections import UserList
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import assert_close, flat64, numpy64
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densecl_ops import DenseCorrespondence, DenseProjectionHead, Projection, _checks
from densecl_ops.functional import location_correspondence


def params_of(head: nn.Module) -> oracle.Params:
    return {name: numpy64(value) for name, value in head.state_dict().items()}


def make_head(**options: object) -> DenseProjectionHead:
    return DenseProjectionHead(5, 7, 4, **options).double()


def check_head(head: DenseProjectionHead, features: torch.Tensor, tolerance: float = 1e-12) -> Projection:
    grid = None if head.grid_size is None else head.grid_size
    truth = oracle.head(params_of(head), numpy64(features), (grid, grid) if isinstance(grid, int) else grid)
    seen = head(features)
    assert isinstance(seen, Projection)
    assert_close(seen.image, truth.image, tolerance, "image")
    assert_close(seen.dense, truth.dense, tolerance, "dense")
    assert_close(seen.pooled, truth.pooled, tolerance, "pooled")
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
    side = grid if grid_size is None else (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    assert seen.dense.shape == (batch, 4, *side)
    assert seen.image.shape == seen.pooled.shape == (batch, 4)


def test_parameter_gradients() -> None:
    head, features = make_head(grid_size=(2, 3)), torch.randn(3, 5, 5, 4, dtype=torch.float64)
    truth = oracle.head(params_of(head), features.numpy(), (2, 3))
    d_image, d_dense = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, 2, 3, dtype=torch.float64)
    d_pooled = torch.randn(3, 4, dtype=torch.float64)
    image, dense, pooled = head(features)
    ((image * d_image).sum() + (dense * d_dense).sum() + (pooled * d_pooled).sum()).backward()
    grads = oracle.head_gradients(
        params_of(head), truth, d_image.numpy(), flat64(d_dense) + d_pooled.numpy()[:, :, None] / 6
    )
    for name, parameter in head.named_parameters():
        assert_close(parameter.grad, grads[name], 1e-12, name)


def test_gradient_to_features() -> None:
    head, features = make_head(grid_size=2), torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(head(x)), features)


def test_tokens_and_vectors() -> None:
    head, features = make_head(), torch.randn(3, 5, 2, 6, dtype=torch.float64)
    image, dense, pooled = check_head(head, features)
    tokens = head(features.flatten(2).transpose(1, 2).contiguous().transpose(1, 2))
    assert tokens.dense.shape == (3, 4, 12)
    assert_close(tokens.dense, dense, 1e-12)
    assert_close(tokens.image, image, 1e-12)
    assert_close(tokens.pooled, pooled, 1e-12)
    with pytest.warns(UserWarning, match=r"features: got \(B, C\) vectors, .* num_classes=0"):
        vector = head(features[:, :, 0, 0])
    assert vector.dense.shape == (3, 4)
    assert_close(vector.dense, dense[:, :, 0, 0], 1e-12)
    assert_close(vector.pooled, dense[:, :, 0, 0], 1e-12)


def test_nothing_is_normalised() -> None:
    """`pooled` is the mean of the raw dense map: doubling the last layer doubles every output."""
    head, features = make_head(), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    before = head(features)
    with torch.no_grad():
        for branch in (head.image_mlp, head.dense_mlp):
            for parameter in branch[-1].parameters():
                parameter.mul_(2)
    for a, b in zip(head(features), before, strict=True):
        assert_close(a, 2 * b, 1e-12)


def test_default_architecture() -> None:
    head = DenseProjectionHead()
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "image_mlp.0.weight": (2048, 2048),
        "image_mlp.0.bias": (2048,),
        "image_mlp.2.weight": (128, 2048),
        "image_mlp.2.bias": (128,),
        "dense_mlp.0.weight": (2048, 2048, 1, 1),
        "dense_mlp.0.bias": (2048,),
        "dense_mlp.2.weight": (128, 2048, 1, 1),
        "dense_mlp.2.bias": (128,),
    }


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, lambda c: nn.GroupNorm(1, c), lambda c: nn.Identity()])
def test_norm_layer(norm_layer: object) -> None:
    """Between the first layer and the ReLU of each branch; on 1 x 1 maps in the image branch."""
    head, features = make_head(norm_layer=norm_layer), torch.randn(4, 5, 3, 2, dtype=torch.float64)
    first = {branch: list(getattr(head, branch).parameters())[:2] for branch in ("image_mlp", "dense_mlp")}
    last = {branch: list(getattr(head, branch).parameters())[-2:] for branch in ("image_mlp", "dense_mlp")}
    norm = norm_layer(7).double()

    def branch(name: str, x: torch.Tensor) -> torch.Tensor:
        (w1, b1), (w2, b2) = first[name], last[name]
        hidden = norm(torch.einsum("hc,bcyx->bhyx", w1.flatten(1), x) + b1[:, None, None]).clamp(min=0)
        return torch.einsum("dh,bhyx->bdyx", w2.flatten(1), hidden) + b2[:, None, None]

    image, dense, pooled = head(features)
    wish = branch("dense_mlp", features)
    assert_close(image, branch("image_mlp", features.mean((2, 3), keepdim=True)), 1e-12)
    assert_close(dense, wish, 1e-12)
    assert_close(pooled, wish.mean((2, 3)), 1e-12)
    (image.sum() + dense.square().sum()).backward()  # the ReLU in place must not spoil what the norm saved


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies(duplicate: object) -> None:
    head, features = make_head(grid_size=2), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    twin = duplicate(head)
    for a, b in zip(head(features), twin(features), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        twin.image_mlp[0].weight.zero_()
    check_head(head, features)


def test_state_dict_round_trip() -> None:
    head, other = make_head(grid_size=2), make_head(grid_size=2)
    other.load_state_dict(head.state_dict())
    features = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    for a, b in zip(head(features), other(features), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    head = DenseProjectionHead(5, 7, 4, grid_size=2).to(dtype)
    features = torch.randn(2, 5, 4, 4).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert check_head(head, features, tolerance).dense.dtype == dtype


def test_autocast() -> None:
    head, features = DenseProjectionHead(5, 7, 4, grid_size=2), torch.randn(2, 5, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        check_head(head, features, 2e-2)
    assert not head(features).dense.isnan().any()


def test_hidden_channels_follow_in_channels() -> None:
    head = DenseProjectionHead(6, out_channels=4)
    assert head.image_mlp[0].weight.shape == (6, 6)
    assert repr(head).startswith(
        "DenseProjectionHead(\n  in_channels=6, hidden_channels=6, out_channels=4, grid_size=None"
    )


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
        seen = _checks.pool_to_grid(features, grid)
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
    assert repr(head).startswith(
        "DenseProjectionHead(\n  in_channels=5, hidden_channels=7, out_channels=4, grid_size=(2, 3)"
    )
    assert head(features).dense.shape == (2, 4, 2, 3)
    assert DenseCorrespondence(grid, mutual=np.True_)(features, features).index.shape == (2, 6)
    assert location_correspondence(boxes, boxes, grid).index.shape == (1, 6)
    for wrong in (np.array([2, 3]), b"23", torch.tensor(2)):
        with pytest.raises(TypeError, match=r"grid_size: got .*, expected an int"):
            DenseProjectionHead(5, grid_size=wrong)
