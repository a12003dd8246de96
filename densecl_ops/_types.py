"""Public tuples, protocols and choices that several modules share."""

from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.serialization import add_safe_globals
from torch.utils import _pytree

BackendName = Literal["auto", "eager", "blockwise", "triton"]
Reduction = Literal["mean", "sum", "none"]
Init = Literal["random", "empty"]
BACKENDS, REDUCTIONS, INITS = map(get_args, (BackendName, Reduction, Init))
Grids = tuple[tuple[int, ...], tuple[int, ...]]  # (H, W) of query and key


class _Correspondence(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # the contract's name hides tuple.index
    score: Tensor
    valid: Tensor


class Correspondence(_Correspondence):
    """For every query position, the matching key position of the same image. Unpacks into its first three attributes.

    Attributes:
        index: (B, P_q) int64, position in the key grid, row-major.
        score: (B, P_q) float32, how well the two agree; cosine similarity in [-1, 1] for feature matching.
        valid: (B, P_q) bool, False where the match is to be left out of the loss.
        grids: ((H_q, W_q), (H_k, W_k)) of the two views where they are known, as of maps; else None. The loss refuses
            maps of other grids, a transposed one too, which has as many positions.
    """

    grids: Grids | None = None


def with_grids(match: Correspondence, grids: Grids) -> Correspondence:
    """The match, which knows its grids; not in compiled code, where a tuple is its items."""
    if not torch.compiler.is_compiling():
        match.grids = grids
    return match


class Projection(NamedTuple):
    """What a projection head makes of one backbone map. Nothing in it is normalised.

    Attributes:
        image: (B, D) image-level vector.
        dense: (B, D, S, S) dense map, or (B, D, P) when the head was given (B, C, P).
        pooled: (B, D) spatial mean of `dense`; what the dense queue stores.
    """

    image: Tensor
    dense: Tensor
    pooled: Tensor


class NegativeQueue(Protocol):
    """Anything that stores negatives as MomentumQueue does.

    With the further attribute `unit_rows = True` it declares that every row is a unit row or zero. On a GPU the loss
    then saves the running maximum; of rows that are longer it may be infinite.
    """

    @property
    def rows(self) -> Tensor:
        """(K, D) rows, used as they are."""

    @property
    def count(self) -> Tensor:
        """0-d int64: how many of the first rows are negatives."""


# torch.export.save asks for it of a program that returns them; its public register_dataclass takes no tuples.
for _public in (Correspondence, Projection):
    _pytree._register_namedtuple(_public, serialized_type_name=f"densecl_ops.{_public.__name__}")
add_safe_globals([Correspondence, Projection])  # so that torch.load takes them back with its default, weights_only
