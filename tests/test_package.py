"""What an importer sees: names, signatures, typing marker, and nothing heavy."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys

import pytest
import torch

import densecl_ops
from densecl_ops import functional

EMPTY = inspect.Parameter.empty

SIGNATURES = {
    "DenseProjectionHead": {
        "in_channels": 2048,
        "hidden_channels": None,
        "out_channels": 128,
        "grid_size": None,
        "norm_layer": None,
    },
    "DenseProjectionHead.forward": {"features": EMPTY},
    "DenseCorrespondence": {"grid_size": None, "mutual": False, "min_score": None, "*backend": "auto"},
    "DenseCorrespondence.forward": {"query_features": EMPTY, "key_features": EMPTY},
    "DenseInfoNCELoss": {
        "temperature": 0.2,
        "reduction": "mean",
        "learnable_temperature": False,
        "*backend": "auto",
    },
    "DenseInfoNCELoss.forward": {
        "query": EMPTY,
        "key": EMPTY,
        "negatives": EMPTY,
        "correspondence": None,
        "*weight": None,
        "*exclude": None,
        "*return_rank": False,
    },
    "MomentumQueue": {
        "size": 65536,
        "dim": 128,
        "*init": "random",
        "*dtype": None,
        "*gather_distributed": True,
        "*process_group": None,
    },
    "MomentumQueue.enqueue": {"keys": EMPTY},
    "functional.boxes_from_albumentations": {"replay": EMPTY, "image_size": EMPTY},
    "functional.boxes_from_kornia": {"augmentation": EMPTY},
    "functional.boxes_from_matrix": {"matrix": EMPTY, "size": EMPTY, "image_size": None},
    "functional.boxes_from_torchvision": {"params": EMPTY, "image_size": None},
    "functional.dense_correspondence": {
        "query_features": EMPTY,
        "key_features": EMPTY,
        "*grid_size": None,
        "*mutual": False,
        "*min_score": None,
        "*backend": "auto",
    },
    "functional.dense_info_nce": {
        "query": EMPTY,
        "key": EMPTY,
        "negatives": EMPTY,
        "correspondence": None,
        "*temperature": 0.2,
        "*reduction": "mean",
        "*weight": None,
        "*exclude": None,
        "*return_rank": False,
        "*backend": "auto",
    },
    "functional.in_batch_negatives": {"keys": EMPTY, "*process_group": None, "*gather_distributed": True},
    "functional.location_correspondence": {
        "query_boxes": EMPTY,
        "key_boxes": EMPTY,
        "query_grid": EMPTY,
        "key_grid": None,
        "*query_flip": None,
        "*key_flip": None,
        "*max_distance": 0.7,
    },
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures(name: str) -> None:
    """Names, order, defaults; a star marks what is given by keyword only."""
    thing = densecl_ops
    for part in name.split("."):
        thing = getattr(thing, part)
    parameters = inspect.signature(thing).parameters.values()
    seen = [("*" * (p.kind is p.KEYWORD_ONLY) + p.name, p.default) for p in parameters if p.name != "self"]
    assert seen == list(SIGNATURES[name].items())


def test_public_names() -> None:
    names = [
        "Correspondence",
        "DenseCorrespondence",
        "DenseInfoNCELoss",
        "DenseProjectionHead",
        "MomentumQueue",
        "Projection",
        "functional",
        "interop",
        "metrics",
        "visualize",
    ]
    assert sorted(densecl_ops.__all__) == names
    assert dir(densecl_ops) == names
    with pytest.raises(AttributeError, match="no attribute 'metric'"):
        densecl_ops.metric  # noqa: B018
    assert sorted(functional.__all__) == [
        "boxes_from_albumentations",
        "boxes_from_kornia",
        "boxes_from_matrix",
        "boxes_from_torchvision",
        "dense_correspondence",
        "dense_info_nce",
        "in_batch_negatives",
        "location_correspondence",
    ]
    assert {name for name in vars(functional) if not name.startswith("_")} - {"annotations"} == set(functional.__all__)
    for name in (*names, *functional.__all__):
        thing = getattr(densecl_ops, name, None) or getattr(functional, name)
        assert inspect.getdoc(thing), name


def test_tuples_have_the_contracts_fields() -> None:
    assert densecl_ops.Projection._fields == ("image", "dense", "pooled")
    assert densecl_ops.Correspondence._fields == ("index", "score", "valid")


def test_typing_marker_and_version() -> None:
    assert (importlib.resources.files(densecl_ops) / "py.typed").is_file()
    assert densecl_ops.__version__.count(".") == 2


def test_requirements() -> None:
    """Triton comes with torch or by the extra: required, it would overwrite ROCm's."""
    requirements = importlib.metadata.requires("densecl-ops") or []
    assert sorted(re.split(r"[^\w-]", name)[0] for name in requirements if "extra ==" not in name) == [
        "einops",
        "torch",
    ]
    assert [name.partition(";")[2].strip() for name in requirements if name.startswith("triton")] == [
        "(platform_system == 'Linux') and extra == 'triton'"
    ]


