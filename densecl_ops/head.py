"""The projection head: one image-level and one dense branch over the same backbone map."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import reduce
from torch import Tensor, nn

from densecl_ops import _checks, _maps
from densecl_ops._types import Projection


class DenseProjectionHead(nn.Module):
    """Projects a backbone map to an image vector and a dense map (DenseCL, arXiv 2011.09157, section 3.2).

    Image branch: global average pool, Linear, ReLU, Linear. Dense branch: optional adaptive average pool to
    S x S, 1x1 conv, ReLU, 1x1 conv. Nothing is normalised: the loss and the queue normalise what they are given.

    Args:
        in_channels: C of the backbone map. Default 2048, a ResNet-50's.
        hidden_channels: Width of both hidden layers. Default: in_channels, DenseCL's and MoCo-v2's own rule.
        out_channels: Channels of every output, D. Default 128.
        grid_size: S, or (H, W), of the dense branch. Default: the backbone's own grid. Give the same value to
            DenseCorrespondence, whose indices must speak of the same positions. A grid finer than the map repeats its
            positions, as adaptive pooling does.
        norm_layer: Called with hidden_channels for each branch, put before the ReLU and applied to (B, C, H, W) maps
            (1 x 1 in the image branch): nn.BatchNorm2d, nn.SyncBatchNorm, ... Default: no norm, as in DenseCL.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is below 1, or the features have other channels than in_channels.

    Example:
        >>> import torch
        >>> from densecl_ops import DenseProjectionHead
        >>> head = DenseProjectionHead(in_channels=512, hidden_channels=512, grid_size=7)
        >>> image, dense, pooled = head(torch.randn(2, 512, 14, 14))
        >>> image.shape, dense.shape, pooled.shape
        (torch.Size([2, 128]), torch.Size([2, 128, 7, 7]), torch.Size([2, 128]))
    """

    def __init__(
        self,
        in_channels: int = 2048,
        hidden_channels: int | None = None,
        out_channels: int = 128,
        grid_size: int | tuple[int, int] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if hidden_channels is None:
            hidden_channels = in_channels
        self.in_channels = in_channels = _checks.require_positive_int("in_channels", in_channels)
        self.hidden_channels = hidden_channels = _checks.require_positive_int("hidden_channels", hidden_channels)
        self.out_channels = out_channels = _checks.require_positive_int("out_channels", out_channels)
        self.grid_size = _checks.require_grid_size("grid_size", grid_size)
        image: list[nn.Module] = [nn.Linear(in_channels, hidden_channels)]
        dense: list[nn.Module] = [nn.Conv2d(in_channels, hidden_channels, 1)]
        if norm_layer is not None:
            image += [nn.Unflatten(1, (hidden_channels, 1, 1)), _norm(norm_layer, hidden_channels), nn.Flatten()]
            dense += [_norm(norm_layer, hidden_channels)]
        self.image_mlp = nn.Sequential(*image, nn.ReLU(), nn.Linear(hidden_channels, out_channels))
        self.dense_mlp = nn.Sequential(*dense, nn.ReLU(), nn.Conv2d(hidden_channels, out_channels, 1))

    if TYPE_CHECKING:

        def __call__(self, features: Tensor) -> Projection: ...

    def forward(self, features: Tensor) -> Projection:
        """Projects backbone features.

        Args:
            features: (B, C, H, W), any strides; (B, C, P) tokens and (B, C) vectors also work, without grid_size.
                A warning tells of vectors: a backbone that pools leaves the dense term one position an image.

        Returns:
            Projection(image (B, D), dense (B, D, S, S), pooled (B, D)); `dense` is (B, D, P) or (B, D) for tokens or
            vectors.
        """
        _maps.require_map("features", features)
        flat = _maps.flatten(features)
        if flat.shape[1] != self.in_channels:
            way = _maps.transposed(features, self.in_channels)
            raise ValueError(
                f"features: got shape {_checks.shape_of(features)}, expected {self.in_channels} channels (in_channels)"
                + (f"; it looks like {way}" if way else f", or a head with in_channels={flat.shape[1]}")
            )
        first = self.image_mlp[0]
        if type(first) is nn.Linear:  # a quantised layer, or one of another library, has its own rules
            if features.is_meta and not first.weight.is_meta:
                raise ValueError(f"features: got a tensor on meta, expected {first.weight.device}, where the head is")
            if features.dtype != first.weight.dtype and not torch.is_autocast_enabled(features.device.type):
                raise TypeError(
                    f"features: got dtype {features.dtype}, expected {first.weight.dtype}, which the head has, "
                    "or a call under torch.autocast"
                )
        if features.ndim == 2 and not torch.compiler.is_compiling():
            warnings.warn(
                "features: got (B, C) vectors, so that dense is one position an image; a backbone that pools, such as "
                "timm's with num_classes=0, has a map in forward_features",
                stacklevel=2,
            )
        grid = features
        if self.grid_size is not None:
            grid = _maps.pool_to_grid("features", features, self.grid_size)
        image = self.image_mlp(reduce(flat, "b c p -> b c", "mean"))
        dense = self.dense_mlp(grid if grid.ndim == 4 else flat[:, :, :, None])
        pooled = reduce(dense, "b d h w -> b d", "mean")
        shape = (*dense.shape[:2], *grid.shape[2:])
        return Projection(image, dense.reshape(shape), pooled)

    def extra_repr(self) -> str:
        sizes = f"in_channels={self.in_channels}, hidden_channels={self.hidden_channels}, "
        return f"{sizes}out_channels={self.out_channels}, grid_size={self.grid_size}"


def _norm(norm_layer: Callable[[int], nn.Module], channels: int) -> nn.Module:
    no_maps = (nn.LayerNorm, nn.BatchNorm1d, nn.InstanceNorm2d, nn.GroupNorm)
    makes = callable(norm_layer) and not isinstance(norm_layer, nn.Module) and norm_layer not in no_maps
    norm = norm_layer(channels) if makes else None
    if not isinstance(norm, nn.Module):
        raise TypeError(
            f"norm_layer: got {norm_layer!r}, expected what makes a norm of (B, C, H, W) maps, also of 1 x 1, such as "
            "torch.nn.BatchNorm2d or lambda channels: torch.nn.GroupNorm(1, channels)"
        )
    return norm
