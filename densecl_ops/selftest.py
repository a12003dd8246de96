"""Whether this machine computes what it should: `python -m densecl_ops.selftest [--json FILE]`.

Runs the backend that "auto" takes here with every option, at small and real sizes, and compares with the eager form in
float64: losses, ranks, gradients and matches. Repeats must agree bit by bit. Real sizes are timed beside the eager
form. Needs nothing but the package; most of its minute on a GPU goes into compiling. With TRITON_INTERPRET=1 and no
GPU it runs the kernels in Triton's interpreter, at small sizes. The exit status is 1 if a check fails; the JSON is for
reports of what went wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import densecl_ops
from densecl_ops import _backends, _triton
from densecl_ops._types import BackendName
from densecl_ops.functional import dense_correspondence, dense_info_nce

FEW_IMAGES = 8  # of a real size that are compared with float64: 392 rows x 65,536 logits are 206 MB there
REPEATS = 100


class Case(NamedTuple):
    """One call to check.

    Attributes:
        operation: "loss" or "matching".
        shape: (B, D or C, H, W) of the query map.
        key_grid: (H, W) of the key map.
        dtype: Of the maps.
        negatives: K, for the loss.
        options: Of: "count", "exclude", "rank", "learned" (temperature), "cold" (temperature 0.01), "channels_last",
            "autocast" (a float32 queue under bfloat16), "frozen" (no gradient to key and negatives), "mutual",
            "repeated" (on a GPU REPEATS times; a tile overwritten too soon shows in some).
        real: Whether the size is one of training: timed, and compared with float64 by its first images.
    """

    operation: str
    shape: tuple[int, int, int, int]
    key_grid: tuple[int, int]
    dtype: torch.dtype
    negatives: int = 0
    options: tuple[str, ...] = ()
    real: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) + (f", K {self.negatives}" if self.negatives else "")
        return f"{self.operation} {size} {str(self.dtype)[6:]} {' '.join(self.options)}".rstrip()


class _Queue(NamedTuple):
    rows: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def cases(real: bool, images: int) -> Iterator[Case]:
    """Every kernel and option at a small, uneven size; with `real`, also the sizes of training."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    small = ("loss", (3, 40, 5, 7), (4, 4))
    for dtype in (float32, bfloat16, torch.float16):
        yield Case(*small, dtype, 150)
    yield Case(*small, bfloat16, 150, ("count", "exclude", "rank", "cold"))
    yield Case(*small, float32, 150, ("count", "exclude", "rank", "channels_last", "learned"))
    yield Case(*small, bfloat16, 150, ("count", "autocast"))
    for dtype in (float32, bfloat16):
        yield Case("matching", (3, 70, 7, 7), (6, 8), dtype, 0, ("mutual",))
        yield Case("matching", (2, 70, 10, 9), (9, 12), dtype, 0, ("mutual", "channels_last"))
    if real:
        loss = ("loss", (images, 128, 7, 7), (7, 7))
        yield Case(*loss, bfloat16, 65536, ("count", "frozen"), real)
        yield Case(*loss, bfloat16, 65536, ("count", "frozen", "rank"), real)
        yield Case(*loss, bfloat16, 65536, ("count", "frozen", "autocast"), real)
        yield Case(*loss, bfloat16, 65536, ("frozen", "learned"), real)
        yield Case(*loss, float32, 65536, ("count", "frozen"), real)
        for dtype in (float32, bfloat16):
            yield Case("matching", (images, 2048, 7, 7), (7, 7), dtype, 0, ("mutual",), real)
        yield Case("matching", (images, 2048, 7, 7), (7, 7), bfloat16, 0, ("mutual", "channels_last", "repeated"), real)
        yield Case("matching", (8, 256, 56, 56), (56, 56), bfloat16, 0, (), real)


def check(case: Case, backend: BackendName, device: torch.device) -> dict[str, Any]:
    """One row of the table; what went wrong stands under "failed"."""
    row: dict[str, Any] = {"case": str(case), "errors": {}}
    try:
        torch.manual_seed(0)
        (_check_loss if case.operation == "loss" else _check_matching)(case, backend, device, row)
    except Exception as error:  # a report, not a crash: the other rows still count
        row["failed"] = f"{type(error).__name__}: {str(error)[-400:]}"
    return row


