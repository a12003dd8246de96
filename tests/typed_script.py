"""A user's script with every public name, for the type checkers of test_typing.py. It also runs."""

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import densecl_ops
from densecl_ops import (
    Correspondence,
    DenseCorrespondence,
    DenseInfoNCELoss,
    DenseProjectionHead,
    MomentumQueue,
    Projection,
)
from densecl_ops.functional import (
    boxes_from_torchvision,
    dense_correspondence,
    dense_info_nce,
    in_batch_negatives,
    location_correspondence,
)
from densecl_ops.interop import Checkpoint, read_checkpoint, write_checkpoint

reduction: Literal["mean", "sum", "none"] = "mean"
head = DenseProjectionHead(8, 8, 16, grid_size=(2, 2), norm_layer=nn.BatchNorm2d)
match = DenseCorrespondence(grid_size=2, mutual=True, min_score=0.1, backend="auto")
criterion = DenseInfoNCELoss(0.2, reduction, learnable_temperature=False, backend="blockwise")
queue = MomentumQueue(32, 16, init="empty", dtype=torch.float32, gather_distributed=False)


def step(flag: bool) -> Tensor:
    first, second = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4)
    projection = assert_type(head(first), Projection)
    assert_type(projection.dense, Tensor)
    key = head(second)
    pairs = assert_type(match(first, second), Correspondence)
    assert_type(pairs.index, Tensor)
    loss = assert_type(criterion(projection.dense, key.dense, queue, pairs), Tensor)
    with_rank = criterion(projection.dense, key.dense, queue, pairs, return_rank=True)
    loss, rank = assert_type(with_rank, tuple[Tensor, Tensor])
    both = criterion(projection.dense, key.dense, queue.rows, pairs.index, return_rank=flag)
    assert_type(both, Tensor | tuple[Tensor, Tensor])
    assert isinstance(both, tuple) == flag
    assert_type(queue.enqueue(key.pooled), None)
    assert_type(queue.rows, Tensor)
    assert_type(criterion.temperature, float | Tensor)
    negatives, own = assert_type(in_batch_negatives(key.pooled), tuple[Tensor, Tensor])
    assert_type(dense_info_nce(projection.image, key.image, negatives, exclude=own, reduction="none"), Tensor)
    both_of = dense_info_nce(projection.image, key.image, negatives, temperature=0.1, return_rank=True)
    assert_type(both_of, tuple[Tensor, Tensor])
    assert_type(dense_correspondence(first, second, backend="eager"), Correspondence)
    boxes = assert_type(boxes_from_torchvision([(0, 0, 4, 4)] * 4), Tensor)
    assert_type(location_correspondence(boxes, boxes, 2), Correspondence)
    assert_type(densecl_ops.metrics.contrastive_accuracy(rank), Tensor)
    assert_type(densecl_ops.metrics.match_score(pairs), Tensor)
    assert_type(densecl_ops.metrics.mutual_share(first, second), Tensor)
    return loss


def keep() -> Checkpoint:
    checkpoint = assert_type(Checkpoint.from_modules(head_q=head, dense_queue=queue), Checkpoint)
    assert_type(checkpoint.load_into(head_q=head), list[str])
    return checkpoint


if __name__ == "__main__":
    assert step(True).isfinite()
    assert step(False).isfinite()
    keep()
    assert read_checkpoint is densecl_ops.interop.read_checkpoint
    assert write_checkpoint is densecl_ops.interop.write_checkpoint
    assert callable(densecl_ops.visualize.plot_correspondence)
