"""The Triton kernels against the oracle: on a GPU where there is one, else what Triton compiles, by tests/ptx.

Options, layouts and gradients at small sizes, what other files ask of every backend (imported), and what happens where
the kernels cannot serve. tests/ptx takes several programs and tiles in every direction; tests/test_kernels.py shows how
well the kernels compile.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import helpers
import pytest
import torch
from helpers import Case, assert_same, check, loss_cases, make_case, match, run
from test_compile import test_opcheck_loss, test_opcheck_match  # noqa: F401
from test_loss import test_collapse_ranks_half, test_rank_and_nan, test_ties_count_half  # noqa: F401
from test_loss_numerics import (  # noqa: F401
    test_nan_and_inf_reach_exactly_their_rows,
    test_nan_in_a_left_out_row,
    test_tiny_loss_keeps_its_relative_precision,
)
from test_matching import test_nan_stays_in_its_image_and_stays_valid, test_ties_go_to_the_lowest_index  # noqa: F401
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")

from densecl_ops import _backends, _checks, _triton, selftest  # noqa: E402
from densecl_ops.correspondence import triton_launch as fused_matching  # noqa: E402
from densecl_ops.functional import dense_correspondence, dense_info_nce  # noqa: E402
from densecl_ops.info_nce import triton_launch as fused  # noqa: E402
from densecl_ops.info_nce import triton_plan  # noqa: E402
from densecl_ops.info_nce.eager import Problem  # noqa: E402

FLOAT32 = 2e-6  # relative error norm; at most 4e-7 over 12 seeds
DEVICE = torch.device(helpers.DEVICES["triton"])

pytestmark = pytest.mark.usefixtures("gpu")


def case_of(**options: Any) -> Case:
    options = {"batch": 2, "channels": 24, "query_grid": (5, 7), "key_grid": (4, 4), "negatives": 150} | options
    return make_case(dtype=torch.float32, **options)


CASES = loss_cases(torch.float32)


@pytest.fixture(name="fused")
def _fused(backend: str) -> str:
    return backend


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the imported tests: they cut the queue into three parts, the cases above leave that to the plan."""
    if "float64" in request.node.name:
        pytest.skip("the kernels have no float64")
    monkeypatch.setattr(fused, "forward", functools.partial(fused.forward, splits=3))
    return "triton"


@pytest.mark.parametrize("name", CASES)
def test_loss(name: str) -> None:
    check("triton", CASES[name], FLOAT32)


def test_an_index_out_of_range_gives_the_row_nan() -> None:
    """Only where the host cannot look, hence straight to the backend: nothing is read there, no other row changes."""
    case = case_of()
    query, key = (x.flatten(2).to(DEVICE) for x in (case.query, case.key))
    index, float32 = case.index.to(DEVICE), torch.float32
    problem = Problem(query, key, case.negatives.to(DEVICE), 5.0, None, index, None, None, True, float32, float32)
    whole = fused.forward(problem, True, False)
    for wrong in (-1, 16, 2**40):
        broken = index.clone()
        broken[1, 3] = wrong
        result = fused.forward(problem._replace(matches=broken), True, False)
        for name in ("loss", "log_sum_exp", "pull", "grad_query", "grad_scale"):
            seen, wish = getattr(result, name), getattr(whole, name).clone()
            if name != "log_sum_exp":  # of the negatives alone
                wish[1, 3] = float("nan")
            torch.testing.assert_close(seen, wish, rtol=0, atol=0, equal_nan=True, msg=name)
        grad = fused.grad_key(problem._replace(matches=broken), result.pull)
        assert grad[1].isnan().any()
        assert torch.equal(grad[0], fused.grad_key(problem, whole.pull)[0])


