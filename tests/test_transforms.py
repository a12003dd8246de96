"""What torch does to a call before it runs: torch.func, inference mode, fake tensors, export, other defaults."""

import io
from functools import partial
from typing import Any

import pytest
import torch
from helpers import NoFloat64, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce, in_batch_negatives, location_correspondence
from densecl_ops.metrics import contrastive_accuracy, match_score, mutual_share


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    query, key = torch.randn(2, 2, 16, 3, 3).double()
    return query, key, torch.nn.functional.normalize(torch.randn(32, 16).double(), dim=1)


def pair(x: Tensor, y: Tensor, dim: int = 0) -> Tensor:
    return torch.stack([x, x * 2 + y], dim)


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, q, k, n: grad(f, argnums=(0, 1, 2))(q, k, n),
    "grad of a square": lambda f, q, k, n: grad(lambda *x: f(*x).square(), argnums=(0, 1, 2))(q, k, n),
    "jacrev": lambda f, q, k, n: jacrev(f)(q, k, n),
    "vjp": lambda f, q, k, n: vjp(f, q, k, n)[1](q.new_ones(())),
    "vmap": lambda f, q, k, n: vmap(f, in_dims=(0, None, None))(pair(q, k), k, n),
    "vmap over keys": lambda f, q, k, n: vmap(f, in_dims=(None, 1, None))(q, pair(k, q, 1), n),
    "vmap of grad": lambda f, q, k, n: vmap(grad(f, argnums=1), in_dims=(0, None, None))(pair(q, k), k, n),
    "grad of vmap": lambda f, q, k, n: grad(
        lambda q, k, n: vmap(f, in_dims=(0, None, 0))(q, k, n).sum(), argnums=(0, 1, 2)
    )(pair(q, k), k, pair(n, n.flip(0))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_agrees_with_eager(fused: str, transform: str, inputs: tuple[Tensor, ...]) -> None:
    def run(backend: str) -> Any:
        def matched_loss(q: Tensor, k: Tensor, n: Tensor) -> Tensor:
            return dense_info_nce(q, k, n, dense_correspondence(q, k, mutual=True, backend=backend), backend=backend)

        return TRANSFORMS[transform](matched_loss, *inputs)

    for ours, wish in zip(run(fused), run("eager"), strict=True):
        assert_close(ours, wish, 1e-12)


def dual(f: Any, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent.detach()


FORWARD = [
    lambda f, x, tangent: jvp(f, (x,), (tangent,))[1],
    dual,
    lambda f, x, tangent: dual(f, x.clone().requires_grad_(), tangent),
]


@pytest.mark.parametrize("forward", FORWARD)
def test_eager_alone_has_a_forward_derivative(fused: str, forward: Any, inputs: tuple[Tensor, ...]) -> None:
    query, key, negatives = inputs

    def loss(q: Tensor, backend: str = "eager") -> Tensor:
        return dense_info_nce(q, key, negatives, backend=backend)

    step = 1e-6
    slope = (loss(query + step * key) - loss(query - step * key)) / (2 * step)
    assert_close(forward(loss, query, key), slope, 1e-6)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        forward(partial(loss, backend=fused), query, key)


TWICE: list[Any] = [
    hessian,
    lambda f: jacrev(jacrev(f)),
    lambda f: grad(lambda x: grad(f)(x).square().sum()),
    lambda f: lambda q: grad(lambda k: grad(f)(q, k).square().sum())(q),
    lambda f: lambda q: grad(lambda w: grad(lambda x: w * f(x))(q).square().sum())(q.new_ones(())),
    lambda f: lambda q: (lambda back: grad(lambda w: back(w)[0].sum())(q.new_ones(())))(vjp(f, q)[1]),
    lambda f: lambda q: vjp(f, q)[1](q.new_ones(()).requires_grad_())[0].sum().backward(),
]


@pytest.mark.parametrize("twice", TWICE)
def test_second_derivatives_name_the_way_out(fused: str, twice: Any, inputs: tuple[Tensor, ...]) -> None:
    query, key, negatives = inputs
    with pytest.raises(RuntimeError, match=r"differentiated once only|backend='eager'"):
        twice(lambda q, k=key: dense_info_nce(q, k, negatives, backend=fused))(query)


def parts() -> tuple[Any, ...]:
    """Modules, features and boxes of two views."""
    head, queue = DenseProjectionHead(8, 8, 16, grid_size=2), MomentumQueue(32, 16)
    return head, queue, torch.randn(2, 2, 8, 3, 3), torch.randperm(16).view(2, 2, 4).float()


def everything(backend: str, head: Any, queue: Any, features: Tensor, boxes: Tensor) -> list[Tensor]:
    """What one step computes, from new parameters and rows."""
    torch.manual_seed(0)
    for module in (*head.modules(), queue):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    query, key = map(head, features)
    match = DenseCorrespondence(grid_size=2, mutual=True, min_score=0.1, backend=backend)(*features)
    places = [location_correspondence(*x, 3) for x in (boxes, boxes.int())]
    loss, rank = DenseInfoNCELoss(backend=backend)(query.dense, key.dense.detach(), queue, match, return_rank=True)
    negatives, own = in_batch_negatives(key.pooled.detach())
    others = dense_info_nce(query.image, key.image, negatives, exclude=own, backend=backend)
    others = others + dense_info_nce(query.image, key.image.detach(), queue, backend=backend)
    (loss + others).backward()
    queue.enqueue(key.pooled.detach())
    logged = match_score(match), contrastive_accuracy(rank, 2, match.valid), mutual_share(*features, backend=backend)
    gradients = [p.grad for p in head.parameters()]
    return [loss, rank, others, *logged, *match, *places[0], *places[1], queue.rows, *gradients]


@pytest.mark.parametrize("mode", [FakeTensorMode, NoFloat64])
def test_tensors_without_values_and_devices_without_float64(backend: str, mode: Any) -> None:
    """The shapes of a whole step."""
    with mode():
        seen = everything(backend, *parts())
    assert [(x.shape, x.dtype) for x in seen] == [(x.shape, x.dtype) for x in everything(backend, *parts())]


def test_a_size_from_a_traced_shape() -> None:
    """A grid_size that is no int while a program is traced becomes one of the program's numbers."""
    features = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)

    def match(query: Tensor, key: Tensor) -> Tensor:
        return dense_correspondence(query, key, grid_size=key.shape[3] // 2).index

    assert torch.equal(make_fx(match, tracing_mode="symbolic")(*features)(*features), match(*features))


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning", "ignore:.*jit.trace.*:DeprecationWarning")
def test_a_traced_match() -> None:
    """torch.jit.trace records the writes into a tile as copies of the first call's values."""

    def match(*features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dense_correspondence(*features, mutual=True)[:3]

    first, second = torch.randn(2, 2, 256, 14, 14), torch.randn(2, 2, 256, 14, 14)
    for seen, usual in zip(torch.jit.trace(match, (*first,))(*second), match(*second), strict=True):
        assert torch.equal(seen, usual)


def test_other_defaults(backend: str, defaults: None) -> None:
    with torch.device("cpu"):
        given = [x.float() for x in parts()]
    seen = [x.detach().clone() for x in everything(backend, *given)]
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    given[0].zero_grad()
    torch.testing.assert_close([x.detach() for x in everything(backend, *given)], seen)


@pytest.mark.parametrize("wanted", ["q", "qk", "qkn"])
def test_flop_counter_counts_the_products_of_the_textbook(fused: str, wanted: str, inputs: tuple[Tensor, ...]) -> None:
    leaves = [x.requires_grad_(letter in wanted) for x, letter in zip(inputs, "qkn", strict=True)]
    counts = []
    for backend in (fused, "eager"):
        with FlopCounterMode(display=False) as counter:
            match = dense_correspondence(*leaves[:2], mutual=True, backend=backend)
            dense_info_nce(*leaves, match, backend=backend).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("module", "count"), [(DenseProjectionHead(16, 8, 16, 3).eval(), 1), (DenseCorrespondence(), 2)]
)
def test_exported_programs_and_results_can_be_saved_and_loaded(module: torch.nn.Module, count: int) -> None:
    inputs, program, results = (torch.randn(2, 16, 6, 6),) * count, io.BytesIO(), io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), program)
    torch.save(module(*inputs), results)
    program.seek(0), results.seek(0)
    for loaded in (torch.export.load(program).module()(*inputs), torch.load(results, weights_only=True)):
        assert type(loaded) is type(module(*inputs))
        torch.testing.assert_close(loaded, module(*inputs))
