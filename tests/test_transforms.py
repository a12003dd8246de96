"""What torch does to a call before it runs: torch.func, inference mode, fake tensors, export, other defaults."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from helpers import FUSED, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from densecl_ops import Correspondence, DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce, in_batch_negatives
from densecl_ops.metrics import contrastive_accuracy, match_score


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key = torch.randn(2, 2, 16, 3, 3).double()
    return query, key, torch.nn.functional.normalize(torch.randn(32, 16).double(), dim=1), torch.randint(9, (2, 9))


def pair(x: Tensor, y: Tensor, dim: int = 0) -> Tensor:
    return torch.stack([x, x * 2 + y], dim)


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, q, k, n: grad(f, argnums=(0, 1, 2))(q, k, n),
    "jacrev": lambda f, q, k, n: jacrev(f)(q, k, n),
    "vmap": lambda f, q, k, n: vmap(f, in_dims=(0, None, None))(pair(q, k), k, n),
    "vmap over keys": lambda f, q, k, n: vmap(f, in_dims=(None, 1, None))(q, pair(k, q, 1), n),
    "vmap of grad": lambda f, q, k, n: vmap(grad(f, argnums=1), in_dims=(0, None, None))(pair(q, k), k, n),
    "grad of vmap": lambda f, q, k, n: grad(
        lambda q, k, n: vmap(f, in_dims=(0, None, 0))(q, k, n).sum(), argnums=(0, 1, 2)
    )(pair(q, k), k, pair(n, n.flip(0))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_torch_func_agrees_with_eager(backend: str, transform: str, inputs: tuple[Tensor, ...]) -> None:
    *maps, index = inputs

    def run(name: str) -> Any:
        return TRANSFORMS[transform](lambda q, k, n: dense_info_nce(q, k, n, index, backend=name), *maps)

    for ours, truth in zip(run(backend), run("eager"), strict=True):
        assert_close(ours, truth, 1e-12)


def in_dual_level(f: Any, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("learns", [False, True])
def test_eager_has_a_forward_derivative(learns: bool, inputs: tuple[Tensor, ...]) -> None:
    query, key, negatives, _ = inputs

    def loss(q: Tensor) -> Tensor:
        return dense_info_nce(q, key, negatives, backend="eager")

    tangent = in_dual_level(
        lambda q: forward_ad.unpack_dual(loss(q)).tangent, query.clone().requires_grad_(learns), key
    )
    assert_close(tangent.detach(), jvp(loss, (query,), (key,))[1], 1e-12)
    step = 1e-6
    assert_close(tangent.detach(), (loss(query + step * key) - loss(query - step * key)) / (2 * step), 1e-6)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda f, q, k: jvp(f, (q,), (k,)), "no forward-mode derivative"),
        (lambda f, q, k: in_dual_level(f, q, k), "no forward-mode derivative"),
        (lambda f, q, k: in_dual_level(f, q.requires_grad_(), k), "no forward-mode derivative"),
        (lambda f, q, k: hessian(f)(q), "backend='eager'"),
        (lambda f, q, k: grad(lambda x: grad(f)(x).square().sum())(q), "differentiated once only|backend='eager'"),
    ],
)
@pytest.mark.parametrize("backend", FUSED)
def test_what_torch_func_cannot_have_names_the_way_out(
    backend: str, transform: Any, words: str, inputs: tuple[Tensor, ...]
) -> None:
    query, key, negatives, _ = inputs
    with pytest.raises(RuntimeError, match=words):
        transform(lambda q: dense_info_nce(q, key, negatives, backend=backend), query, key)


@pytest.mark.parametrize("backend", FUSED)
def test_matching_under_vmap(backend: str) -> None:
    maps = torch.randn(2, 3, 2, 16, 3, 3)
    mapped = vmap(lambda q, k: tuple(dense_correspondence(q, k, mutual=True, backend=backend)))(*maps)
    for i, (query, key) in enumerate(zip(*maps, strict=True)):
        truth = dense_correspondence(query, key, mutual=True, backend="eager")
        torch.testing.assert_close([x[i] for x in mapped], list(truth))


@pytest.mark.parametrize("key_grad", [False, True])
def test_key_side_under_inference_mode(backend: str, key_grad: bool) -> None:
    """Every input that such a side makes, in every place: the same loss and gradients as without the mode."""
    query, key_map, features = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3), torch.randn(2, 2, 8, 3, 3)
    queue, criterion = MomentumQueue(32, 16), DenseInfoNCELoss(backend=backend)

    def run(mode: Any) -> list[Tensor]:
        with mode:
            match = DenseCorrespondence()(*features)
            match = Correspondence(match.index, match.score, match.score > -0.5)
            options = {"weight": match.score.clamp(min=0), "exclude": torch.tensor([1, 3])}
            key = key_map.clone()
        leaves = [x.clone().requires_grad_() for x in (query, key_map)[: 1 + key_grad]]
        loss = criterion(*[*leaves, key][:2], queue, match, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    torch.testing.assert_close(run(torch.inference_mode()), run(torch.no_grad()))


def parts() -> tuple[DenseProjectionHead, MomentumQueue, Tensor]:
    return DenseProjectionHead(8, 8, 16, grid_size=2), MomentumQueue(32, 16), torch.randn(2, 2, 8, 3, 3)


def everything(backend: str, head: DenseProjectionHead, queue: MomentumQueue, features: Tensor) -> list[Tensor]:
    """What one step computes, from new parameters and rows."""
    torch.manual_seed(0)
    for module in (*head.modules(), queue):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    query, key = map(head, features)
    match = DenseCorrespondence(grid_size=2, mutual=True, min_score=0.1, backend=backend)(*features)
    loss, rank = DenseInfoNCELoss(backend=backend)(query.dense, key.dense.detach(), queue, match, return_rank=True)
    negatives, own = in_batch_negatives(key.pooled.detach())
    others = dense_info_nce(query.image, key.image, negatives, exclude=own, backend=backend)
    (loss + others).backward()
    queue.enqueue(key.pooled.detach())
    gradients = [p.grad for p in head.parameters()]
    return [loss, rank, *match, others, match_score(match), contrastive_accuracy(rank), queue.rows, *gradients]


def test_fake_tensors(backend: str) -> None:
    """A whole step without a value: the shapes of the real one."""
    with FakeTensorMode():
        fake = everything(backend, *parts())
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in everything(backend, *parts())]


def test_other_defaults(backend: str, defaults: None) -> None:
    """Of dtype and device."""
    with torch.device("cpu"):
        given = [x.float() for x in parts()]
    seen = [x.detach().clone() for x in everything(backend, *given)]
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    given[0].zero_grad()
    torch.testing.assert_close([x.detach() for x in everything(backend, *given)], seen)


@pytest.mark.parametrize("wanted", ["q", "qk", "qkn"])
@pytest.mark.parametrize("backend", FUSED)
def test_flop_counter_counts_the_products_of_the_textbook(
    backend: str, wanted: str, inputs: tuple[Tensor, ...]
) -> None:
    def count(name: str) -> int:
        leaves = [x.clone().requires_grad_(letter in wanted) for x, letter in zip(inputs, "qkn", strict=False)]
        with FlopCounterMode(display=False) as counter:
            match = dense_correspondence(*leaves[:2], mutual=True, backend=name)
            dense_info_nce(*leaves, match, backend=name).backward()
        return counter.get_total_flops()

    assert count(backend) == count("eager") > 0


@pytest.mark.parametrize(
    ("module", "count"), [(DenseProjectionHead(16, 8, 16, 3).eval(), 1), (DenseCorrespondence(), 2)]
)
def test_exported_programs_can_be_saved_and_loaded(module: torch.nn.Module, count: int) -> None:
    inputs, file = (torch.randn(2, 16, 6, 6),) * count, io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), file)
    file.seek(0)
    loaded = torch.export.load(file).module()(*inputs)
    assert type(loaded) is type(module(*inputs))
    torch.testing.assert_close(loaded, module(*inputs))
