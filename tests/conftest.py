"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from helpers import BACKENDS, FUSED
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # read when kernels are defined, so before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FUSED, scope="session")
def fused(request: pytest.FixtureRequest) -> str:
    """Backends that hold nothing of size N x K."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")], ids=str)
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Other defaults than torch's own; the meta device stands for any that is not the CPU."""
    dtype, device = request.param
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)
