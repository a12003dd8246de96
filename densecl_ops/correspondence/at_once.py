"""Feature matching of a short call on a CPU: all scores at once, in as few operations as there can be.

A small call is bound by their number. A larger one (32 x 2048 x 7 x 7, NCHW) takes 5 ms so where blocks of images take
9: threads of our own share the cores with torch's, which spin for some 6 ms after their last operator. At most four
operators run on all threads, and the others on the calling one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ops._numerics import NORM_EPS, accumulation_dtype, cast, divisor, inverse_norm, norm
from densecl_ops._parallel import SERIAL

SMALL = 2**14  # features and scores
MOST_FEATURES = 2**23  # 32 MiB in float32: malloc gives larger pieces back, and fresh pages cost as much as the rest
MOST_SCORES = 2**17  # 32 images of 8 x 8 positions


def serves(query: Tensor, key: Tensor, mutual: bool) -> bool:
    """Whether a call is short and plain enough."""
    if mutual or not query.is_cpu:
        return False
    images, channels, queries = query.shape
    scores, features = queries * key.shape[2], images * channels * (queries + key.shape[2])
    return features <= MOST_FEATURES and scores <= SERIAL and images * scores <= MOST_SCORES


def match(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As in eager.py, not mutual."""
    images, channels, queries = query.shape
    keys = key.shape[2]
    if images * (channels * (queries + keys) + queries * keys) <= SMALL:
        both = torch.cat([query, key], 2)
        both = cast(both, accumulation_dtype(both))
        query, key = both.div_(norm(both, 1)).split_with_sizes([queries, keys], 2)
        score, index = torch.bmm(query.mT, key).max(2)
        return index, cast(score, torch.float32), torch.ones_like(index, dtype=torch.bool)
    dtype = accumulation_dtype(query, key)
    plain = query.dtype == key.dtype == dtype
    if plain and query.stride(1) == key.stride(1) == 1:
        query_scale, key_scale = inverse_norm(query, 1), inverse_norm(key, 1)
    elif plain and query.shape == key.shape:  # along other strides a norm takes 4 times as long as the squares
        squares = query.new_empty(2, *query.shape)
        for x, out in zip((query, key), squares, strict=True):
            torch.mul(x, x, out=out)
        query_scale, key_scale = divisor(squares.sum(2, keepdim=True), NORM_EPS**2).rsqrt_()
    else:
        rows = query.new_empty(images, queries + keys, channels, dtype=dtype)
        copies = zip((query, key), rows.split_with_sizes([queries, keys], 1), strict=True)
        query, key = (out.copy_(x.mT).mT for x, out in copies)
        query_scale, key_scale = inverse_norm(rows, 2).mT.split_with_sizes([queries, keys], 2)
    products = torch.bmm(query.mT, key)
    index = products.new_empty(images, queries, dtype=torch.int64)
    step = max(1, SERIAL // (queries * keys))
    for start in range(0, images, step):  # max would run on all threads, whatever the size
        part = slice(start, start + step)
        torch.argmax(products[part].mul_(key_scale[part]), 2, out=index[part])
    score = products.gather(2, index[:, :, None]).squeeze(2).mul_(query_scale[:, 0])
    return index, score.float(), torch.ones_like(index, dtype=torch.bool)