def _check_loss(case: Case, backend: BackendName, device: torch.device, row: dict[str, Any]) -> None:
    arguments = _loss_arguments(case, device)
    few = slice(0, FEW_IMAGES) if case.real else slice(None)
    part = dict(arguments)
    for name in ("query", "key", "correspondence"):
        part[name] = arguments[name][few]
    seen, again = _loss(case, arguments, backend), _loss(case, arguments, backend)
    eager, exact = _loss(case, part, "eager"), _loss(case, _in_float64(part), "eager")
    compared = ("loss", "gradient to query") if case.real else tuple(seen.keys() - {"rank"})
    for name in compared:
        ours = seen[name][few] if case.real else seen[name]
        row["errors"][name] = (_error(ours, exact[name]), _error(eager[name], exact[name]))
    if not all(ours <= 2 * theirs + 1e-6 for ours, theirs in row["errors"].values()):
        row["failed"] = "more than twice the error of the eager form"
    if "rank" in seen and not _is_rank(seen["rank"][few], case, part):
        row["failed"] = "wrong rank"
    if not all(torch.equal(seen[name], again[name]) for name in seen):
        row["failed"] = "repeats differ"
    if case.real:
        row["ours"] = _measure(lambda: _loss(case, arguments, backend), device)
        row["eager"] = _measure(lambda: _loss(case, arguments, "eager"), device)


