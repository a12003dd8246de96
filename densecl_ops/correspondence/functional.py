"""Stateless feature matching: checks, normal forms, choice of backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ops import _backends, _checks
from densecl_ops._numerics import accumulation_dtype, no_autocast
from densecl_ops._types import Correspondence
from densecl_ops.correspondence import blockwise, eager


def dense_correspondence(
    query_features: Tensor,
    key_features: Tensor,
    *,
    grid_size: int | tuple[int, int] | None = None,
    mutual: bool = False,
    min_score: float | None = None,
    backend: str = "auto",
) -> Correspondence:
    r"""Matches every position of one view with the most similar position of the other view of the same image.

    .. math:: \mathrm{index}_{b,i} = \arg\max_j \frac{\langle f^q_{b,i}, f^k_{b,j} \rangle}{|f^k_{b,j}|}

    (DenseCL, arXiv 2011.09157, section 3.3: on backbone features, not on projections.) Ties go to the lowest
    index; several queries may share a key. Products are accumulated in float32 (float64 for float64 features)
    whatever the feature dtype, autocast or not. No gradient flows.

    Args:
        query_features: (B, C, H, W) backbone map of the first view, any strides; (B, C, P) and (B, C) also work.
        key_features: The same of the second view. Its grid may differ.
        grid_size: Average-pools both maps to S x S (or (H, W)) before matching. Pass what the projection head
            was given, so that index and projection speak of the same positions.
        mutual: Marks as valid only pairs that are each other's nearest neighbour.
        min_score: Marks as valid only pairs of at least this cosine similarity, in [-1, 1].
        backend: "auto", "eager", "blockwise" or "triton".

    Returns:
        Correspondence of index (B, P_q) int64, score (B, P_q) float32 (cosine similarity) and valid (B, P_q) bool.
        A match that involves NaN is never called invalid by `min_score`, so that NaN reaches the loss.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or numbers do not fit, or the backend cannot serve; names the argument.

    Example:
        >>> import torch
        >>> from densecl_ops.functional import dense_correspondence
        >>> key = torch.randn(2, 16, 3, 3)
        >>> match = dense_correspondence(key.flip(3), key)  # the query view is the key view, mirrored
        >>> match.index[0].tolist()
        [2, 1, 0, 5, 4, 3, 8, 7, 6]
        >>> bool(match.valid.all()), match.score.shape
        (True, torch.Size([2, 9]))
    """
    grid = _checks.require_grid_size(grid_size)
    _checks.require_bool("mutual", mutual)
    if min_score is not None:
        min_score = _checks.require_cosine("min_score", min_score)
    query = _checks.flatten_map("query_features", pool_to_grid("query_features", query_features, grid))
    key = _checks.flatten_map("key_features", pool_to_grid("key_features", key_features, grid))
    _checks.require_paired_maps("query_features", query, "key_features", key)
    chosen = _backends.resolve(backend, query, accumulation_dtype(query, key))
    with torch.no_grad(), no_autocast(query):
        if chosen == "eager":
            index, score, agreed = eager.match(query, key, mutual)
        elif torch.compiler.is_compiling():
            index, score, agreed = _match_op(query, key, mutual, chosen)
        else:
            index, score, agreed = _match(query, key, mutual, chosen)
        valid = agreed if min_score is None else agreed & ~(score < min_score)
    return Correspondence(index, score, valid)


def pool_to_grid(name: str, features: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Adaptive average pooling to `grid`; a map that already has it, or no grid at all, passes unchanged."""
    _checks.flatten_map(name, features)  # what came is checked before pooling changes its shape
    if grid is None:
        return features
    if features.ndim != 4:
        raise ValueError(
            f"{name}: got shape {_checks.shape_of(features)}, expected a (B, C, H, W) map, "
            "the only form that grid_size can pool"
        )
    return features if features.shape[2:] == grid else F.adaptive_avg_pool2d(features, grid)


def _match(query: Tensor, key: Tensor, mutual: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "blockwise":
        return blockwise.match(query, key, mutual)
    from densecl_ops.correspondence import triton  # imported on first use: it needs the triton package

    return triton.match(query, key, mutual)


# One opaque node in a compiled graph: traced, the tile loops would unroll.
@torch.library.custom_op("densecl_ops::match", mutates_args=())
def _match_op(query: Tensor, key: Tensor, mutual: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _match(query, key, mutual, backend)


@_match_op.register_fake
def _(query: Tensor, key: Tensor, mutual: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    index = query.new_empty((query.shape[0], query.shape[2]), dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.float32), torch.empty_like(index, dtype=torch.bool)
