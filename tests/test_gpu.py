"""What only a GPU can show: races in time, offsets, streams, graphs, memory. `make test-gpu` runs these; others skip.

Numbers are the business of test_triton.py and tests/ptx, which `make execute` runs without a GPU, and of the selftest.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, to_device
from test_step import Step, views
from torch import Tensor

from densecl_ops import MomentumQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce
from densecl_ops.info_nce import triton_plan
from densecl_ops.selftest import cases, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device on this machine"),
]

QUEUE = 65536


def inputs(images: int, dtype: torch.dtype, negatives: int = QUEUE) -> dict[str, Any]:
    query, key = torch.randn(2, images, 128, 7, 7, device="cuda", dtype=dtype)
    index = torch.randint(49, (images, 49), device="cuda")
    queue = MomentumQueue(negatives, 128, dtype=dtype).cuda()
    return {"query": query, "key": key, "negatives": queue, "correspondence": index}


def rows_and_gradient(arguments: dict[str, Any], backend: str = "triton") -> tuple[Tensor, Tensor]:
    query = arguments["query"].detach().requires_grad_()
    loss = dense_info_nce(**(arguments | {"query": query}), reduction="none", backend=backend)
    loss.sum().backward()
    return loss.detach(), query.grad


def test_matching_has_no_race_with_every_multiprocessor_busy() -> None:
    """A tile that is overwritten while a product reads it gives other scores, in all runs or in some."""
    (case,) = [case for case in cases(real=True, images=256) if "repeated" in case.options]
    assert "failed" not in check(case, "triton", torch.device("cuda"))


def exact_rows(*shape: int) -> Tensor:
    """(*shape, 128) vectors of length 8: half of the channels are 1 or -1, so that bfloat16 holds the unit vectors."""
    signs, places = (torch.randint(2, (*shape, 64), device="cuda") for _ in range(2))
    signs = 2 * signs - 1
    return torch.stack([signs * places, signs * (1 - places)], -1).flatten(-2).to(torch.bfloat16)


@pytest.mark.parametrize("descriptor", [False, True], ids=["pointers", "descriptor"])
@pytest.mark.parametrize("scale", [8, 128], ids=["no shift", "running max"])
def test_no_race_with_every_multiprocessor_busy(monkeypatch: pytest.MonkeyPatch, scale: int, descriptor: bool) -> None:
    """A tile that is read before its copy has landed shows, in some row of some run or in all of them alike.

    With a 1 / t of 8 or 128 times ln 2 the scaled queries are exact in bfloat16 too, and so are all logits. What is
    left of the loss's error is float32's: 1e-6 at a scale of 8, where one tile of 128 other negatives in the place of
    the right ones moves half of the losses by 9e-5 and more.
    """
    choose = triton_plan.choose
    monkeypatch.setattr(triton_plan, "choose", lambda *of: choose(*of)._replace(descriptor=descriptor))
    arguments = inputs(256, torch.bfloat16)
    arguments["query"] = exact_rows(256, 49).mT.unflatten(2, (7, 7))
    arguments["key"] = exact_rows(256, 49).mT.unflatten(2, (7, 7))
    arguments["negatives"].enqueue(exact_rows(QUEUE))
    arguments["temperature"] = math.log2(math.e) / scale
    first, exact = rows_and_gradient(arguments), []
    for image in range(0, 256, 4):  # of the eager form in float64: 196 rows of logits take 103 MB
        part = {name: x[image : image + 4] if isinstance(x, Tensor) else x for name, x in arguments.items()}
        exact.append(rows_and_gradient(part | {"query": part["query"].double()}, "eager"))
    loss, gradient = map(torch.cat, zip(*exact, strict=True))
    torch.testing.assert_close(first[0].double(), loss, rtol=2e-6, atol=1e-5)
    assert (first[1].double() - gradient).norm() < 4e-3 * gradient.norm()
    for _ in range(200):
        assert_same(rows_and_gradient(arguments), first)


def test_offsets_beyond_two_to_the_31() -> None:
    """17 million queue rows of 128 make 2.2e9 elements; the query and key maps pass 2^31 too."""
    negatives = torch.zeros(17_000_000, 128, device="cuda", dtype=torch.bfloat16)
    direction = F.normalize(torch.randn(128, device="cuda"), dim=0)
    negatives[-1] = direction
    query = direction.view(1, 128, 1, 1).expand(1, 128, 4, 4).contiguous().requires_grad_()
    key = torch.randn(1, 128, 4, 4, device="cuda")
    loss, rank = dense_info_nce(query, key, negatives, return_rank=True, backend="triton", temperature=0.05)
    positive = (F.normalize(key.flatten(2), dim=1)[0] * direction[:, None]).sum(0) / 0.05
    own = torch.log(torch.exp((negatives[-1].float() @ direction) / 0.05) + len(negatives) - 1)
    torch.testing.assert_close(loss, F.softplus(own - positive).mean(), rtol=1e-2, atol=0)
    assert (rank == (positive < 0).long().flatten() * (len(negatives) - 1) + 1).all()
    del negatives
    big = torch.empty(1, 2_200_000, 32, 32, device="cuda", dtype=torch.bfloat16).normal_()
    seen = dense_correspondence(big, big, backend="triton")
    assert torch.equal(seen.index[0], torch.arange(1024, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    arguments = {name: value.to("cuda:1") for name, value in inputs(4, torch.bfloat16).items()}
    torch.cuda.set_device(0)
    loss = dense_info_nce(**arguments, backend="triton")
    assert loss.device == torch.device("cuda:1")
    torch.testing.assert_close(loss, dense_info_nce(**arguments, backend="blockwise"), rtol=1e-2, atol=0)


class OnDevice(Step):
    """A step with everything a captured graph needs to stay where it is."""

    def __init__(self, init: str = "random") -> None:
        super().__init__("triton", torch.float32, init)
        self.match.mutual = True
        self.maps = to_device("triton", *views(4, torch.float32))
        self.start = copy.deepcopy(self.state_dict())

    def restart(self) -> None:
        self.load_state_dict(self.start)

    def total(self) -> Tensor:
        image_loss, dense_loss, rank = self(*self.maps)
        return image_loss + dense_loss + 0 * rank.sum()

    def run(self) -> Tensor:
        self.head.zero_grad(set_to_none=False)
        loss = self.total()
        loss.backward()
        return loss.detach()


def test_no_synchronisation_in_a_step() -> None:
    step = OnDevice()
    step.run()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's own: in TF32, or with atomics, another kernel for the same convolution is another result."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def test_cuda_graph_equals_eager_steps() -> None:
    step = OnDevice("empty")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    step.restart()
    eager = [step.run().item() for _ in range(4)]
    step.restart()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.run()
    step.restart()
    replayed = []
    for _ in range(4):
        graph.replay()
        replayed.append(loss.item())
    assert replayed == eager
    assert (int(step.dense_queue.count), int(step.dense_queue.position)) == (13, 4 * 4 - 13)


def test_compiled_step_has_no_graph_break() -> None:
    step = OnDevice()
    eager = step.total()
    step.restart()
    torch.testing.assert_close(torch.compile(step.total, fullgraph=True)(), eager)


@pytest.mark.parametrize("negatives", [4096, 65536, 1_048_576])
def test_memory_does_not_grow_with_the_queue(negatives: int) -> None:
    """Loss forward and backward allocate O(N * D) beyond their inputs: at most 12 float32 copies of the queries."""
    arguments = inputs(256, torch.bfloat16, negatives=negatives)
    copies = 4 * arguments["query"].numel()
    rows_and_gradient(arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows_and_gradient(arguments)
    assert torch.cuda.max_memory_allocated() - before <= 12 * copies


def test_auto_is_triton_without_warning(recwarn: pytest.WarningsRecorder) -> None:
    arguments = inputs(4, torch.float32)
    assert torch.equal(dense_info_nce(**arguments), dense_info_nce(**arguments, backend="triton"))
    assert not [warning for warning in recwarn if "blockwise" in str(warning.message)]
