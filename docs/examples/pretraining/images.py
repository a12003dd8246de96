"""Images on their way to the trainer: found, put in order, decoded, and cut into two views each.

What sample number n of a run looks like depends on the seed and n alone. So any number of DataLoader workers and of
processes sees the same views in the same order, and a run resumes at any step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretraining.decoding import SUFFIXES, decode

if TYPE_CHECKING:
    from pretraining.streams import Place, Stream

# The photographs that lie inside the scikit-image wheel. Its stereo pair is kept for the evaluation.
BUILT_IN = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket"),
)
SHORT_SIDE = 384  # pixels that the shorter side of a larger image counts as, where a window is cut
GRACE = 30  # seconds that a worker goes on after SIGTERM
TRIES = 100  # images tried for one sample before the folder is called unusable

Box = tuple[float, float, float, float]  # left, top, right, bottom edge in pixels


class Folder:
    """The images below a folder. Kept are the bytes of their names, in one array that all workers share."""

    def __init__(self, root: Path) -> None:
        names = sorted(os.path.relpath(path, root) for path in _walk(root, set()))
        if not names:
            raise SystemExit(f"--images {root}: no image found; looked for {', '.join(sorted(SUFFIXES))}")
        encoded = [os.fsencode(name) for name in names]
        self.root = root
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded])
        self.digest = hashlib.sha256(b"".join(encoded)).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.bytes[start : self.ends[index]].tobytes())

    def open(self, index: int) -> Image.Image:
        return decode(self.root / self.name(index))


def _walk(folder: str | Path, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of the images below a folder; a linked folder counts as a folder, and each comes once."""
    here = Path(folder).stat()
    if (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _is_folder(entry):
                yield from _walk(entry.path, seen)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122  (a million Path objects are slow)
                yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


class BuiltIn:
    """The photographs of scikit-image: few, so they stay in memory, scaled down once."""

    digest = ""

    def __init__(self) -> None:
        import skimage.data

        self.images = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in BUILT_IN]
        for image in self.images:
            shrink = max(1, min(image.size) / SHORT_SIDE)
            image.thumbnail((image.width / shrink, image.height / shrink), Image.Resampling.BICUBIC)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return BUILT_IN[index]

    def open(self, index: int) -> Image.Image:
        return self.images[index]


class Views(NamedTuple):
    """Two views each of B images, as they leave the workers.

    Attributes:
        images: (2, B, 3, V, V) uint8, before anything is done to the colours.
        boxes: (2, B, 4) float32, the crops in pixels of the upright images; left and right swapped where mirrored.
        uniform: (2, B, 8) float32 in [0, 1), the random numbers of the augmentation that follows.
        skipped: (name, reason) of files that could not be used.
        scaled: (name, how) of images whose white the file did not state.
        place: The reader of a stream, and where it goes on.
    """

    images: Tensor
    boxes: Tensor
    uniform: Tensor
    skipped: list[tuple[str, str]]
    scaled: list[tuple[str, str]]
    place: tuple[int, Place] | None = None


