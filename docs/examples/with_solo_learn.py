"""DenseCL in solo-learn: a subclass of its MoCoV2Plus.

Copy this file beside solo-learn's main_pretrain.py and follow docs/recipes/solo-learn.md. It runs only where solo-learn
is installed; main_pretrain.py makes the model, the data and the trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from solo.methods.mocov2plus import MoCoV2Plus
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue


class DenseMoCoV2Plus(MoCoV2Plus):  # type: ignore[misc]  # solo-learn is untyped
    """MoCoV2Plus with DenseCL's dense term, symmetric like its image term, for ResNet backbones.

    The image branch of the dense head is solo-learn's own projector, the same layers: no parameter goes unused, which
    DistributedDataParallel would refuse.

    Args:
        cfg: That of MoCoV2Plus; method_kwargs.dense_weight, lambda, is optional and 0.5 by default.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        settings = cfg.method_kwargs
        self.dense_weight = float(settings.get("dense_weight", 0.5))
        self.head = DenseProjectionHead(self.features_dim, settings.proj_hidden_dim, settings.proj_output_dim)
        self.head_k = copy.deepcopy(self.head).requires_grad_(False)
        self.projector, self.momentum_projector = self.head.image_mlp, self.head_k.image_mlp
        self.match, self.criterion = DenseCorrespondence(), DenseInfoNCELoss(self.temperature)
        # One queue per view, as solo-learn has for the images.
        queues = (MomentumQueue(self.queue_size, settings.proj_output_dim) for _ in range(2))
        self.dense_queues: Any = nn.ModuleList(queues)  # Any: a ModuleList forgets the type of its modules

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        extra = [{"name": "dense_head", "params": self.head.dense_mlp.parameters()}]
        return [*super().learnable_params, *extra]

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [*super().momentum_pairs, (self.head.dense_mlp, self.head_k.dense_mlp)]

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        with outputs_of(self.backbone.layer4) as maps_q, outputs_of(self.momentum_backbone.layer4) as maps_k:
            host_loss = super().training_step(batch, batch_idx)
        maps_q = maps_q[:2]  # the large crops come first
        queries = [self.head(features).dense for features in maps_q]
        with torch.no_grad():
            keys = [self.head_k(features) for features in maps_k]
        dense_loss = 0.5 * sum(
            self.criterion(
                queries[view], keys[other].dense, self.dense_queues[other], self.match(maps_q[view], maps_k[other])
            )
            for view, other in ((0, 1), (1, 0))
        )
        self.new_keys = [key.pooled for key in keys]
        self.log("train_dense_loss", dense_loss, on_epoch=True, sync_dist=True)
        loss: Tensor = (1 - self.dense_weight) * host_loss + self.dense_weight * dense_loss
        return loss

    def on_after_backward(self) -> None:
        """Lightning calls it for every batch. No checkpoint can compute a loss again from here on."""
        super().on_after_backward()
        for queue, keys in zip(self.dense_queues, self.new_keys, strict=True):
            queue.enqueue(keys)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the module returns while the block runs; outside it nothing is kept alive."""
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()
