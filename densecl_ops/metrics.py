"""What to log beside the loss: 0-d float32 tensors on the device of their input, which the host never waits for.

Call `.item()` only when you print: it waits for the device.
"""

from torch import Tensor

from densecl_ops import _checks
from densecl_ops._types import BackendName, Correspondence
from densecl_ops.correspondence.function import dense_correspondence

__all__ = ["contrastive_accuracy", "match_score", "mutual_share"]


def contrastive_accuracy(rank: Tensor, top_k: int = 1, valid: Tensor | None = None) -> Tensor:
    """Share of positives that fewer than `top_k` negatives outscore; the accuracy that MoCo trainers print.

    The mean of rank_i < top_k over the valid rows i. A collapsed network ranks K / 2, and so scores 0.

    Args:
        rank: (B, P) integers, as the loss returns them for return_rank=True, image-level (B, 1); (B,) also works.
        top_k: 1 (default) asks the positive to beat every negative, 5 all but four.
        valid: bool of rank's shape, the rows that count, such as `Correspondence.valid`. Default: all.

    Returns:
        0-d float32 in [0, 1]; 0 with no valid row, as the loss is.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shape, device or number do not fit.

    Example:
        >>> import torch
        >>> from densecl_ops.metrics import contrastive_accuracy
        >>> rank = torch.tensor([[0, 3, 9, 0]])
        >>> contrastive_accuracy(rank), contrastive_accuracy(rank, top_k=5)
        (tensor(0.5000), tensor(0.7500))
    """
    rank = _checks.require_integer("rank", rank)
    if rank.ndim not in (1, 2) or rank.numel() == 0:
        raise ValueError(f"rank: got shape {_checks.shape_of(rank)}, expected (B, P) or (B,), every size above 0")
    hit = rank < _checks.require_positive_int("top_k", top_k)
    if valid is None:
        return hit.float().mean()
    return _mean(hit, _checks.require_mask("valid", valid, tuple(rank.shape), "rank", rank))


def match_score(correspondence: Correspondence) -> Tensor:
    """Mean score of the valid matches: how alike the matched *backbone* features are, not whether matches are right.

    Args:
        correspondence: Of any rule. Matches by place score minus a distance in cell diagonals instead of a cosine.

    Returns:
        0-d float32; for feature matching in [-1, 1], and 1 once the backbone has collapsed; 0 with no valid match, NaN
        if the score of a valid one is.

    Raises:
        TypeError: Not a Correspondence, or its score or valid has the wrong dtype.
        ValueError: The shapes or devices of score and valid differ, or they are empty.

    Example:
        >>> import torch
        >>> from densecl_ops import DenseCorrespondence
        >>> from densecl_ops.metrics import match_score
        >>> features = torch.randn(2, 16, 7, 7)
        >>> round(match_score(DenseCorrespondence()(features, features)).item(), 3)
        1.0
    """
    return _mean(*score_and_valid(correspondence))


def score_and_valid(correspondence: Correspondence) -> tuple[Tensor, Tensor]:
    """(B, P) each, of what is one."""
    if not isinstance(correspondence, Correspondence):
        raise TypeError(f"correspondence: got {type(correspondence).__name__}, expected a Correspondence")
    name, score = "correspondence.score", _checks.require_float("correspondence.score", correspondence.score)
    if score.ndim != 2 or score.numel() == 0:
        raise ValueError(f"{name}: got shape {_checks.shape_of(score)}, expected (B, P), every size above 0")
    return score, _checks.require_mask("correspondence.valid", correspondence.valid, tuple(score.shape), name, score)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """0 where none is valid."""
    return values.float().masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


def mutual_share(
    query_features: Tensor,
    key_features: Tensor,
    grid_size: int | tuple[int, int] | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Share of query positions whose match names them back: `dense_correspondence(mutual=True).valid.float().mean()`.

    Near 1 every position has a partner of its own; it is low where many share one key, and at most P_k / P_q. It costs
    one more matching, so log it every few steps, or take that mean of the matches that the loss uses.

    Args:
        query_features, key_features, grid_size, backend: As in `dense_correspondence`.

    Returns:
        0-d float32 in [0, 1].

    Raises:
        TypeError, ValueError: As in `dense_correspondence`.

    Example:
        >>> import torch
        >>> from densecl_ops.metrics import mutual_share
        >>> features = torch.randn(2, 16, 7, 7)
        >>> mutual_share(features, features.flip(3))
        tensor(1.)
    """
    matches = dense_correspondence(query_features, key_features, grid_size=grid_size, mutual=True, backend=backend)
    return matches.valid.float().mean()
