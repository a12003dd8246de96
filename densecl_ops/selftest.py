"""Whether this machine computes what it should: `python -m densecl_ops.selftest [--json FILE]`.

Runs the backend that "auto" takes here with every option, at small and real sizes, and compares with the eager form in
float64: losses, ranks, gradients and matches. Repeats must agree bit by bit. Real sizes are timed beside the eager
form. Needs nothing but the package; most of its minute on a GPU goes into compiling. With TRITON_INTERPRET=1 and no
GPU it runs the kernels in Triton's interpreter, at small sizes. The exit status is 1 if a check fails; the JSON is for
reports of what went wrong.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import densecl_ops
from densecl_ops import _backends, _triton
from densecl_ops._types import BackendName, NegativeQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce

FEW_IMAGES = 8  # of a real size that are compared with float64: 392 rows x 65,536 logits are 206 MB there
REPEATS = 100
LEFT_OUT = -1e3  # a cosine that weighs nothing, where -inf would make the gradient to the temperature NaN


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


def exact_loss(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | NegativeQueue,
    correspondence: Tensor,
    temperature: float | Tensor = 0.2,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, P) losses from the equation in float64, and the (B, P, K) cosine of each negative less the positive's.

    Differentiable; what is left out of the loss is LEFT_OUT.
    """
    rows, count = (negatives, len(negatives)) if isinstance(negatives, Tensor) else (negatives.rows, negatives.count)
    unit_q, unit_k = (F.normalize(x.flatten(2).double(), dim=1) for x in (query, key))
    positive = (unit_q * unit_k.gather(2, correspondence[:, None].expand_as(unit_q))).sum(1)
    margin = torch.einsum("bdp,kd->bpk", unit_q, rows.double()) - positive[..., None]
    column = torch.arange(len(rows), device=rows.device)
    margin = margin.masked_fill(column >= count, LEFT_OUT)
    if exclude is not None:
        margin = margin.masked_fill(column == exclude[:, None, None], LEFT_OUT)
    return F.softplus((margin / temperature).logsumexp(2)), margin.detach()


def check(case: Case, backend: BackendName, device: torch.device) -> dict[str, Any]:
    """One row of the table; what went wrong stands under "failed"."""
    row: dict[str, Any] = {"case": str(case), "errors": {}}
    try:
        torch.manual_seed(0)
        prepare, compute, judge = (
            (_loss_arguments, _loss, _judge_loss)
            if case.operation == "loss"
            else (_matching_arguments, _matching, _judge_matching)
        )
        arguments = prepare(case, device)
        run = functools.partial(compute, case, arguments)
        seen = run(backend)
        row["errors"], failed = judge(case, arguments, seen)
        for _ in range(REPEATS if "repeated" in case.options and device.type == "cuda" else 1):
            again = run(backend)
            if not all(torch.equal(seen[name], again[name]) for name in seen):
                failed = "repeats differ"
        if failed:
            row["failed"] = failed
        if case.real:
            row["ours"], row["eager"] = (_measure(functools.partial(run, name), device) for name in (backend, "eager"))
    except Exception as error:  # a report, not a crash: the other rows still count
        row["failed"] = f"{type(error).__name__}: {str(error)[-400:]}"
    return row


Errors = dict[str, tuple[float, float]]  # ours, and the eager form's or what rounding makes


def _maps(case: Case, device: torch.device) -> Iterator[Tensor]:
    layout = torch.channels_last if "channels_last" in case.options else torch.contiguous_format
    for grid in (case.shape[2:], case.key_grid):
        yield torch.randn(*case.shape[:2], *grid, device=device).to(case.dtype, memory_format=layout)


