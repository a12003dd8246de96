"""What one sees of a run: a bar, files that were skipped, and TensorBoard."""

from __future__ import annotations

import math
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

    from pretraining.images import Views

READ_EVERY = 10  # steps: to read a number is to wait for the device
tqdm.monitor_interval = 0  # its thread would outlive the bar
PICTURES = 20  # of matches, over a whole run


COLLAPSE = (
    "warning: after step {} the dense loss is {:.2f} and the mean rank {:.0f} of {} negatives: the projections are "
    "(almost) all equal. docs/training.md says what to try"
)


def has_collapsed(loss: float, rank: float, negatives: int) -> bool:
    """Whether queries tell nothing apart: a loss of log(1 + K) to 1 %, and half of the negatives above the positive.

    The rank decides: the loss alone is also that of a head which has not learnt yet.
    """
    chance = math.log(1 + negatives)
    return abs(loss - chance) <= 0.01 * chance and abs(rank - negatives / 2) <= 0.05 * negatives


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
        self.told_scaled = self.told_collapse = False
        self.writer = None
        if folder is not None and show:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=start)

    def tell(self, views: Views) -> None:
        """Names each file that was skipped once, and the first that was scaled, on standard error."""
        for name, reason in views.skipped:
            if name not in self.skipped:
                self.bar.write(f"skipped {name}: {reason}", file=sys.stderr)
            self.skipped[name] = reason
        if views.scaled and not self.told_scaled:
            name, how = views.scaled[0]
            self.bar.write(
                f"note: {name} does not say its white: scaled {how}, and others like it by what they use",
                file=sys.stderr,
            )
            self.told_scaled = True

    def step(
        self,
        step: int,
        measured: Tensor,
        rate: float,
        training: bool,
        output: Output,
        images: tuple[Tensor, Tensor],
    ) -> None:
        """After each step; `images` are this process's last views, `output` what the model said of them.

        `training`: whether the dense term has a weight yet.
        """
        self.bar.update(self.batch)
        last = step + 1 == self.steps
        if step % READ_EVERY and not last:
            return
        image, dense, top1 = measured.tolist()
        if training and not self.told_collapse and has_collapsed(dense, float(output.rank), int(output.negatives)):
            self.bar.write(COLLAPSE.format(step + 1, dense, float(output.rank), int(output.negatives)), file=sys.stderr)
            self.told_collapse = True
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