def test_what_pypi_shows_has_no_relative_link() -> None:
    metadata = importlib.metadata.metadata("densecl-ops")
    targets = re.findall(r"\]\(([^)]+)\)|<[^>]+(?:src|href)=\"([^\"]+)", metadata["Description"])
    assert targets
    assert [target for pair in targets for target in pair if target and not target.startswith("https://")] == []
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL") or [])
    assert urls.keys() == {"Documentation", "Source", "Issues", "Changelog", "Paper"}


HIDDEN = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "matplotlib", "kornia", "skimage", "torchvision", "scipy"}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch
from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue
head, queue = DenseProjectionHead(3, 4, 5), MomentumQueue(6, 5)
features = torch.randn(2, 3, 4, 4)
_, dense, pooled = head(features)
loss = DenseInfoNCELoss()(dense, dense.detach(), queue, DenseCorrespondence()(features, features))
loss.backward()
queue.enqueue(pooled)
print(float(loss) > 0)
try:
    DenseInfoNCELoss(backend="triton")(dense, dense, queue)
except ValueError as error:
    print(str(error).startswith("backend: got 'triton'"))
"""


def test_works_without_optional_packages() -> None:
    assert python(HIDDEN).split() == ["True", "True"]


def test_importing_adds_nothing_heavy() -> None:
    """Beyond torch: this package, einops and the standard library; and no compiler, process group or kernel."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport densecl_ops\n"
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    added = python(code).split()
    tops = {name.split(".")[0] for name in added}
    assert tops <= {"densecl_ops", "einops", "torch"} | sys.stdlib_module_names, tops
    heavy = ("torch._dynamo", "torch._inductor", "torch.testing", "triton", "torch.utils.tensorboard")
    assert not [name for name in added if name.startswith(heavy)]


def test_importing_changes_no_global_state() -> None:
    code = (
        "import os, random, warnings, torch\n"
        "def state():\n"
        "    return (dict(os.environ), random.getstate(), len(warnings.filters), torch.get_num_threads(),\n"
        "            torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),\n"
        "            torch.is_grad_enabled(), torch.backends.cuda.matmul.allow_tf32)\n"
        "before = state()\nimport densecl_ops\nprint(before == state())"
    )
    assert python(code).strip() == "True"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the warning is for GPUs")
def test_no_warning_and_no_triton_on_a_cpu() -> None:
    code = (
        "import warnings; warnings.simplefilter('error')\nimport torch\n"
        "from densecl_ops.functional import dense_correspondence, dense_info_nce\n"
        "import sys; sys.modules['triton'] = None  # importing it raises\n"
        "x = torch.randn(2, 3, 4, requires_grad=True)\n"
        "dense_info_nce(x, x, torch.eye(3), dense_correspondence(x, x)).backward()\nprint('quiet')"
    )
    assert python(code).strip() == "quiet"
