"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import BACKENDS, FUSED
from hypothesis import HealthCheck, settings

collect_ignore = [] if "PTX_TARGET" in os.environ else ["ptx"]  # `make execute` sets it
if not (Path(__file__).parents[1] / "benchmarks" / "results").exists():  # the sdist leaves the records out
    collect_ignore += ["test_benchmarks.py", "test_pages.py"]
if find_spec("triton") is None:  # the benchmarks import it
    collect_ignore += ["test_benchmarks.py", "test_gpu.py", "test_transfer.py"]

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("quick", settings.get_profile("repeatable"), max_examples=5)
settings.load_profile("repeatable")

# What `make quick` leaves out: compilers, processes, long runs, and one branch again in further sizes or dtypes.
SLOW = re.compile(
    r"""test_(benchmarks|distributed|typing|kernels)\.py::(?!test_group_of_one)
    |test_compile\.py::(?!test_whole_step.blockwise-aot|test_opcheck.*float32)
    |test_concurrency\.py::test_first_calls_race|test_p(ages|retrain)\.py::test_(page_on_)?two
    |test_errors\.py::test_junk|test_loss\.py::test_any_values|test_recipes\.py::test_command_runs
    |test_parallel\.py::test_parallel_regions|test_step\.py::test_memory
    |test_loss_memory\.py::test_memory_of|test_loss_numerics\.py::test_low_precision
    |test_transfer\.py::test_(suite|arms|probe)|test_triton\.py::(?!test_ties_count.*float32|test_loss\[exclude)""",
    re.VERBOSE,
)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Import errors are ignored for kernels without Triton; of a test file pytest would only say that it is skipped."""
    if report.skipped and report.nodeid.startswith("tests/") and "unable to import module" in str(report.longrepr):
        raise pytest.UsageError(f"{report.nodeid} cannot be imported")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FUSED, scope="session")
def fused(request: pytest.FixtureRequest) -> str:
    """Backends that hold nothing of size N x K."""
    return request.param


@pytest.fixture
def gpu() -> Iterator[None]:
    """Where there is none, tests/ptx/executor.py runs on the CPU what Triton compiles for one."""
    if torch.cuda.is_available():
        yield
        return
    if shutil.which("g++") is None:
        pytest.skip("needs a GPU, or g++ for tests/ptx")
    from ptx import executor

    with executor.installed():
        yield


@pytest.fixture(autouse=True)
def _alike_and_apart() -> Iterator[None]:
    """The same numbers in every run; and what goes wrong on a device goes wrong here, with its memory given back."""
    torch.manual_seed(0)
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


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
