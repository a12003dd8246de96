"""(B, C, H, W) maps and what is accepted in their place: checks, the one form that the backends see, pooling."""

import math

import torch
from einops import einsum, reduce
from torch import Tensor

from densecl_ops._checks import require_float, require_same_device, require_values, shape_of
from densecl_ops._numerics import accumulation_dtype, no_autocast


def require_map(name: str, value: object) -> tuple[int, int, int]:
    """(B, C, P) of a (B, C, H, W) map, a (B, C, P) sequence or a (B, C) vector."""
    x = require_float(name, value)
    if x.ndim not in (2, 3, 4):
        raise ValueError(f"{name}: got shape {shape_of(x)}, expected (B, C, H, W), (B, C, P) or (B, C)")
    images, channels, *grid = x.shape
    positions = math.prod(grid)
    if images * channels * positions == 0:
        raise ValueError(f"{name}: got an empty tensor of shape {shape_of(x)}, expected every size above 0")
    return images, channels, positions


def require_paired_maps(query_name: str, query: Tensor, key_name: str, key: Tensor) -> None:
    """Two maps of the same images: equal batch, equal channels, one device. Grids may differ."""
    if query.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{key_name}: got {key.shape[0]} images of {key.shape[1]} channels, "
            f"expected {query.shape[0]} of {query.shape[1]} as in {query_name}"
        )
    require_same_device(key_name, key, query_name, query)
    require_values(query_name, query)


def flatten(x: Tensor) -> Tensor:
    """The (B, C, P) form of what `require_map` takes: a view of maps in any memory format and of transposed tokens."""
    if x.ndim == 3:
        return x
    return x.unsqueeze(2) if x.ndim == 2 else x.flatten(2)


def transposed(x: Tensor, channels: int) -> str | None:
    """How to bring x, which has so many channels elsewhere, into the order of the contract; None if it has not."""
    if x.ndim not in (3, 4) or x.shape[1] == channels:
        return None
    if x.shape[-1] == channels:
        tokens, maps = "(B, P, C) tokens: pass .transpose(1, 2)", "a (B, H, W, C) map: pass .permute(0, 3, 1, 2)"
        return tokens if x.ndim == 3 else maps
    return "a (C, H, W) map of one image: pass .unsqueeze(0)" if x.ndim == 3 and x.shape[0] == channels else None


def pool_to_grid(name: str, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of a (B, C, H, W) map; one that already has the grid passes unchanged.

    A mean over equal cells, or else two small matrix products. torch's own form has no deterministic backward on CUDA.
    """
    if features.ndim != 4:
        expected = "expected a (B, C, H, W) map, the only form that grid_size can pool"
        raise ValueError(f"{name}: got shape {shape_of(features)}, {expected}")
    height, width = features.shape[2:]
    if (height, width) == grid:
        return features
    if height % grid[0] == 0 and width % grid[1] == 0:
        return reduce(features, "b c (h y) (w x) -> b c h w", "mean", h=grid[0], w=grid[1])
    with no_autocast(features):
        exact = features.to(accumulation_dtype(features))
        down, across = _pooling_matrix(grid[0], height, exact), _pooling_matrix(grid[1], width, exact)
        return einsum(down, exact, across, "h y, b c y x, w x -> b c h w").to(features.dtype)


def _pooling_matrix(cells: int, size: int, like: Tensor) -> Tensor:
    """(cells, size): cell i is the mean from floor(i size / cells) to ceil((i + 1) size / cells), as in torch."""
    cell = torch.arange(cells, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    inside = (position >= cell * size // cells) & (position < ((cell + 1) * size + cells - 1) // cells)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
