"""What torch does to a call before it runs: torch.func, inference mode, fake tensors, export."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from helpers import FUSED, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from densecl_ops import Correspondence, DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce, in_batch_negatives
from densecl_ops.metrics import contrastive_accuracy, match_score


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 16, 3, 3).double()
    return query, key, torch.nn.functional.normalize(torch.randn(32, 16).double(), dim=1), torch.randint(9, (2, 9))


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, q, k, n: grad(f, argnums=(0, 1, 2))(q, k, n),
    "jacrev": lambda f, q, k, n: jacrev(f)(q, k, n),
    "vmap": lambda f, q, k, n: vmap(f, in_dims=(0, None, None))(torch.stack([q, q * 2 + k]), k, n),
    "vmap over keys": lambda f, q, k, n: vmap(f, in_dims=(None, 1, None))(q, torch.stack([k, k + q], 1), n),
    "vmap of grad": lambda f, q, k, n: vmap(grad(f, argnums=1), in_dims=(0, None, None))(
        torch.stack([q, q * 2 + k]), k, n
    ),
    "grad of vmap": lambda f, q, k, n: grad(
        lambda q, k, n: vmap(f, in_dims=(0, None, 0))(q, k, n).sum(), argnums=(0, 1, 2)
    )(torch.stack([q, q * 2 + k]), k, torch.stack([n, n.flip(0)])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_torch_func_agrees_with_eager(backend: str, transform: str, inputs: tuple[Tensor, ...]) -> None:
    query, key, negatives, index = inputs

    def run(name: str) -> Any:
        return TRANSFORMS[transform](
            lambda q, k, n: dense_info_nce(q, k, n, index, backend=name), query, key, negatives
        )

    for ours, truth in zip(run(backend), run("eager"), strict=True):
        assert_close(ours, truth, 1e-12)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda f, q, k: jvp(f, (q,), (k,)), "no forward-mode derivative"),
        (lambda f, q, k: hessian(f)(q), "backend='eager'"),
        (lambda f, q, k: grad(lambda x: grad(f)(x).square().sum())(q), "differentiated once only"),
    ],
)
@pytest.mark.parametrize("backend", FUSED)
def test_what_torch_func_cannot_have_names_the_way_out(
    backend: str, transform: Any, words: str, inputs: tuple[Tensor, ...]
) -> None:
    query, key, negatives, _ = inputs
    with pytest.raises(RuntimeError, match=f"{words}.*|backend='eager'"):
        transform(lambda q: dense_info_nce(q, key, negatives, backend=backend), query, key)


@pytest.mark.parametrize("backend", FUSED)
def test_matching_under_vmap(backend: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 2, 16, 3, 3)
    mapped = vmap(lambda q, k: tuple(dense_correspondence(q, k, mutual=True, backend=backend)))(query, key)
    for i in range(3):
        for ours, truth in zip(
            mapped, dense_correspondence(query[i], key[i], mutual=True, backend="eager"), strict=True
        ):
            torch.testing.assert_close(ours[i], truth)


@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_key_side_under_inference_mode(backend: str) -> None:
    """Every input that such a side makes, in every place: the same loss and gradients as without the mode."""
    torch.manual_seed(0)
    query, key_map, features = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3), torch.randn(2, 2, 8, 3, 3)

    def run(mode: Any, key_grad: bool) -> list[Tensor]:
        with mode:
            match = DenseCorrespondence()(*features)
            match = Correspondence(match.index, match.score, match.score > -0.5)
            weight, exclude, key = match.score.clamp(min=0), torch.tensor([1, 3]), key_map.clone()
        if key_grad:
            key = key_map.clone().requires_grad_()
        leaf = query.clone().requires_grad_()
        torch.manual_seed(1)
        loss = DenseInfoNCELoss(backend=backend)(
            leaf, key, MomentumQueue(32, 16), match, weight=weight, exclude=exclude
        )
        loss.backward()
        return [loss.detach(), leaf.grad, *([key.grad] if key_grad else [])]

    for key_grad in (False, True):
        seen, truth = run(torch.inference_mode(), key_grad), run(torch.no_grad(), key_grad)
        torch.testing.assert_close(seen, truth)


@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_fake_tensors(backend: str) -> None:
    """A whole step without a value: the shapes of the real one."""

    def step() -> list[Tensor]:
        head, queue = DenseProjectionHead(8, 8, 16, grid_size=2), MomentumQueue(32, 16)
        first, second = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
        projection = head(first)
        match = DenseCorrespondence(grid_size=2, backend=backend)(first, second)
        loss, rank = DenseInfoNCELoss(backend=backend)(
            projection.dense, head(second).dense.detach(), queue, match, exclude=torch.tensor([0, 1]), return_rank=True
        )
        loss.backward()
        queue.enqueue(projection.pooled.detach())
        return [loss, rank, *(p.grad for p in head.dense_mlp.parameters())]

    with FakeTensorMode():
        fake = step()
    for ours, real in zip(fake, step(), strict=True):
        assert (ours.shape, ours.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_fake_tensors_beside_real_modules(backend: str) -> None:
    """A queue made outside the mode, a backward pass outside it, and a text of what has no value."""
    queue = MomentumQueue(32, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.randn(2, 16, requires_grad=True)
        criterion = DenseInfoNCELoss(learnable_temperature=True, backend=backend)
        loss = criterion(query, torch.randn(2, 16), queue)
        assert "temperature=?" in str(criterion)
    loss.backward()
    assert query.grad.shape == (2, 16)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_make_fx(backend: str, tracing_mode: str, inputs: tuple[Tensor, ...]) -> None:
    def step(q: Tensor, k: Tensor, n: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        match = dense_correspondence(q, k, mutual=True, backend=backend)
        return dense_info_nce(q, k, n, match, backend=backend), dense_info_nce(q, k, n, index, backend=backend)

    query, key, negatives, index = inputs
    traced = make_fx(step, tracing_mode=tracing_mode)(*inputs)
    other = (key * 2 + query, query, negatives, index.flip(1))
    torch.testing.assert_close(traced(*other), step(*other))


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


def test_exported_programs_can_be_saved_and_loaded() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 16, 6, 6)
    for module, inputs in (
        (DenseProjectionHead(16, 8, 16, 3).eval(), (features,)),
        (DenseCorrespondence(), (features,) * 2),
    ):
        file = io.BytesIO()
        torch.export.save(torch.export.export(module, inputs), file)
        file.seek(0)
        loaded = torch.export.load(file).module()(*inputs)
        assert type(loaded) is type(module(*inputs))
        torch.testing.assert_close(loaded, module(*inputs))


def everything(backend: str) -> list[Tensor]:
    """What a step computes from modules and inputs that were made under the ordinary defaults."""
    head = DenseProjectionHead(8, 8, 16, grid_size=4).to_empty(device="cpu").float()
    queue = MomentumQueue(32, 16, dtype=torch.float32).to_empty(device="cpu")
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    first, second = torch.randn(2, 8, 6, 6, **options), torch.randn(2, 8, 6, 6, **options)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    queue.reset_parameters()
    query, key = head(first), head(second)
    match = DenseCorrespondence(grid_size=4, mutual=True, min_score=0.1, backend=backend)(first, second)
    loss, rank = DenseInfoNCELoss(backend=backend)(query.dense, key.dense.detach(), queue, match, return_rank=True)
    loss.backward()
    negatives, own = in_batch_negatives(key.pooled)
    queue.enqueue(key.pooled.detach())
    others = dense_info_nce(query.image, key.image, negatives, exclude=own, backend=backend)
    return [
        loss,
        rank,
        *match,
        others,
        match_score(match),
        contrastive_accuracy(rank),
        queue.rows,
        head.dense_mlp[0].weight.grad,
    ]


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_other_defaults(backend: str) -> None:
    seen = everything(backend)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    for ours, truth in zip(seen, everything(backend), strict=True):
        torch.testing.assert_close(ours, truth)
