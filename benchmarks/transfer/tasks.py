"""Four dense tasks on a frozen backbone. Nothing here changes a weight of it.

The cells of the backbone's map are what is classified; every pixel counts with its own label, so that a mean
intersection over union (mIoU) is one over pixels, of predictions as coarse as a cell.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.transfer.pretraining import encode
from densecl_ops import DenseCorrespondence

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
VOID = len(CLASSES)  # the label of pixels that no task counts
STRIDE = 8  # pixels per cell
EVERY = 4  # one train frame and one val frame in four is looked at: neighbours are a second apart and much alike
MEMORY = 8192  # train cells that k-NN retrieval looks up
NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07  # DINO's (arXiv 2104.14294, appendix), fixed for all arms
DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)  # of the probe; the best one on val is taken
STILL = 2e-3  # the probe stops once ten more iterations take off less than this share of its loss
TASKS = {  # of the test split: key of the record's value, heading
    "probe": ("miou", "linear probe, mIoU"),
    "knn": ("miou", "k-NN, mIoU"),
    "propagation": ("miou", "label propagation, mIoU"),
    "stereo": ("close", "stereo, within 1.5 cells"),
}


class Frames(NamedTuple):
    """One split of CamVid."""

    names: list[str]  # sequence and number of every frame, such as "0001TP_008550"; sorted
    images: Tensor  # (N, 3, H, W) uint8
    truth: Tensor  # (N, H, W) uint8, a class or VOID


class Cells(NamedTuple):
    """Frames as the tasks see them."""

    features: Tensor  # (N, C, h, w), as the backbone gives them
    counts: Tensor  # (N, h, w, CLASSES + 1) pixels per label of every cell
    pairs: list[tuple[int, int]]  # neighbours (previous, current)


def cell_counts(truth: Tensor) -> Tensor:
    """(N, H / STRIDE, W / STRIDE, CLASSES + 1) how many pixels of each cell bear each label, VOID last; float32."""
    labels = F.one_hot(truth.long(), VOID + 1).movedim(3, 1).float()
    return F.avg_pool2d(labels, STRIDE, divisor_override=1).movedim(1, 3)


def consecutive(names: list[str]) -> list[tuple[int, int]]:
    """Pairs of neighbours (previous, current) of one sequence, as close together as its closest are."""
    places = [re.findall(r"(.+_[a-z]*)(\d+)", name)[0] for name in names]
    gaps = [
        (i, sequence, int(other) - int(number))
        for i, ((sequence, number), (following, other)) in enumerate(itertools.pairwise(places))
        if sequence == following
    ]
    closest = {sequence: min(gap for _, own, gap in gaps if own == sequence) for _, sequence, _ in gaps}
    return [(i, i + 1) for i, sequence, gap in gaps if gap == closest[sequence]]


@torch.no_grad()
def look_at(network: nn.Module, frames: Frames, batch: int = 8) -> Cells:
    """Encodes a split."""
    device = next(network.parameters()).device
    height, width = (side // STRIDE * STRIDE for side in frames.images.shape[2:])
    maps = [
        encode(network, images[:, :, :height, :width].to(device)).contiguous()
        for images in torch.split(frames.images, batch)
    ]
    counts = torch.cat([cell_counts(truth) for truth in torch.split(frames.truth, batch)])
    return Cells(torch.cat(maps), counts.to(device), consecutive(frames.names))


def score(predicted: Tensor, counts: Tensor) -> dict[str, Any]:
    """mIoU over classes that occur. `predicted` (...) labels, VOID a wrong answer; `counts` (..., CLASSES + 1)."""
    truth = counts.flatten(0, -2)[:, :VOID].double()
    confusion = F.one_hot(predicted.flatten(), VOID + 1).double().T @ truth  # predicted x true
    right = confusion.diagonal()[:VOID]
    union = confusion.sum(0) + confusion[:VOID].sum(1) - right
    each = right / union
    occurring = truth.sum(0) > 0
    classes = [round(float(value), 4) if seen else None for value, seen in zip(each, occurring, strict=True)]
    return {"miou": round(float(each[occurring].mean()), 5), "classes": classes}


def rows_of(cells: Cells) -> Tensor:
    """(N h w, C)."""
    return cells.features.movedim(1, -1).flatten(0, -2)


def thinned(cells: Cells, step: int) -> Cells:
    """Every `step`-th cell in both directions."""
    return Cells(cells.features[:, :, ::step, ::step], cells.counts[:, ::step, ::step], cells.pairs)


class Probe(NamedTuple):
    """Linear classifiers of standardised features, one per weight decay."""

    mean: Tensor
    scale: Tensor
    weights: list[Tensor]

    def predict(self, rows: Tensor, which: int) -> Tensor:
        weight, chunks = self.weights[which], torch.split(rows, 65536)
        return torch.cat([torch.addmm(weight[-1], self.standardise(x), weight[:-1]).argmax(1) for x in chunks])

    def standardise(self, rows: Tensor) -> Tensor:
        return (rows.float() - self.mean) * self.scale


def fit_probe(train: Cells) -> Probe:
    """Multinomial logistic regression by L-BFGS, from the strongest decay to the weakest.

    It sees every fourth cell in both directions. The loss is the cross-entropy of a pixel, averaged over all pixels
    that are not void.
    """
    some = thinned(train, 4)
    rows = rows_of(some).float()
    counts = some.counts.flatten(0, -2)[:, :VOID]
    pixels = counts.sum(1)
    rows, counts = rows[pixels > 0], counts[pixels > 0] / pixels.sum()
    mean, scale = rows.mean(0), 1 / (rows.std(0) + 1e-6)
    rows = (rows - mean) * scale
    weight = torch.zeros(rows.shape[1] + 1, VOID, device=rows.device, requires_grad=True)
    weights = []
    for decay in DECAYS:
        optimizer = torch.optim.LBFGS([weight], max_iter=10, history_size=10, line_search_fn="strong_wolfe")

        def closure(decay: float = decay, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            logits = torch.addmm(weight[-1], rows, weight[:-1])
            loss = -(counts * logits.log_softmax(1)).sum() + decay * weight[:-1].square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        before, after = torch.inf, optimizer.step(closure)  # type: ignore[no-untyped-call]
        while before - after > STILL * after:
            before, after = after, optimizer.step(closure)  # type: ignore[no-untyped-call]
        weights.append(weight.detach().clone())
    return Probe(mean, scale, weights)


Memory = tuple[Tensor, Tensor]  # unit features of train cells, float32, and their most frequent labels


def remember(train: Cells) -> Memory:
    """The same MEMORY train cells for every run, drawn among those that are mostly not void."""
    counts = train.counts.flatten(0, -2)
    usable = (counts[:, VOID] * 2 < counts.sum(1)).nonzero()[:, 0]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))[:MEMORY].to(usable.device)
    chosen = usable[order]
    rows = F.normalize(rows_of(train)[chosen].float(), dim=1)  # bfloat16 could not rank cosines near 1
    return rows, counts[chosen, :VOID].argmax(1)


def retrieve(memory: Memory, rows: Tensor) -> Tensor:
    """The label that the NEIGHBOURS most similar cells vote for, each with exp(cosine / temperature)."""
    (known, known_labels), labels = memory, []
    for chunk in torch.split(rows, 2048):
        unit = F.normalize(chunk.float(), dim=1)
        cosine, nearest = (unit @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1)
        votes = torch.zeros(len(chunk), VOID, device=rows.device)
        votes.scatter_add_(1, known_labels[nearest], ((cosine - 1) / KNN_TEMPERATURE).exp())
        labels.append(votes.argmax(1))
    return torch.cat(labels)


def retrieved(memory: Memory, cells: Cells) -> dict[str, Any]:
    """k-NN retrieval on every other cell in both directions."""
    some = thinned(cells, 2)
    return score(retrieve(memory, rows_of(some)), some.counts)


def propagate(cells: Cells, moved: bool = True) -> dict[str, Any]:
    """Cells take the most frequent label of their match in the previous frame; of their own place if not `moved`.

    Every other cell in both directions is asked; all cells of the previous frame may answer.
    """
    some, match, found = thinned(cells, 2), DenseCorrespondence(), []
    for previous, current in cells.pairs:
        labels = cells.counts[previous].argmax(-1)
        own = torch.arange(labels.numel(), device=labels.device).view(labels.shape)[::2, ::2].flatten()
        maps = some.features[current][None], cells.features[previous][None]
        found.append(labels.flatten()[match(*maps).index[0] if moved else own])
    return score(torch.cat(found), some.counts[[current for _, current in cells.pairs]])


def stereo(network: nn.Module) -> dict[str, Any]:
    """Cells of the demo's stereo pair matched with the whole other image: share within 1.5 cells of the truth."""
    from pretraining.augment import denormalize  # needs kornia
    from pretraining.stereo import evaluate, load_pair  # and scikit-image

    encoder = nn.Module()
    encoder.forward = lambda images: encode(network, denormalize(images))
    return {"close": round(evaluate(encoder, load_pair(STRIDE, next(network.parameters()).device)).close, 5)}


