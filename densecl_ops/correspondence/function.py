"""Stateless feature matching: checks, normal forms, choice of backend."""

import torch
from torch import Tensor

from densecl_ops import _backends, _checks, _maps
from densecl_ops._numerics import accumulation_dtype, no_autocast
from densecl_ops._tracing import is_traced, operator
from densecl_ops._types import BackendName, Correspondence, Grids, with_grids
from densecl_ops.correspondence import eager


def dense_correspondence(
    query_features: Tensor,
    key_features: Tensor,
    *,
    grid_size: int | tuple[int, int] | None = None,
    mutual: bool = False,
    min_score: float | None = None,
    backend: BackendName = "auto",
) -> Correspondence:
    """Matches every position of one view with the most similar position of the other view of the same image.

    With the features f of image b::

        index[b, i] = argmax_j <f_q[b, i], f_k[b, j]> / |f_k[b, j]|

    (DenseCL, arXiv 2011.09157, section 3.3: on backbone features, not on projections.) Ties go to the lowest index, of
    scores as they are computed: those of equal keys may differ in the last bit. Several queries may share a key.
    Products are accumulated in float32 (float64 for float64 features) whatever the feature dtype, autocast or not. No
    gradient flows.

    Args:
        query_features: (B, C, H, W) backbone map of the first view, any strides; (B, C, P) and (B, C) also work. A
            ViT's (B, P, C) tokens need .transpose(1, 2), else channels are matched: index.shape[1] should be P.
        key_features: The same of the second view. Its grid may differ.
        grid_size: Average-pools both maps to S x S (or (H, W)) before matching. Pass what the projection head
            was given, so that index and projection speak of the same positions. A grid finer than the map repeats its
            positions, as adaptive pooling does.
        mutual: Marks as valid only pairs that are each other's nearest neighbour.
        min_score: Marks as valid only pairs of at least this cosine similarity, in [-1, 1].
        backend: "auto" takes the Triton kernels on CUDA and ROCm devices, and "blockwise" elsewhere or, with one
            warning, where they cannot serve. "blockwise" is plain PyTorch in tiles, "eager" the textbook formula, to
            check with. "triton" is the kernels or an error.

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
    """
    grid = _checks.require_grid_size("grid_size", grid_size)
    mutual = _checks.require_bool("mutual", mutual)
    if min_score is not None:
        min_score = _checks.require_cosine("min_score", min_score)
    traced = is_traced(query_features)
    dtype, grids = (_check if traced else _check_once)(query_features, key_features)
    query, key = _prepare("query_features", query_features, grid), _prepare("key_features", key_features, grid)
    chosen = _backends.choose(backend, query, dtype, 0, traced)
    if chosen == "eager":  # left open to compilers, which fuse it
        with no_autocast(query):
            index, score, agreed = eager.match(query, key, mutual)
    else:
        index, score, agreed = (_match if traced else _solve)(query, key, mutual, chosen)
    valid = agreed if min_score is None else agreed & ~(score < min_score)
    match = Correspondence(index, score, valid)
    return match if grids is None else with_grids(match, (grid, grid) if grid else grids)


def _check(query: Tensor, key: Tensor) -> tuple[torch.dtype, Grids | None]:
    """Checks shapes, dtypes and devices; returns the accumulation dtype and the grids of two maps."""
    _maps.require_map("query_features", query)
    _maps.require_map("key_features", key)
    _maps.require_paired_maps("query_features", query, "key_features", key)
    return accumulation_dtype(query, key), (query.shape[2:], key.shape[2:]) if query.ndim == key.ndim == 4 else None


_check_once = _checks.once(_check)


def _prepare(name: str, features: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """As backends take them: pooled, (B, C, P), and without a gradient (torch.no_grad() takes twice as long)."""
    features = features.detach() if features.requires_grad else features
    return _maps.flatten(features if grid is None else _maps.pool_to_grid(name, features, grid))


def _solve(query: Tensor, key: Tensor, mutual: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    match: tuple[Tensor, Tensor, Tensor]
    match = _backends.call(backend, "correspondence", "match", query, key.dtype, query, key, mutual)
    return match


def _fake_match(query: Tensor, key: Tensor, mutual: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    index = query.new_empty((query.shape[0], query.shape[2]), dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.float32), torch.empty_like(index, dtype=torch.bool)


_match = operator(
    "match",
    "(Tensor query, Tensor key, bool mutual, str backend) -> (Tensor, Tensor, Tensor)",
    _solve,
    _fake_match,
    flops=lambda query, key, *_: 2 * query.numel() * key.shape[2],
)
