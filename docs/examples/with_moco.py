"""DenseCL in facebookresearch/moco: a subclass of its MoCo, and three changes in its main_moco.py.

Copy this file beside main_moco.py and follow docs/recipes/moco.md. A few steps on random images, without main_moco.py:

    PYTHONPATH=path/to/moco python docs/examples/with_moco.py --steps 3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
from moco.builder import MoCo, concat_all_gather
from torch import Tensor, nn

from densecl_ops import DenseCorrespondence, DenseInfoNCELoss, DenseProjectionHead, MomentumQueue


class DenseMoCo(MoCo):  # type: ignore[misc]  # moco is untyped
    """MoCo with DenseCL's dense term (arXiv 2011.09157), on one process or under DistributedDataParallel.

    Everything trained is inside encoder_q and encoder_k, under the names that MoCo uses: the head is their `fc`. So
    MoCo's momentum update moves the head too, and main_lincls.py reads the checkpoints.

    Args:
        base_encoder: A torchvision ResNet, as in main_moco.py: called with num_classes, its children in the order of
            the forward pass and ending in avgpool and fc.
        dim: D of both heads. Default 128.
        K: Rows of each of the two queues; any number. Default 65,536.
        m: Momentum of the key encoder. Default 0.999.
        T: Temperature of both terms. Default 0.2, MoCo v2's (main_moco.py passes --moco-t, by default 0.07).
        mlp: Only for main_moco.py, which passes it: DenseCL's head is an MLP in any case.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,  # noqa: N803  (MoCo's names)
        m: float = 0.999,
        T: float = 0.2,  # noqa: N803
        mlp: bool = True,
    ) -> None:
        super().__init__(base_encoder, dim, K, m, T)
        channels = self.encoder_q.fc.in_features
        self.encoder_q.fc, self.encoder_k.fc = (DenseProjectionHead(channels, channels, dim) for _ in range(2))
        self.encoder_k.fc.load_state_dict(self.encoder_q.fc.state_dict())
        self.encoder_k.requires_grad_(False)

        del self.queue, self.queue_ptr  # MoCo's queue: K had to be a multiple of the batch
        self.image_queue, self.dense_queue = MomentumQueue(K, dim), MomentumQueue(K, dim)
        self.match, self.criterion = DenseCorrespondence(), DenseInfoNCELoss(T)

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image term, dense term, and the rank (B, 1) of every image's own key (0: it beats all negatives)."""
        map_q = backbone_map(self.encoder_q, im_q)
        query = self.encoder_q.fc(map_q)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            # The head has no batch norm, so it may run after the unshuffle: one gather, of the backbone map, puts all
            # four key tensors (map, image, dense, pooled) back in the order of the queries.
            map_k = self._key_map(im_k)
            key = self.encoder_k.fc(map_k)

        image_loss, rank = self.criterion(query.image, key.image, self.image_queue, return_rank=True)
        dense_loss = self.criterion(query.dense, key.dense, self.dense_queue, self.match(map_q, map_k))

        self.image_queue.enqueue(key.image)  # gathers over the ranks, as MoCo does
        self.dense_queue.enqueue(key.pooled)
        return image_loss, dense_loss, rank

    def _key_map(self, images: Tensor) -> Tensor:
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return backbone_map(self.encoder_k, images)  # nobody to shuffle with
        shuffled, idx_unshuffle = self._batch_shuffle_ddp(images)
        map_k = backbone_map(self.encoder_k, shuffled).contiguous()  # all_gather wants it so
        return self._batch_unshuffle_ddp(map_k, idx_unshuffle)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """MoCo's, but on the device of the images: MoCo's needs CUDA."""
        idx_shuffle = torch.randperm(len(x) * dist.get_world_size(), device=x.device)
        dist.broadcast(idx_shuffle, src=0)
        idx_this = idx_shuffle.view(dist.get_world_size(), -1)[dist.get_rank()]
        return concat_all_gather(x.contiguous())[idx_this], torch.argsort(idx_shuffle)


def backbone_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) images to the map (B, C, H / 32, W / 32) that a torchvision ResNet hands to its avgpool."""
    for name, module in encoder.named_children():
        if name == "avgpool":
            return images
        images = module(images)
    raise ValueError(f"base_encoder: got {type(encoder).__name__} without avgpool, expected a torchvision ResNet")


class TinyResNet(nn.Sequential):
    """Stands for a torchvision ResNet where there is no torchvision."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer4 = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64, num_classes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A few steps of DenseMoCo on random images.")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DenseMoCo(TinyResNet, K=1024, m=0.99)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    pictures = torch.rand(16, 3, 4, 4)
    for step in range(args.steps):
        views = nn.functional.interpolate(pictures, size=(64, 64), mode="bilinear")
        images = [views + 0.1 * torch.randn_like(views) for _ in range(2)]
        image_loss, dense_loss, rank = model(im_q=images[0], im_k=images[1])
        loss = 0.5 * image_loss + 0.5 * dense_loss
        acc1, acc5 = (100 * (rank < k).float().mean(0) for k in (1, 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: image {image_loss:.3f}, dense {dense_loss:.3f}, acc@1 {acc1[0]:.0f}, acc@5 {acc5[0]:.0f}")


if __name__ == "__main__":
    main()
