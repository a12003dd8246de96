"""The matching rule as a module."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from densecl_ops import _checks
from densecl_ops._types import BACKENDS, BackendName, Correspondence
from densecl_ops.correspondence.function import dense_correspondence


class DenseCorrespondence(nn.Module):
    """Matches the positions of two views of the same images by their backbone features.

    Stateless; see :func:`densecl_ops.functional.dense_correspondence` for the equation and the backends.

    Args:
        grid_size: Average-pools both maps to S x S (or (H, W)) first. Give it the head's grid_size. Default: none.
        mutual: Marks as valid only mutual nearest neighbours. Default: every query has a valid match.
        min_score: Marks as valid only pairs of at least this cosine similarity. Default: no threshold.
        backend: "auto" (default), "blockwise", "eager" or "triton".

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.

    Example:
        >>> import torch
        >>> from densecl_ops import DenseCorrespondence
        >>> match = DenseCorrespondence(grid_size=7)
        >>> match(torch.randn(4, 512, 14, 14), torch.randn(4, 512, 14, 14)).index.shape
        torch.Size([4, 49])
    """

    def __init__(
        self,
        grid_size: int | tuple[int, int] | None = None,
        mutual: bool = False,
        min_score: float | None = None,
        *,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        _checks.require_choice("backend", backend, BACKENDS)
        self.grid_size = _checks.require_grid_size("grid_size", grid_size)
        self.mutual = _checks.require_bool("mutual", mutual)
        self.min_score = _checks.require_cosine("min_score", min_score)
        self.backend = backend

    if TYPE_CHECKING:

        def __call__(self, query_features: Tensor, key_features: Tensor) -> Correspondence: ...

    def forward(self, query_features: Tensor, key_features: Tensor) -> Correspondence:
        """Returns the Correspondence of (B, C, H_q, W_q) and (B, C, H_k, W_k) backbone maps."""
        return dense_correspondence(
            query_features,
            key_features,
            grid_size=self.grid_size,
            mutual=self.mutual,
            min_score=self.min_score,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, mutual={self.mutual}, min_score={self.min_score}, backend={self.backend!r}"