class Samples(Dataset["Views | str"]):
    """Sample (n, index): two views of image `index`, by the n-th random numbers of the run."""

    def __init__(self, source: Folder | BuiltIn, seed: int, view: int, window: int) -> None:
        self.source, self.seed, self.view, self.window = source, seed, view, window
        self.skipped: dict[str, str] = {}  # name and reason; filled by whoever reads the batches
        self.places: dict[int, Place] = {}  # a stream's; sample numbers say it here

    def go_on(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.skipped |= state["skipped"]

    def __getitem__(self, sample: tuple[int, int]) -> Views | str:
        number, index = sample
        random = np.random.default_rng((self.seed, 1, number))
        skipped: list[tuple[str, str]] = []
        for _ in range(TRIES):
            name = self.source.name(index)
            try:
                return views_of(self.source.open(index), name, self.view, self.window, random, skipped)
            except Exception as error:  # of a dozen types, in Pillow, for a file that is broken
                skipped.append((name, reason(error)))
                index = int(random.integers(len(self.source)))
        return no_usable(skipped)


def views_of(
    image: Image.Image, name: str, view: int, window: int, random: np.random.Generator, skipped: list[tuple[str, str]]
) -> Views:
    """Two views of one image, without the dimension B."""
    region = random_window(image.size, window, random)
    views, boxes = zip(*(random_view(image, region, view, random) for _ in range(2)), strict=True)
    uniform = torch.from_numpy(random.random((2, 8), dtype=np.float32))
    scaled = [(name, image.info["scaled"])] if "scaled" in image.info else []
    return Views(torch.stack(views), torch.tensor(boxes), uniform, skipped, scaled)


def reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def no_usable(skipped: list[tuple[str, str]]) -> str:
    """In place of views, since what a worker raises arrives with a traceback."""
    return f"no usable image in {len(skipped)} tries; the last: {': '.join(skipped[-1])}"


def random_window(size: tuple[int, int], window: int, random: np.random.Generator) -> Box:
    """A square part of the image, or with window 0 the whole of it, that both views are cut from."""
    if window == 0:
        return 0, 0, *size
    side = window * max(1, min(size) / SHORT_SIDE)
    width, height = min(side, size[0]), min(side, size[1])
    left, top = random.random() * (size[0] - width), random.random() * (size[1] - height)
    return left, top, left + width, top + height


def random_view(image: Image.Image, region: Box, view: int, random: np.random.Generator) -> tuple[Tensor, Box]:
    """(3, view, view) of a random resized crop of the region, mirrored half of the time, and its box."""
    left, top, right, bottom = random_crop(region, random)
    picture = image.resize((view, view), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, right = right, left
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), (left, top, right, bottom)


def random_crop(region: Box, random: np.random.Generator) -> Box:
    """MoCo-v2's crop: 20 to 100% of the area, width to height 3:4 to 4:3, anywhere in the region."""
    x, y, width, height = region[0], region[1], region[2] - region[0], region[3] - region[1]
    for _ in range(10):
        area, ratio = width * height * random.uniform(0.2, 1), np.exp(random.uniform(-1, 1) * np.log(4 / 3))
        w, h = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = x + random.random() * (width - w), y + random.random() * (height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)  # very long images: the middle
    left, top = x + (width - w) / 2, y + (height - h) / 2
    return left, top, left + w, top + h


class Order:
    """The samples of every batch of this process, from step `start` on. Each image comes once per epoch.

    A step's batch is cut into `parts` to be accumulated, each part into one share per process.
    """

    def __init__(
        self, images: int, seed: int, batch: int, steps: range, parts: int = 1, rank: int = 0, processes: int = 1
    ) -> None:
        self.images, self.seed, self.batch, self.steps = images, seed, batch, steps
        self.parts, self.rank, self.processes = parts, rank, processes
        self.share = batch // parts // processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.share
        epoch, order = -1, np.empty(0, np.int64)
        for step in self.steps:
            for part in range(self.parts):
                first = step * self.batch + (part * self.processes + self.rank) * share
                samples = []
                for number in range(first, first + share):
                    if number // self.images != epoch:
                        epoch = number // self.images
                        order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.images)
                    samples.append((number, int(order[number % self.images])))
                yield samples

    def __len__(self) -> int:
        return len(self.steps) * self.parts


@contextlib.contextmanager
def stream(samples: Samples | Stream, order: Order, workers: int, pin_memory: bool) -> Iterator[Iterator[Views]]:
    """The batches, decoded in `workers` processes (0: in this one) ahead of their use."""
    indexed = isinstance(samples, Samples)
    loader: DataLoader[Views | str] = DataLoader(
        samples,
        batch_size=1 if indexed else order.share,
        batch_sampler=order if indexed else None,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_sigterm,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    try:
        yield map(_usable, batches)
    finally:
        if workers:  # a traceback would keep them alive
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _collate(samples: list[Views | str]) -> Views | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    images, boxes, uniform, skipped, scaled, places = zip(*samples, strict=True)
    parts = torch.stack(images, 1), torch.stack(boxes, 1), torch.stack(uniform, 1)
    return Views(*parts, list(chain(*skipped)), list(chain(*scaled)), places[-1])


def _usable(batch: Views | str) -> Views:
    if isinstance(batch, str):
        raise SystemExit(batch)
    return batch


def _outlive_sigterm(_: int) -> None:
    """Schedulers signal every process of a job, and the trainer still needs its workers to finish the step.

    They end with their trainer; the alarm is for one that ends without telling them.
    """
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
