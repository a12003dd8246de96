"""What an importer sees: names, typing marker, and nothing heavy."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys

import pytest

import densecl_ops
from densecl_ops import functional


def test_public_names() -> None:
    """All that can be seen is public and says what it is."""
    assert sorted([*densecl_ops.__all__, "interop", "metrics", "visualize"]) == dir(densecl_ops)
    with pytest.raises(AttributeError, match="no attribute 'metric'"):
        densecl_ops.metric  # noqa: B018
    assert {name for name in vars(functional) if not name.startswith("_")} - {"annotations"} == {*functional.__all__}
    assert (importlib.resources.files(densecl_ops) / "py.typed").is_file()
    assert densecl_ops.__version__.count(".") == 2
    for module in (densecl_ops, functional):
        for name in module.__all__:
            assert inspect.getdoc(getattr(module, name)), name


def test_requirements() -> None:
    """Triton comes with torch or by the extra: required, it would overwrite ROCm's."""
    requirements = importlib.metadata.requires("densecl-ops") or []
    required = {re.split(r"[^\w-]", name)[0] for name in requirements if "extra ==" not in name}
    assert required == {"einops", "torch"}
    (triton,) = [name.partition(";")[2].strip() for name in requirements if name.startswith("triton")]
    assert triton == "(platform_system == 'Linux') and extra == 'triton'"


def test_what_pypi_shows_has_no_relative_link() -> None:
    metadata = importlib.metadata.metadata("densecl-ops")
    targets = re.findall(r"\]\(([^)]+)\)|<[^>]+(?:src|href)=\"([^\"]+)", metadata["Description"])
    assert targets
    assert [target for pair in targets for target in pair if target and not target.startswith("https://")] == []
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL") or [])
    assert urls.keys() == {"Documentation", "Source", "Issues", "Changelog", "Paper"}


SCRIPT = """
import os, random, sys, warnings
import torch

def state():
    numbers = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    seeds = random.getstate(), torch.get_rng_state().tolist()
    return dict(os.environ), len(warnings.filters), torch.is_grad_enabled(), numbers, seeds

modules, before = set(sys.modules), state()
import densecl_ops
assert state() == before
print("\\n".join(set(sys.modules) - modules))
warnings.simplefilter("error")
head, queue = densecl_ops.DenseProjectionHead(3, 4, 5), densecl_ops.MomentumQueue(6, 5)
features = torch.randn(2, 3, 4, 4)
_, dense, pooled = head(features)
match = densecl_ops.DenseCorrespondence()(features, features)
densecl_ops.DenseInfoNCELoss()(dense, dense.detach(), queue, match).backward()
queue.enqueue(pooled.detach())
assert torch.cuda.is_available() or "triton" not in sys.modules
sys.modules["triton"] = None
try:
    densecl_ops.DenseInfoNCELoss(backend="triton")(dense, dense.detach(), queue)
except ValueError as error:
    assert str(error).startswith("backend: got 'triton'")
else:
    raise AssertionError
"""


def test_importing_adds_nothing_heavy_and_changes_no_global_state() -> None:
    """Beyond torch: this package, einops and the standard library. No compiler, process group, kernel, or warning."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    added = done.stdout.split()
    tops = {name.split(".")[0] for name in added}
    assert tops <= {"densecl_ops", "einops", "torch"} | sys.stdlib_module_names, tops
    heavy = ("torch._dynamo", "torch._inductor", "torch.testing", "triton", "torch.utils.tensorboard")
    assert not [name for name in added if name.startswith(heavy)]
