"""Whether this machine computes what it should: `python -m densecl_ops.selftest [--json FILE]`.

Runs the backend that "auto" takes here with every option, at small and real sizes, and compares with the textbook's
form in float64: losses, ranks, gradients and matches. Repeats must agree bit by bit. Real sizes are timed beside the
eager form. Needs nothing but the package; most of its minute on a GPU goes into compiling. The exit status is 1 if a
check fails; the JSON is for reports of what went wrong.
"""

import argparse
import functools
import importlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import densecl_ops
from densecl_ops import _backends, _triton
from densecl_ops._types import BackendName
from densecl_ops.functional import dense_correspondence, dense_info_nce

FEW_IMAGES = 8  # of a real size that are compared with float64: 392 rows x 65,536 logits are 206 MB there
REPEATS = 100


class Case(NamedTuple):
    """One call to check."""

    shape: tuple[int, int, int, int]  # (B, D or C, H, W) of the query map
    key_grid: tuple[int, int]  # (H, W) of the key map
    dtype: torch.dtype  # of the maps
    negatives: int  # K of the loss; 0 stands for a matching
    # Of: "count", "exclude", "rank", "learned" (temperature), "cold" (temperature 0.01), "channels_last", "autocast" (a
    # float32 queue under bfloat16), "frozen" (no gradient to key and negatives), "mutual", "repeated" (on a GPU REPEATS
    # times; a tile overwritten too soon shows in some).
    options: str = ""
    real: bool = False  # a size of training: timed, and compared with float64 by its first images

    def __str__(self) -> str:
        name = f"loss, K {self.negatives}," if self.negatives else "matching"
        return f"{name} {'x'.join(map(str, self.shape))} {str(self.dtype)[6:]} {self.options}".rstrip()


