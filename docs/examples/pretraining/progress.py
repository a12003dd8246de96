"""What one sees of a run: a bar, files that were skipped, and TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from densecl_ops.metrics import match_score, mutual_share
from densecl_ops.visualize import plot_correspondence
from pretraining.augment import denormalize

if TYPE_CHECKING:
    from pretrain import Output

READ_EVERY = 10  # steps: to read a number is to wait for the device
PICTURES = 20  # of matches, over a whole run


class Progress:
    """Images per second, time left and the last numbers on the terminal; curves and matches in TensorBoard."""

    def __init__(
        self, steps: int, start: int, batch: int, skipped: dict[str, str], show: bool, folder: Path | None
    ) -> None:
        self.steps, self.batch, self.skipped = steps, batch, skipped
        self.bar = tqdm(
            total=steps * batch,
            initial=start * batch,
            unit=" images",
            unit_scale=True,
            disable=not show,
            mininterval=1 if sys.stderr.isatty() else 20,
        )
        self.writer = None
        if folder is not None and show:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=start)

    def skip(self, files: list[tuple[str, str]]) -> None:
        """Names each file once, on standard error."""
        for name, reason in files:
            if name not in self.skipped:
                self.bar.write(f"skipped {name}: {reason}", file=sys.stderr)
            self.skipped[name] = reason

    def step(self, step: int, measured: Tensor, rate: float, output: Output, images: tuple[Tensor, Tensor]) -> None:
        """After each step; `images` are this process's last views, `output` what the model said of them."""
        self.bar.update(self.batch)
        last = step + 1 == self.steps
        if step % READ_EVERY and not last:
            return
        image, dense, top1 = measured.tolist()
        self.bar.set_postfix_str(f"image {image:.2f}, dense {dense:.2f}, top-1 {top1:.2f}", refresh=False)
        if self.writer is not None:
            scalars = {"loss/image": image, "loss/dense": dense, "dense/top-1": top1, "learning rate": rate}
            scalars["dense/match score"] = match_score(output.match).item()
            scalars["dense/mutual share"] = mutual_share(*output.maps).item()
            scalars["images per second"] = self.bar.format_dict["rate"] or 0.0
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            if last or step // READ_EVERY % max(1, self.steps // READ_EVERY // PICTURES) == 0:
                first, second = (denormalize(views[0].float()) for views in images)
                grid = output.maps[0].shape[2:]
                figure = plot_correspondence(first, second, output.match, query_grid=(grid[0], grid[1]))
                self.writer.add_figure("matches", figure, step, close=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