def _loss_arguments(case: Case, device: torch.device) -> dict[str, Any]:
    batch, channels, *grid = case.shape
    query, key = _maps(case, device)
    rows = F.normalize(torch.randn(case.negatives, channels, device=device), dim=1)
    rows = rows if "autocast" in case.options else rows.to(case.dtype)
    count = torch.tensor(case.negatives - case.negatives // 8, device=device)
    temperature = 0.01 if "cold" in case.options else 0.2
    return {
        "query": query,
        "key": key,
        "negatives": SimpleNamespace(rows=rows, count=count) if "count" in case.options else rows,
        "correspondence": torch.randint(math.prod(case.key_grid), (batch, math.prod(grid)), device=device),
        "temperature": torch.tensor(temperature, device=device) if "learned" in case.options else temperature,
        "exclude": torch.arange(batch, device=device) * 7 if "exclude" in case.options else None,
    }


def _loss(case: Case, arguments: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Loss of every row, its gradients and, if that is one of the options, the rank; or "exact" ones with margins."""
    names = ["query"] if "frozen" in case.options else ["query", "key"]
    names += ["negatives"] if not {"frozen", "count"} & set(case.options) else []
    names += ["temperature"] if "learned" in case.options else []
    call: Callable[..., Any] = functools.partial(
        dense_info_nce, reduction="none", return_rank="rank" in case.options, backend=backend
    )
    leaves = {name: arguments[name].detach() for name in names}
    if backend == "exact":
        call, leaves = exact_loss, {name: x.double() for name, x in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with torch.autocast(arguments["query"].device.type, torch.bfloat16, enabled="autocast" in case.options):
        result = call(**(arguments | leaves))
    loss, *more = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    found = {"loss": loss.detach()} | {f"gradient to {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found | {"margin" if backend == "exact" else "rank": x for x in more}


def _judge_loss(case: Case, arguments: dict[str, Any], seen: dict[str, Tensor]) -> tuple[Errors, str | None]:
    if case.real:  # its first images, and what depends on no other
        arguments = arguments | {x: arguments[x][:FEW_IMAGES] for x in ("query", "key", "correspondence")}
        seen = {name: x[:FEW_IMAGES] for name, x in seen.items() if name in ("loss", "gradient to query", "rank")}
    eager, exact = (_loss(case, arguments, backend) for backend in ("eager", "exact"))
    errors = {x: (_error(seen[x], exact[x]), _error(eager[x], exact[x])) for x in exact if x in seen}
    if "rank" in seen:  # logits that are off by no more than rounding can give it
        tolerance = 4 * torch.finfo(case.dtype).eps
        low, high = ((exact["margin"] > bound).sum(2) for bound in (tolerance, -tolerance))
        if not ((low <= seen["rank"]) & (seen["rank"] <= high)).all():
            return errors, "wrong rank"
    wrong = not all(ours <= 2 * theirs + 1e-6 for ours, theirs in errors.values())
    return errors, "more than twice the error of the eager form" if wrong else None


def _matching_arguments(case: Case, device: torch.device) -> dict[str, Any]:
    return dict(zip(("query_features", "key_features"), _maps(case, device), strict=True))


def _matching(case: Case, arguments: dict[str, Any], backend: BackendName) -> dict[str, Tensor]:
    return dense_correspondence(**arguments, mutual="mutual" in case.options, backend=backend)._asdict()


def _judge_matching(case: Case, arguments: dict[str, Any], seen: dict[str, Tensor]) -> tuple[Errors, str | None]:
    few = slice(None) if "repeated" in case.options else slice(0, FEW_IMAGES)
    query, key = (F.normalize(x[few].flatten(2).double(), dim=1) for x in arguments.values())
    index, score, valid = (x[few] for x in seen.values())
    best, which = (query.mT @ key).topk(2, dim=2)
    error = float((score - best[..., 0]).abs().max())
    clear = best[..., 0] - best[..., 1] > 1e-6  # two keys that score alike to rounding: either may win
    failed = None if error <= 1e-5 else "wrong score"
    if not torch.equal(index[clear], which[..., 0][clear]):
        failed = "wrong index"
    if "mutual" in case.options:
        back = (key.mT @ query).argmax(2).gather(1, index)
        if not torch.equal(valid, back == torch.arange(back.shape[1], device=back.device)):
            failed = "wrong mutual pairs"
    return {"score": (error, 1e-6)}, failed


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
        "triton": importlib.import_module("triton").__version__ if _backends.HAS_TRITON else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "backend": backend,
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found |= _triton.describe(device)._asdict()
        found["toolkit"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[
                0
            ]
    return found


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
