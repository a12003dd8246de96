"""Dense contrastive learning as four PyTorch modules that drop into a MoCo or BYOL trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from densecl_ops import functional
from densecl_ops._types import Correspondence, Projection
from densecl_ops.correspondence.module import DenseCorrespondence
from densecl_ops.head import DenseProjectionHead
from densecl_ops.info_nce.module import DenseInfoNCELoss
from densecl_ops.queue import MomentumQueue

if TYPE_CHECKING:
    from densecl_ops import interop as interop
    from densecl_ops import metrics as metrics
    from densecl_ops import visualize as visualize

__version__ = "0.1.0"

__all__ = [
    "Correspondence",
    "DenseCorrespondence",
    "DenseInfoNCELoss",
    "DenseProjectionHead",
    "MomentumQueue",
    "Projection",
    "functional",
]
_LAZY = ("interop", "metrics", "visualize")  # imported at their first use

if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return importlib.import_module(f"densecl_ops.{name}")
        raise AttributeError(f"module 'densecl_ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