def _loss_arguments(case: Case, device: torch.device) -> dict[str, Any]:
    batch, channels, *grid = case.shape
    layout = torch.channels_last if "channels_last" in case.options else torch.contiguous_format

    def projections(*side: int) -> Tensor:
        return torch.randn(batch, channels, *side, device=device).to(case.dtype, memory_format=layout)

    rows = F.normalize(torch.randn(case.negatives, channels, device=device), dim=1)
    rows = rows if "autocast" in case.options else rows.to(case.dtype)
    count = torch.tensor(case.negatives - case.negatives // 8, device=device)
    keys = case.key_grid[0] * case.key_grid[1]
    temperature = 0.01 if "cold" in case.options else 0.2
    return {
        "query": projections(*grid),
        "key": projections(*case.key_grid),
        "negatives": _Queue(rows, count) if "count" in case.options else rows,
        "correspondence": torch.randint(keys, (batch, grid[0] * grid[1]), device=device),
        "temperature": torch.tensor(temperature, device=device) if "learned" in case.options else temperature,
        "exclude": torch.arange(batch, device=device) * 7 if "exclude" in case.options else None,
    }


def _loss(case: Case, arguments: dict[str, Any], backend: BackendName) -> dict[str, Tensor]:
    """Loss of every row, its gradients, and the rank if that is one of the options."""
    frozen = "frozen" in case.options
    leaves = {"query": arguments["query"].detach().requires_grad_()}
    if not frozen:
        leaves["key"] = arguments["key"].detach().requires_grad_()
        if "count" not in case.options:
            leaves["negatives"] = arguments["negatives"].detach().requires_grad_()
    if "learned" in case.options:
        leaves["temperature"] = arguments["temperature"].detach().requires_grad_()
    autocast: AbstractContextManager[object] = nullcontext()
    if "autocast" in case.options:
        autocast = torch.autocast(arguments["query"].device.type, torch.bfloat16)
    options: dict[str, Any] = {**arguments, **leaves, "return_rank": "rank" in case.options}
    with autocast:
        result = dense_info_nce(**options, reduction="none", backend=backend)
    loss, rank = result if isinstance(result, tuple) else (result, None)
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    found = {"loss": loss.detach()} | {f"gradient to {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found if rank is None else found | {"rank": rank}


def _is_rank(rank: Tensor, case: Case, arguments: dict[str, Any]) -> bool:
    """Whether logits that are off by no more than rounding can give this rank."""
    query, key, rows = (
        x.double() for x in (arguments["query"].flatten(2), arguments["key"].flatten(2), _rows(arguments))
    )
    query, key = F.normalize(query, dim=1).transpose(1, 2), F.normalize(key, dim=1).transpose(1, 2)
    positive = (query * key.gather(1, arguments["correspondence"][:, :, None].expand_as(query))).sum(2, keepdim=True)
    negative = query @ rows.t()
    column = torch.arange(len(rows), device=rank.device)
    if "count" in case.options:
        negative[..., column >= arguments["negatives"].count] = -1e3
    if "exclude" in case.options:
        negative.masked_fill_(column == arguments["exclude"][:, None, None], -1e3)
    tolerance = 4 * torch.finfo(case.dtype).eps
    low, high = (negative > positive + tolerance).sum(2), (negative > positive - tolerance).sum(2)
    return bool(((low <= rank) & (rank <= high)).all())


def _check_matching(case: Case, backend: BackendName, device: torch.device, row: dict[str, Any]) -> None:
    layout = torch.channels_last if "channels_last" in case.options else torch.contiguous_format
    batch, channels, *grid = case.shape
    query, key = (
        torch.randn(batch, channels, *side, device=device).to(case.dtype, memory_format=layout)
        for side in (grid, case.key_grid)
    )

    def match(name: BackendName) -> Any:
        return dense_correspondence(query, key, mutual="mutual" in case.options, backend=name)

    seen = match(backend)
    repeats = [match(backend) for _ in range(REPEATS if "repeated" in case.options and device.type == "cuda" else 1)]
    few = slice(None) if "repeated" in case.options else slice(0, FEW_IMAGES)
    q, k = (F.normalize(x[few].flatten(2).double(), dim=1) for x in (query, key))
    best, index = (q.transpose(1, 2) @ k).topk(2, dim=2)
    row["errors"]["score"] = (float((seen.score[few] - best[..., 0]).abs().max()), 1e-6)
    if not row["errors"]["score"][0] <= 1e-5:
        row["failed"] = "wrong score"
    clear = best[..., 0] - best[..., 1] > 1e-6  # two keys that score alike to rounding: either may win
    if not torch.equal(seen.index[few][clear], index[..., 0][clear]):
        row["failed"] = "wrong index"
    if "mutual" in case.options:
        back = (k.transpose(1, 2) @ q).argmax(2).gather(1, seen.index[few])
        if not torch.equal(seen.valid[few], back == torch.arange(back.shape[1], device=device)):
            row["failed"] = "wrong mutual pairs"
    if not all(torch.equal(a, b) for again in repeats for a, b in zip(seen, again, strict=True)):
        row["failed"] = "repeats differ"
    if case.real:
        row["ours"] = _measure(lambda: match(backend), device)
        row["eager"] = _measure(lambda: match("eager"), device)


def _rows(arguments: dict[str, Any]) -> Tensor:
    negatives = arguments["negatives"]
    return negatives.rows if isinstance(negatives, _Queue) else negatives


def _in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    def exact(value: Any) -> Any:
        if isinstance(value, _Queue):
            return value._replace(rows=value.rows.double())
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: exact(value) for name, value in arguments.items()}


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def _measure(run: Callable[[], object], device: torch.device) -> dict[str, float | str]:
    """Median milliseconds of a warm call, and the peak of its memory (on a GPU)."""
    on_gpu = device.type == "cuda"
    times: list[float] = []
    try:
        run()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        while len(times) < 3 or (sum(times) < 0.5 and len(times) < 50):
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    measured: dict[str, float | str] = {"milliseconds": sorted(times)[len(times) // 2] * 1e3}
    if on_gpu:
        measured["mebibytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return measured


def environment(device: torch.device, backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "densecl_ops": densecl_ops.__version__,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "backend": backend,
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found |= _triton.describe(device)._asdict()
        found["toolkit"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return None
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return answer[0] if answer else None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _line(row: dict[str, Any]) -> str:
    worst = max((ours for ours, _ in row["errors"].values()), default=float("nan"))

    def measured(side: str) -> str:
        if side not in row:
            return ""
        if "failed" in row[side]:
            return str(row[side]["failed"])
        memory = f" {row[side]['mebibytes']:8,.0f} MiB" if "mebibytes" in row[side] else ""
        return f"{row[side]['milliseconds']:9.2f} ms{memory}"

    verdict = f"FAILED: {row['failed']}" if "failed" in row else "ok"
    return f"{row['case']:72} {worst:8.1e} {measured('ours'):>25} {measured('eager'):>25}  {verdict}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m densecl_ops.selftest", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--small", action="store_true", help="leave out the real sizes")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = device.type == "cuda" or _triton.interpreting()
    obstacle = _backends.triton_obstacle(torch.empty(0, device=device), torch.float32) if kernels else None
    backend: BackendName = "triton" if kernels and obstacle is None else "blockwise"
    about = environment(device, backend) | ({"no kernels since": obstacle} if obstacle else {})
    for name, value in about.items():
        print(f"{name:16} {value}")
    print(f"\n{'':72} {'error':>8} {backend:>25} {'eager':>25}")
    real = not options.small and not (device.type == "cpu" and backend == "triton")
    rows = []
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # the interpreter's log2(0)
    for case in cases(real, images=256 if device.type == "cuda" else FEW_IMAGES):
        rows.append(check(case, backend, device))
        print(_line(rows[-1]), flush=True)
        if options.json:  # after every check: what ends the process early loses one
            options.json.write_text(json.dumps({"environment": about, "checks": rows}, indent=1) + "\n")
    failures = sum("failed" in row for row in rows)
    print(f"\n{len(rows)} checks, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
