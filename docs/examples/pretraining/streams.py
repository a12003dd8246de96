"""Images that come one after the other: webdataset's tar files, or any IterableDataset.

Each worker of each process is a reader with shards of its own. A checkpoint keeps the place of every reader, and a
resumed run goes on there. Memory holds one image per reader and the batches ahead.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pretraining.decoding import SUFFIXES, decode
from pretraining.images import TRIES, Views, no_usable, reason, views_of

Place = tuple[int, int, int]  # epoch, shard of the reader's share, item: the next to read
Item = tuple[Place, str, Callable[[], Image.Image]]  # the place after it, its name, how to decode it
START: Place = (0, 0, 0)


class Shards:
    """Tar files; what lies in them without a picture's suffix (labels) is passed over."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = sorted(paths)
        self.digest = " ".join(path.name for path in self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, place: Place, reader: int, readers: int, seed: int) -> Iterator[Item]:
        """This reader's share of all shards in one epoch, in an order drawn anew in each."""
        epoch, first, item = place
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(self.paths))[reader::readers]
        for turn in range(first, len(order)):
            path = self.paths[order[turn]]
            try:
                with tarfile.open(path) as shard:
                    pictures = (m for m in shard if m.isfile() and PurePath(m.name).suffix.lower() in SUFFIXES)
                    for number, member in enumerate(pictures):
                        if number >= item:  # the headers before it are read, their images are not
                            data = io.BytesIO(shard.extractfile(member).read())  # type: ignore[union-attr]
                            yield (epoch, turn, number + 1), f"{path.name}/{member.name}", partial(decode, data)
            except (OSError, tarfile.TarError) as error:
                yield (epoch, turn + 1, 0), path.name, partial(_raise, error)
            item = 0


def _raise(error: Exception) -> Image.Image:
    raise error


class Iterated:
    """An IterableDataset of images or of (image, ...). It shares its items among workers and processes itself."""

    digest = ""

    def __len__(self) -> int:
        return 0  # unknown

    def __init__(self, dataset: Iterable[Any]) -> None:
        self.dataset = dataset

    def read(self, place: Place, reader: int, readers: int, seed: int) -> Iterator[Item]:
        """One epoch. A resumed run passes over the items before its place."""
        epoch, _, first = place
        for number, item in enumerate(self.dataset):
            if number >= first:
                image = item[0] if isinstance(item, (tuple, list)) else item
                yield (epoch, 0, number + 1), f"item {number}", partial(as_picture, image)


def as_picture(image: Any) -> Image.Image:
    """Of a Pillow image, the bytes of a file, (H, W, C) uint8, or a (C, H, W) tensor, uint8 or float in [0, 1]."""
    if isinstance(image, bytes):
        return decode(io.BytesIO(image))
    if isinstance(image, Tensor):
        if image.is_floating_point() and not 0 <= image.min() <= image.max() <= 1:
            raise ValueError("a float tensor beyond [0, 1]; give images before they are normalised")
        image = image.movedim(0, 2).mul(255 if image.is_floating_point() else 1).byte().numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze())
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode}, expected 8 bits, or the bytes of the file")
    return image.convert("RGB")  # type: ignore[no-any-return]


class Stream(IterableDataset["Views | str"]):
    """Two views of each image, by random numbers that its place in the stream decides."""

    def __init__(
        self, source: Shards | Iterated, seed: int, view: int, window: int, workers: int, rank: int, processes: int
    ) -> None:
        self.source, self.seed, self.view, self.window = source, seed, view, window
        self.first, self.readers = rank * max(1, workers), processes * max(1, workers)
        if isinstance(source, Shards) and len(source) < self.readers:
            raise SystemExit(f"--shards: got {len(source)} files for {self.readers} readers (processes x workers)")
        self.skipped: dict[str, str] = {}  # as of Samples
        self.places = dict.fromkeys(range(self.first, self.first + max(1, workers)), START)  # by who reads the batches

    def go_on(self, state: dict[str, Any]) -> None:
        """From a checkpoint: where all readers were."""
        self.skipped |= state["skipped"]
        places = state["places"]
        if len(places) != self.readers:
            epoch = min(place[0] for place in places.values())
            places = dict.fromkeys(range(self.readers), (epoch, 0, 0))
            if self.first == 0:
                print("resumed with another number of readers: this epoch starts anew", file=sys.stderr)
        self.places = {reader: places[reader] for reader in self.places}

    def items(self, reader: int) -> Iterator[Item]:
        """Epoch after epoch, until one is empty."""
        place, found = self.places[reader], True
        while found:
            found = place[1:] != (0, 0)  # the rest of an epoch may well be empty
            for item in self.source.read(place, reader, self.readers, self.seed):
                found = True
                yield item
            place = (place[0] + 1, 0, 0)

    def __iter__(self) -> Iterator[Views | str]:
        info = get_worker_info()
        reader = self.first + (info.id if info else 0)
        skipped: list[tuple[str, str]] = []
        for place, name, open_image in self.items(reader):
            random = np.random.default_rng((self.seed, 1, reader, *place))
            try:
                views = views_of(open_image(), name, self.view, self.window, random, skipped)
            except Exception as error:  # of a dozen types, in Pillow, for a file that is broken
                skipped.append((name, reason(error)))
                if len(skipped) == TRIES:
                    yield no_usable(skipped)
                continue
            yield views._replace(place=(reader, place))
            skipped = []
        yield "no image in the stream"
