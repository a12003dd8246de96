"""What the loss holds on to: never anything of size N x K."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import make_case
from torch.autograd.profiler import profile


def peak_of(function: Callable[[], object]) -> float:
    """Most bytes that torch held at once beyond those it held before, in MiB."""
    with profile(profile_memory=True) as record:
        function()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return held.max() / 2**20


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ("plain", 8),
        ("bfloat16, rank", 12),  # a float32 copy of the rows would be 32 MiB
        ("rank, key, exclude", 12),
        ("negatives", 12 + 32),  # and their gradient
        ("rank, autocast", 8),
    ],
)
def test_memory_of_the_published_setting(fused: str, options: str, limit: float) -> None:
    """N = 1,568 against K = 65,536: one float32 logit matrix would be 392 MiB. Inputs of 1.5 MiB included."""
    dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    rows = torch.nn.functional.normalize(torch.randn(65536, 128), dim=1).to(dtype)
    rows.requires_grad_("negatives" in options)

    def step() -> None:
        query = torch.randn(32, 128, 7, 7, dtype=dtype, requires_grad=True)
        key = torch.randn(32, 128, 7, 7, dtype=dtype, requires_grad="key" in options)
        exclude = torch.zeros(32, dtype=torch.int64) if "exclude" in options else None
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in options):
            result = helpers.info_nce(fused, query, key, rows, exclude=exclude, return_rank="rank" in options)
        (result[0] if "rank" in options else result).backward()

    assert peak_of(lambda: torch.ones(256, 1024) + torch.ones(256, 1024)) == pytest.approx(3, abs=0.1)
    assert peak_of(step) < limit


@pytest.mark.parametrize(
    ("size", "negatives", "tile", "dtype"),
    [
        (8, 2**16, 2, torch.float32),
        (9, 2**16, 1, torch.float32),
        (9, 2**17, 5, torch.float16),
        (1024, 2**16, 1, torch.float32),
        (2048, 4096, 1, torch.float32),
    ],
)
def test_memory_of_any_number_of_rows(size: int, negatives: int, tile: int, dtype: torch.dtype) -> None:
    """A tile on the tests' one thread, in MiB, and of few rows a sum for each of four parts of the negatives."""
    query, rows = torch.randn(size, 64, requires_grad=True), torch.randn(negatives, 64)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(dtype)
    step = partial(helpers.info_nce, "blockwise", query, query.detach(), rows)
    assert peak_of(lambda: step().backward()) < 1.2 * tile + 12 * query.numel() * 4 / 2**20


def test_nothing_of_size_n_by_k_is_saved(fused: str) -> None:
    """What waits for backward() is N x D, however many negatives there are."""
    case, saved = make_case(28, negatives=5000).to(torch.float32), []
    query = case.query.clone().requires_grad_()
    negatives = SimpleNamespace(rows=case.negatives, count=torch.tensor(5000))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        helpers.info_nce(fused, query, case.key, negatives, case.index)
    assert max(saved) < 5000
