"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os

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