def measure(network: nn.Module, train: Frames, val: Frames, test: Frames | None) -> dict[str, Any]:
    """All tasks on val, and on test if it is given, as "test.knn". The probe's decay is chosen on val alone.

    The stereo pair is in neither split. It stands beside val where test is not looked at; nothing is chosen by it.
    """
    seen = look_at(network, Frames(train.names[::EVERY], train.images[::EVERY], train.truth[::EVERY]))
    probe, memory = fit_probe(seen), remember(seen)
    every = look_at(network, val)  # propagation needs neighbours
    cells = Cells(every.features[::EVERY], every.counts[::EVERY], [])
    probed = [score(probe.predict(rows_of(cells), i), cells.counts) for i in range(len(DECAYS))]
    best = max(range(len(DECAYS)), key=lambda i: probed[i]["miou"])
    results = {"val.probe": probed[best], "val.knn": retrieved(memory, cells), "val.propagation": propagate(every)}
    if test is None:
        return results | {"val.stereo": stereo(network)}
    cells = look_at(network, test)
    return results | {
        "test.probe": score(probe.predict(rows_of(cells), best), cells.counts),
        "test.knn": retrieved(memory, cells),
        "test.propagation": propagate(cells),
        "test.unmoved": propagate(cells, moved=False),
        "test.stereo": stereo(network),
    }