def cases(real: bool, images: int) -> Iterator[Case]:
    """Every kernel and option at a small, uneven size; with `real`, also the sizes of training."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    small = (3, 40, 5, 7), (4, 4)
    for dtype in (float32, bfloat16, torch.float16):
        yield Case(*small, dtype, 150)
    yield Case(*small, bfloat16, 150, "count exclude rank cold")
    yield Case(*small, float32, 150, "count exclude rank channels_last learned")
    yield Case(*small, bfloat16, 150, "count autocast")
    for dtype in (float32, bfloat16):
        yield Case((3, 70, 7, 7), (6, 8), dtype, 0, "mutual")
        yield Case((2, 70, 10, 9), (9, 12), dtype, 0, "mutual channels_last")
    if real:
        loss, match = ((images, 128, 7, 7), (7, 7)), ((images, 2048, 7, 7), (7, 7))
        for options in ("count frozen", "count frozen rank", "count frozen autocast", "frozen learned"):
            yield Case(*loss, bfloat16, 65536, options, real)
        yield Case(*loss, float32, 65536, "count frozen", real)
        for dtype in (float32, bfloat16):
            yield Case(*match, dtype, 0, "mutual", real)
        yield Case(*match, bfloat16, 0, "mutual channels_last repeated", real)
        yield Case((8, 256, 56, 56), (56, 56), bfloat16, 0, "", real)


Run = Callable[..., dict[str, Tensor]]  # of a backend ("exact": the eager form in float64) and images (default: all)


def check(case: Case, backend: BackendName, device: torch.device) -> dict[str, Any]:
    """One row of the table; what went wrong stands under "failed"."""
    row: dict[str, Any] = {"case": str(case), "errors": {}}
    try:
        torch.manual_seed(0)
        run = (_loss if case.negatives else _matching)(case, device)
        few = slice(FEW_IMAGES if case.real and "repeated" not in case.options else None)
        seen, eager, exact = run(backend), run("eager", few), run("exact", few)
        for name, x in seen.items():
            if few.stop and x.ndim == 0:  # depends on all images
                continue
            row["errors"][name] = error = _error(x[few] if x.ndim else x, exact[name])
            slack = 3e-3 if name == "rank" else 1e-6  # of ranks, a few rows' comparison within rounding
            if not error <= 2 * _error(eager[name], exact[name]) + slack:  # or NaN
                row["failed"] = f"{name} has more than twice the error of the eager form"
        for _ in range(REPEATS if "repeated" in case.options and device.type == "cuda" else 1):
            again = run(backend)
            if not all(torch.equal(seen[name], again[name]) for name in seen):
                row["failed"] = "repeats differ"
        if case.real:
            row["ours"], row["eager"] = (_time(functools.partial(run, name)) for name in (backend, "eager"))
    except Exception as error:  # a report, not a crash: the other rows still count
        row["failed"] = f"{type(error).__name__}: {str(error)[-400:]}"
    return row


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def _maps(case: Case, device: torch.device) -> Iterator[Tensor]:
    layout = torch.channels_last if "channels_last" in case.options else torch.contiguous_format
    for grid in (case.shape[2:], case.key_grid):
        yield torch.randn(*case.shape[:2], *grid, device=device).to(case.dtype, memory_format=layout)


def _loss(case: Case, device: torch.device) -> Run:
    batch, channels, *grid = case.shape
    query, key = _maps(case, device)
    rows = F.normalize(torch.randn(case.negatives, channels, device=device), dim=1)
    count = torch.tensor(case.negatives - case.negatives // 8, device=device)
    temperature = 0.01 if "cold" in case.options else 0.2
    arguments = {
        "query": query,
        "key": key,
        "correspondence": torch.randint(math.prod(case.key_grid), (batch, math.prod(grid)), device=device),
        "exclude": torch.arange(batch, device=device) * 7 if "exclude" in case.options else None,
        "negatives": rows if "autocast" in case.options else rows.to(case.dtype),
        "temperature": torch.tensor(temperature, device=device) if "learned" in case.options else temperature,
    }
    wanted = ["query"] if "frozen" in case.options else ["query", "key"]
    wanted += ["temperature"] * ("learned" in case.options)
    wanted += ["negatives"] * ("frozen" not in case.options and "count" not in case.options)

    def run(backend: Any, images: slice = slice(None)) -> dict[str, Tensor]:
        """Loss of every row, its gradients and, if that is one of the options, the rank; "exact" ones in float64."""
        exact = backend == "exact"
        given: dict[str, Any] = arguments.copy()
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                x = x if name in ("negatives", "temperature") else x[images]
                x = x.double() if exact and x.is_floating_point() else x.detach()
                given[name] = x.requires_grad_(name in wanted)
        leaves = [given[name] for name in wanted]
        if "count" in case.options:
            given["negatives"] = SimpleNamespace(rows=given["negatives"], count=count)
        with torch.autocast(device.type, torch.bfloat16, enabled="autocast" in case.options):
            backend = "eager" if exact else backend
            result = dense_info_nce(**given, reduction="none", return_rank="rank" in case.options, backend=backend)
        loss, *rank = result if isinstance(result, tuple) else (result,)
        gradients = torch.autograd.grad(loss.sum(), leaves)
        names = ["loss", *(f"gradient to {name}" for name in wanted), "rank"]
        return dict(zip(names, [loss.detach(), *gradients, *rank], strict=False))

    return run


def _matching(case: Case, device: torch.device) -> Run:
    maps = tuple(_maps(case, device))
    query, key = (F.normalize(x.flatten(2).double(), dim=1) for x in maps)
    similarity = query.mT @ key

    def run(backend: Any, images: slice = slice(None)) -> dict[str, Tensor]:
        """Score and validity of every match, and how similar the two are in float64."""
        exact = backend == "exact"
        query, key = (x[images].double() if exact else x[images] for x in maps)
        mutual, backend = "mutual" in case.options, "eager" if exact else backend
        match = dense_correspondence(query, key, mutual=mutual, backend=backend)
        chosen = similarity[images].gather(2, match.index[..., None])
        return {"score": match.score, "match": chosen, "valid": match.valid}

    return run


def _time(run: Callable[[], object]) -> str:
    try:
        return f"{Timer('run()', globals={'run': run}).blocked_autorange(min_run_time=0.5).median * 1e3:.2f} ms"
    except torch.OutOfMemoryError:
        return "out of memory"


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
        toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found |= {"device": torch.cuda.get_device_name(device), "toolkit": toolkit}
        found |= _triton.describe(device)._asdict()
    return found


def _line(*cells: str) -> str:
    return "{:72} {:>8} {:>25} {:>25}  {}".format(*cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m densecl_ops.selftest", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--small", action="store_true", help="leave out the real sizes")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = _backends.triton_obstacle(torch.empty(0, device=device), torch.float32)
    backend: BackendName = "blockwise" if obstacle else "triton"
    about = environment(device, backend) | ({"no kernels since": obstacle} if obstacle else {})
    for name, value in about.items():
        print(f"{name:16} {value}")
    print("\n" + _line("", "error", backend, "eager", ""))
    rows = []
    for case in cases(not options.small, images=256 if device.type == "cuda" else FEW_IMAGES):
        row = check(case, backend, device)
        rows.append(row)
        worst = max(row["errors"].values(), default=math.nan)
        verdict = f"FAILED: {row['failed']}" if "failed" in row else "ok"
        print(_line(row["case"], f"{worst:.1e}", row.get("ours", ""), row.get("eager", ""), verdict), flush=True)
        if options.json:  # after every check: what ends the process early loses one
            options.json.write_text(json.dumps({"environment": about, "checks": rows}, indent=1) + "\n")
    failures = sum("failed" in row for row in rows)
    print(f"\n{len(rows)} checks, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
