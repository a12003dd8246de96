"""Stateless forms of the operations; the modules are thin over them."""

from densecl_ops.correspondence.boxes import (
    boxes_from_albumentations,
    boxes_from_kornia,
    boxes_from_matrix,
    boxes_from_torchvision,
)
from densecl_ops.correspondence.function import dense_correspondence
from densecl_ops.correspondence.location import location_correspondence
from densecl_ops.dense_cosine import dense_cosine, gather_matches
from densecl_ops.in_batch import in_batch_negatives
from densecl_ops.info_nce.function import dense_info_nce

__all__ = [
    "boxes_from_albumentations",
    "boxes_from_kornia",
    "boxes_from_matrix",
    "boxes_from_torchvision",
    "dense_correspondence",
    "dense_cosine",
    "dense_info_nce",
    "gather_matches",
    "in_batch_negatives",
    "location_correspondence",
]
