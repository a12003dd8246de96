"""The dense term without negatives: for hosts such as BYOL and SimSiam."""

from torch import Tensor

from densecl_ops import _checks, _maps, _pairs, _tracing
from densecl_ops._numerics import accumulation_dtype, no_autocast, normalize
from densecl_ops._types import REDUCTIONS, Correspondence, Reduction


def gather_matches(key: Tensor, correspondence: Correspondence | Tensor) -> Tensor:
    """The key vector that each query position matches.

    Args:
        key: (B, D, H_k, W_k), (B, D, P_k) or (B, D), any float dtype and strides.
        correspondence: A Correspondence, or an integer tensor (B, P_q) of key positions. Positions that it calls
            invalid are gathered like all others: leave them out by `correspondence.valid` where that matters.

    Returns:
        (B, D, P_q) in the dtype of key. Gradients flow to key; query positions that share a key add up.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit, or an index is out of range; names the argument.

    Example:
        >>> import torch
        >>> from densecl_ops.functional import dense_correspondence, gather_matches
        >>> match = dense_correspondence(*torch.randn(2, 4, 64, 7, 7))
        >>> gather_matches(torch.randn(4, 128, 7, 7), match).shape
        torch.Size([4, 128, 49])
    """
    _maps.require_map("key", key)
    k = _maps.flatten(key)
    index, _, name, _ = _pairs.parts(correspondence)
    if index is None:
        raise TypeError("correspondence: got None, expected a Correspondence or an integer tensor")
    positions = index.shape[1] if index.ndim == 2 and index.numel() > 0 else k.shape[2]
    _checks.require_index(name, _checks.require_tensor(name, index), (k.shape[0], positions), "key", k)
    if _tracing.host_may_look(index):
        _checks.require_range(name, index, k.shape[2])
    return _gather(*_tracing.outside_inference(k, index))


def _gather(key: Tensor, index: Tensor | None) -> Tensor:
    return key if index is None else key.gather(2, index.long()[:, None, :].expand(-1, key.shape[1], -1))


def dense_cosine(
    query: Tensor,
    key: Tensor,
    correspondence: Correspondence | Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative cosine similarity of every query position and its match, as BYOL's loss: 0 (same direction) to 4.

    With q^ and k^ the normalised projections::

        loss_i = |q^_i - k^_index(i)|^2 = 2 - 2 <q^_i, k^_index(i)>

    (BYOL, arXiv 2006.07733, equation 2, at every position; PixPro, arXiv 2011.10043, but for the constant.)
    Nothing keeps it from collapse but the host: a predictor on the query, and keys without gradient (a target network,
    or `key.detach()`). Given (B, D) vectors it is BYOL's own loss.

    Args:
        query: (B, D, H_q, W_q) predictions, normalised inside; (B, D, P_q) and (B, D) also work. Any strides.
        key: The same for the other view. Its grid may differ when a correspondence is given.
        correspondence: A Correspondence, or an integer tensor (B, P_q) of key positions. None: position i matches
            position i, and the two grids must agree.
        weight: (B, P_q) scales the rows. A row of weight 0 or with an invalid match is left out, even if it holds NaN.
        reduction: "mean" (over the total weight), "sum" or "none".

    Returns:
        The loss in float32 (float64 if query or key are), under autocast too: 0-d, or (B, P_q) for "none". A zero
        vector gives 2 and no gradient. Gradients flow to query, to key where it requires grad, and to weight.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or values do not fit; names the argument.

    Example:
        >>> import torch
        >>> from densecl_ops.functional import dense_correspondence, dense_cosine
        >>> match = dense_correspondence(*torch.randn(2, 4, 64, 7, 7))  # of backbone features
        >>> prediction, target = torch.randn(4, 128, 7, 7, requires_grad=True), torch.randn(4, 128, 7, 7)
        >>> dense_cosine(prediction, target, match).backward()
        >>> dense_cosine(target, target).item() < 1e-6
        True

        The best 10 pairs of every image, as VICRegL takes them:

        >>> best = torch.zeros(4, 49).scatter_(1, match.score.topk(10, dim=1).indices, 1.0)
        >>> loss = dense_cosine(prediction, target, match, weight=best)
    """
    _checks.require_choice("reduction", reduction, REDUCTIONS)
    index, valid, name, _ = match = _pairs.parts(correspondence)
    _pairs.require_pairs(query, key, weight, match)
    query, key, index, valid, weight = _tracing.outside_inference(query, key, index, valid, weight)
    q, k = _maps.flatten(query), _maps.flatten(key)
    if index is not None and _tracing.host_may_look(index):
        _checks.require_range(name, index, k.shape[2])
    dtype = accumulation_dtype(q, k)
    with no_autocast(q):
        unit_query, unit_key = normalize(q.to(dtype), dim=1), normalize(k.to(dtype), dim=1)
        cosine = (unit_query * _gather(unit_key, index)).sum(1)
        return _pairs.reduce(2 - 2 * cosine, weight, valid, reduction)
