"""Dense contrastive learning as four PyTorch modules that drop into a MoCo or BYOL trainer."""

from densecl_ops import functional
from densecl_ops._types import Correspondence, Projection
from densecl_ops.correspondence.module import DenseCorrespondence
from densecl_ops.head import DenseProjectionHead
from densecl_ops.info_nce.module import DenseInfoNCELoss
from densecl_ops.queue import MomentumQueue

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