def test_plan_uses_the_device() -> None:
    """13 blocks of rows leave 119 of 132 multiprocessors idle; ten parts of the queue leave 2.

    98 blocks leave 34 idle; four parts of the queue are 392 programs, three rounds of 132 but for 4.
    """
    plan = functools.partial(triton_plan.plan_split, block=128, step=128, slots=132)
    per_split = plan(items=1568, length=65536)
    assert per_split % 128 == 0
    assert 13 * -(-65536 // per_split) in range(125, 133)
    assert plan(items=12544, length=65536) == 65536 // 4
    assert plan(items=50176, length=65536) == 65536
    assert plan(items=64, length=100) == 128


def test_products_follow_the_float32_setting_of_torch() -> None:
    """Both interfaces of torch; in a process of its own, since torch refuses to mix them."""
    program = """
import torch
from densecl_ops import _triton
from densecl_ops.info_nce import triton_plan
from densecl_ops.info_nce.eager import Problem
_triton.describe = lambda device: _triton.Device("sm_90", 132)
query, matmul = torch.zeros(1, 16, 4), torch.backends.cuda.matmul
problem = Problem(query, query, query[0].T, 5.0, None, None, None, None, False, torch.float32, torch.float32)
def show(dtype=torch.float32):
    print(triton_plan.precision(problem._replace(matmul_dtype=dtype)))
show()
for setting in ("high", "medium", "highest"):
    torch.set_float32_matmul_precision(setting)
    show()
matmul.allow_tf32 = True
show()
for matmul.fp32_precision in ("ieee", "tf32"):
    show()
show(torch.bfloat16)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert printed == ["tf32x3", "tf32", "tf32", "tf32x3", "tf32", "tf32x3", "tf32", "ieee"]


@pytest.mark.parametrize("grids", [((7, 7), (7, 7)), ((3, 3), (14, 14))], ids=str)
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_feature_matches_inside_the_grid(
    dtype: torch.dtype, grids: tuple[tuple[int, int], ...], mutual: bool
) -> None:
    """Every key is negative in its channel: -inf is below the nothing beyond the grid, if that is inf * 0 = NaN."""
    query, key = (torch.randn(2, 16, *grid).to(dtype) for grid in grids)
    key[:, 5] = -key[:, 5].abs()
    finite = match("triton", query, key)
    query[1, 5, 1, 2] = float("inf")
    where = grids[0][1] + 2
    seen = match("triton", query, key, mutual=mutual)
    assert seen.index.max() < key[0, 0].numel()
    assert seen.score[1, where].isnan()
    finite.index[1, where] = seen.index[1, where]
    assert torch.equal(seen.index, finite.index)


@pytest.mark.parametrize("backend", ["eager", "blockwise", "triton"])
def test_squares_that_overflow_give_nan(backend: str) -> None:
    """A vector of 1e20 has a direction, but float32 cannot square it: NaN shows that, a zero vector would hide it."""
    case = case_of(reduction="none")
    case.query[0, :, 0, 0] = 1e20
    assert torch.equal(run(backend, case, wanted=()).loss.isnan().nonzero(), torch.tensor([[0, 0]]))
    for side in (3, 10):  # one tile and many
        key = torch.randn(1, 16, side, side)
        key[0, :, 0, 0] = 1e20
        assert match(backend, torch.randn(1, 16, side, side), key).score.isnan().all()


def test_the_selftest() -> None:
    """Low precision, autocast, every kind of gradient, and matching, at small sizes."""
    assert selftest.main(["--small"]) == 0


def test_grids_end_at_65535_programs_but_for_the_first_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, images = mock.MagicMock(), 65536
    monkeypatch.setattr(fused, "kernels", kernels)
    monkeypatch.setattr(fused_matching, "kernels", kernels)
    for positions in (1, 65):  # one tile, and several
        maps = torch.zeros(1, 1, 1).expand(images, 1, positions)
        index, float32 = torch.zeros(1, 1, dtype=torch.int64).expand(images, positions), torch.float32
        problem = Problem(maps, maps, maps[0], 5.0, None, index, None, None, True, float32, float32)
        fused_matching.match(maps, maps, False)
        fused.grad_key(problem, maps[:, 0])
    launched = (kernels.match_kernel, kernels.inverse_norm_kernel, kernels.grad_key_kernel)
    grids = [call.args[0] for kernel in launched for call in kernel.__getitem__.call_args_list]
    assert len(grids) == 6
    assert all(grid[0] >= images > max(grid[1:], default=0) for grid in grids)


def test_what_it_cannot_serve_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend: got 'triton'.*up to 512 channels, not 513"):
        run("triton", case_of(channels=513, negatives=2, query_grid=(1, 1)))
    with pytest.raises(ValueError, match=r"backend: got 'triton'.*float64"):
        run("triton", make_case())
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    with pytest.raises(ValueError, match=r"it needs triton 3\.6, and 3\.2 is installed"):
        run("triton", case_of())


@pytest.mark.parametrize(
    ("architecture", "chosen"), [("sm_75", "blockwise"), ("gfx1100", "blockwise"), ("sm_90", "auto")]
)
def test_an_architecture_that_was_never_compiled_for(
    monkeypatch: pytest.MonkeyPatch, architecture: str, chosen: str
) -> None:
    monkeypatch.setattr(_triton, "describe", lambda device: _triton.Device(architecture, 40))
    tensor: Any = SimpleNamespace(device=torch.device("cuda"))
    _checks.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [_backends.choose("auto", tensor, torch.float32, 128) for _ in range(2)] == [chosen] * 2
    assert [architecture in str(warning.message) for warning in seen] == [True] * (chosen == "blockwise")
    if chosen == "blockwise":
        with pytest.raises(ValueError, match=rf"backend: got 'triton'.*never compiled for {architecture}"):
            _backends.choose("triton", tensor, torch.float32, 128)
        with pytest.raises(ValueError, match=rf"never compiled for {architecture}"):  # from compiled code
            fused_matching.choose(architecture, torch.float32, 49)


def everything(backend: str, compiled: bool = False) -> list[Tensor]:
    """The loss, its gradients and the matches of one case."""
    case = case_of()
    leaves = [x.to(DEVICE).requires_grad_() for x in (case.query, case.key, case.negatives)]

    def loss(*leaves: Tensor) -> Tensor:
        return dense_info_nce(*leaves, case.index.to(DEVICE), backend=backend)

    value = (torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss)(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return [value.detach(), *gradients, dense_correspondence(*leaves[:2], backend=backend).index]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_that_fail_are_a_warning_under_auto(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """One warning and one try for each kind of call; then blockwise serves, forward and backward."""
    assert_same(everything("triton", compiled), everything("triton"))
    monkeypatch.setattr(_backends, "_failed", set())
    monkeypatch.setattr(_backends, "choose", lambda requested, *_: requested)
    _checks.warn_once.cache_clear()
    tried: list[str] = []

    def fails(name: str, *_: Any) -> None:
        tried.append(name)
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    for module, name in ((fused, "forward"), (fused, "grad_key"), (fused, "grad_negatives"), (fused_matching, "match")):
        monkeypatch.setattr(module, name, functools.partial(fails, name))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = [everything("auto", compiled) for _ in range(2)]
    assert sorted(tried) == ["forward", "grad_key", "grad_negatives", "match"]
    messages = [str(warning.message) for warning in seen if "slower 'blockwise'" in str(warning.message)]
    assert len(messages) == 4
    assert all("OutOfResources: out of resource: shared memory" in message for message in messages)
    assert_same(results, [everything("blockwise")] * 2)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        everything("triton")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 80 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [HIP]:  Code: 2, Message: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
    ids=str,
)
def test_what_is_no_fault_of_the_kernels_does_not_retire_them(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A passing lack of memory, or an error of the user's own kernels that the driver tells at our launch."""
    monkeypatch.setattr(_backends, "_failed", set())
    monkeypatch.setattr(fused_matching, "match", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        _backends.call("auto", "correspondence", "match", torch.empty(1, 1, 1), torch.float32)
    assert not _backends._failed
