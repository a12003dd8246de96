"""What the compiler makes of every Triton kernel, for GPUs that need not be here: registers, spills, shared memory.

The launchers of the package run on meta tensors, with the target in the place of the device. Triton's just-in-time
compiler then specialises and compiles as it would there, and launches nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import tune
from benchmarks.measure import Row
from benchmarks.records import RESULTS, table, write

TARGETS = {  # architecture: (multiprocessors, shared memory per block in bytes)
    "sm_80": (108, 166_912),
    "sm_86": (84, 101_376),
    "sm_89": (128, 101_376),
    "sm_90": (132, 232_448),
    "sm_100": (148, 232_448),
    "sm_103": (148, 232_448),
    "sm_120": (170, 101_376),
    "sm_121": (48, 101_376),
    "gfx90a": (104, 65_536),
    "gfx942": (304, 65_536),
    "gfx950": (256, 163_840),
}
COPY_INSTRUCTIONS = {"LDGSTS": "cp.async", "UTMALDG": "tma"}
MATRIX_INSTRUCTIONS = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "HMMA": "mma", "v_mfma": "mfma", "UTCQMMA": "tcgen05"}


# Names in a variant: the tuner's first two candidates, in place of the table's row.
TUNED = {"pointers": tune.CANDIDATES[0], "descriptor": tune.CANDIDATES[1]}


class Case(NamedTuple):
    """One kernel as one call would launch it."""

    target: str
    kernel: str
    dtype: str
    channels: int
    variant: str


KEPT = ("registers", "spills", "shared", "instructions")
# Kernel, dtype, channels, variant: what `--record` keeps, to compare versions of Triton by.
RECORDED = (
    ("attend_kernel", "bfloat16", 128, "no shift"),
    ("attend_kernel", "bfloat16", 128, "running max, rank, exclude"),
    ("attend_kernel", "float32", 128, "no shift"),
    ("grad_negatives_kernel", "bfloat16", 128, "exclude"),
    ("match_kernel", "bfloat16", 2048, "7x7 mutual"),
    ("match_kernel", "bfloat16", 2048, "14x14"),
)


def stand_in(name: str) -> Any:
    """In the place of Triton's driver on a machine with the target.

    Each target has a device number of its own, since Triton keeps binders by device.
    """
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)
    return SimpleNamespace(
        get_current_device=lambda: list(TARGETS).index(name),
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


def compile_case(case: Case) -> Row:
    """What came out; `error` says why if nothing did."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from densecl_ops import _triton
    from densecl_ops.info_nce import triton_plan

    caught: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if self.__name__ == case.kernel:
            caught.append((run(self, *args, grid=grid, warmup=True, **options), options))

    device = _triton.Device(case.target, TARGETS[case.target][0])
    driver.set_active(stand_in(case.target))
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        patches.enter_context(mock.patch.object(_triton, "describe", return_value=device))
        for form, row in TUNED.items():
            if form in case.variant:
                patches.enter_context(mock.patch.object(triton_plan, "choose", return_value=row))
        try:
            LAUNCHES[case.kernel](case)
            compiled, options = caught[0]
            assert options["enable_fp_fusion"], "where a launch does not say, Triton 3.9 warns and 3.10 does not fuse"
        except Exception as error:  # a report, not a crash: the table shows it
            return {"case": case._asdict(), "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    blocks = "x".join(str(options[name]) for name in ("BLOCK_N", "BLOCK_K", "BLOCK_P", "BLOCK_D") if name in options)
    config = f"{blocks} w{options.get('num_warps', 4)} s{options.get('num_stages', '-')}"
    return {"case": case._asdict(), "config": config, **read(case.target, compiled), "error": ""}


def read(target: str, compiled: Any) -> dict[str, Any]:
    """Registers, memory, instructions, and what is wrong with them.

    Kept in build/kernels by Triton's hash of source, arguments, options and compiler, and by this file.
    """
    key = hashlib.sha256(compiled.hash.encode() + Path(__file__).read_bytes()).hexdigest()
    path = Path(__file__).parent.parent / "build" / "kernels" / f"{key}.json"
    if not path.exists():
        found = (_read_amd if target.startswith("gfx") else _read_nvidia)(target, compiled)
        found |= {"shared": compiled.metadata.shared, "narrow": reduces_narrowly(compiled.asm["ttir"])}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:  # other processes read meanwhile
            json.dump(found, file)
        Path(file.name).replace(path)
    return dict(json.loads(path.read_text()))


def reduces_narrowly(ttir: str) -> bool:
    """Whether a reduction takes 16-bit floats: tl.sum of a bfloat16 tile adds in bfloat16."""
    reductions = re.findall(r'"tt\.reduce".*?\}\) : \((.*?)\) ->', ttir, re.S)
    return any(re.search(r"x(bf16|f16)>", operands) for operands in reductions)


def overwrites(ttgir: str) -> bool:
    """Whether a loop copies a tile into a buffer that a wgmma in flight still reads.

    A loop that copies n tiles ahead fills buffer (i + n) mod B in its step i, while products of step i and of the one
    before may be in flight. The steps are played in the order of the text.
    """
    view_of = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir))
    buffers = {x: int(n) for x, n in re.findall(r"(%\w+) = ttg\.local_alloc : .*?memdesc<(\d+)x\d+x\d+x", ttgir)}

    def base(view: str) -> str:
        return base(view_of[view]) if view in view_of else view

    events = re.compile(
        r"async_(?:copy_global_to_local %\w+,|tma_copy_global_to_local %\w+\[.*?\]) (?P<copy>%\w+)"
        r"|warp_group_dot (?P<left>%\w+), (?P<right>%\w+)|warp_group_dot_wait .*?pendings = (?P<pending>\d+)"
    )
    copied = [base(event["copy"]) for event in events.finditer(ttgir) if event["copy"]]
    for body in re.findall(r"scf\.for((?:(?!scf\.for).)*?)scf\.yield", ttgir, re.S):
        in_flight: list[tuple[int, set[str]]] = []
        for step in range(4):
            for event in events.finditer(body):
                if event["pending"] is not None:
                    in_flight = in_flight[max(0, len(in_flight) - int(event["pending"])) :]
                elif event["left"]:
                    in_flight.append((step, {base(event["left"]), base(event["right"])}))
                elif (to := base(event["copy"])) in buffers:
                    ahead = copied.count(to) - 1
                    if any(to in read and (step + ahead - at) % buffers[to] == 0 for at, read in in_flight):
                        return True
    return False


def _read_nvidia(target: str, compiled: Any) -> dict[str, Any]:
    import triton

    assembly = compiled.asm["sass"]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newest = int(target[3:]) >= 100 or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)  # PTX 8.8 and later
    ptxas = folder / ("ptxas-blackwell" if newest else "ptxas")
    suffix = "a" if int(target[3:]) >= 90 else ""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [str(ptxas), "-v", f"--gpu-name={target}{suffix}", str(source), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [label for mark, label in MATRIX_INSTRUCTIONS.items() if re.search(rf"\b{mark}", assembly)]
    return {
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "instructions": assembly.count(";"),
        "matrix": found[0] if found else "none",
        "copies": "+".join(label for mark, label in COPY_INSTRUCTIONS.items() if mark in assembly),
        "serialised": "C751" in report,
        "racing": overwrites(compiled.asm["ttgir"]),
    }


def _read_amd(target: str, compiled: Any) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]
    fields = {key: int(value) for key, value in re.findall(r"\.([sv]gpr\w*count):\s+(\d+)", assembly)}
    spills = fields["vgpr_spill_count"] + fields["sgpr_spill_count"]
    instructions = len(re.findall(r"^\t[a-z]+_\w+", assembly, re.M))
    found = {"registers": fields["vgpr_count"], "spills": spills, "instructions": instructions}
    matrix = "mfma" if "v_mfma" in assembly else "none"
    return found | {"matrix": matrix, "copies": "", "serialised": False, "racing": False}


def _problem(case: Case) -> Any:
    from densecl_ops.info_nce.problem import Problem

    dtype, channels = getattr(torch, case.dtype), case.channels
    batch, positions, size = (1, 1, 1) if "size 1" in case.variant else (32, 49, 65536)
    if "vectors" in case.variant:
        positions = 1

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def unaligned(x: torch.Tensor) -> torch.Tensor:
        if "unaligned" not in case.variant:
            return x
        return empty(1 + x.numel(), dtype=x.dtype)[1:].view(x.shape)

    def projections() -> torch.Tensor:
        if "tokens" in case.variant:  # channels_last maps and token sequences
            return empty(batch, positions, channels).transpose(1, 2)
        return unaligned(empty(batch, channels, positions))

    negatives = empty(size, channels, dtype=torch.float32 if "autocast" in case.variant else dtype)
    if "columns" in case.variant:
        negatives = empty(channels, size).t()
    elif "slice" in case.variant:
        negatives = empty(size, channels + 8)[:, 8:]
    return Problem(
        query=projections(),
        key=projections(),
        negatives=unaligned(negatives),
        scale=None if "learned" in case.variant else 5.0,
        learned_scale=empty(dtype=torch.float32) if "learned" in case.variant else None,
        matches=empty(batch, positions, dtype=torch.int64),
        exclude=empty(batch, dtype=torch.int64) if "exclude" in case.variant else None,
        existing=empty(dtype=torch.int64),
        unit_negatives="running" not in case.variant,
        dtype=torch.float32,
        matmul_dtype=dtype,
    )


def _loss(case: Case) -> None:
    from densecl_ops.info_nce import triton_launch

    problem, rows = _problem(case), torch.empty(32, 49, device="meta")
    if case.kernel == "grad_negatives_kernel":
        triton_launch.grad_negatives(problem, rows, rows)
    elif case.kernel == "grad_key_kernel":
        triton_launch.grad_key(problem.query, problem.key, problem.matches, rows, torch.float32)
    else:
        triton_launch.forward(problem, "forward" not in case.variant, "rank" in case.variant)


def _match(case: Case) -> None:
    """7x7 maps are one tile, larger ones many. 14x14 positions are no multiple of 16 bytes."""
    from densecl_ops.correspondence import triton_launch

    side = int(case.variant.split("x")[0])
    layout = torch.channels_last if "channels_last" in case.variant else torch.contiguous_format
    maps = torch.empty(32, case.channels, side, side, dtype=getattr(torch, case.dtype), device="meta")
    features = maps.to(memory_format=layout).flatten(2)
    triton_launch.match(features, features, "mutual" in case.variant)


LAUNCHES: dict[str, Callable[[Case], None]] = {
    "match_kernel": _match,
    "inverse_norm_kernel": _match,
    "prepare_kernel": _loss,
    "attend_kernel": _loss,
    "combine_kernel": _loss,
    "grad_negatives_kernel": _loss,
    "grad_key_kernel": _loss,
}


BOTH, BFLOAT16 = ("bfloat16", "float32"), ("bfloat16",)
LAYOUTS = ("", "tokens", "learned", "unaligned", "vectors", "size 1")
# Every row of the configuration tables, and the variants of the kernels that change their loops.
CASES: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[str, ...]], ...] = (
    ("attend_kernel", BOTH, (64, 128, 256, 512), ("no shift", "running max, rank, exclude")),
    ("grad_negatives_kernel", BOTH, (64, 128, 256, 512), ("exclude",)),
    ("attend_kernel", BFLOAT16, (128,), ("forward only", "running max", "rank")),
    ("attend_kernel", BFLOAT16, (128,), ("unaligned", "vectors, exclude", "size 1")),
    ("attend_kernel", BFLOAT16, (128, 512), ("autocast", "columns", "slice")),  # a copy as good as a queue of its own
    ("attend_kernel", ("float16",), (128,), ("running max",)),
    ("attend_kernel", BFLOAT16, (100,), ("no shift",)),
    ("prepare_kernel", BFLOAT16, (128,), LAYOUTS),
    ("combine_kernel", BFLOAT16, (128,), tuple(f"running max, rank, {variant}" for variant in LAYOUTS)),
    ("combine_kernel", ("float32",), (512,), ("running max, rank",)),
    ("grad_key_kernel", BFLOAT16, (128, 512), ("",)),
    ("match_kernel", BOTH, (2048,), ("7x7 mutual", "7x7 mutual channels_last", "8x8 mutual", "14x14")),
    ("match_kernel", BOTH, (2048,), ("56x56", "56x56 channels_last")),
    ("inverse_norm_kernel", BFLOAT16, (256,), ("56x56",)),
)
FORMS = ("no shift", "forward only", "running max", "rank", "vectors, exclude", "running max, rank, exclude")


def cases(targets: list[str]) -> Iterator[Case]:
    for target in targets:
        for kernel, dtypes, widths, variants in CASES:
            for dtype, channels, variant in itertools.product(dtypes, widths, variants):
                yield Case(target, kernel, dtype, channels, variant)
        if target in ("sm_90", "sm_100", "sm_103"):
            for form, variant in itertools.product(TUNED, FORMS):
                yield Case(target, "attend_kernel", "bfloat16", 128, f"{form}, {variant}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--record", action="store_true", help="keep some of them, to compare versions of Triton by")


def main(arguments: argparse.Namespace) -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        wanted = [case for case in cases(arguments.target) if case[1:] in RECORDED or not arguments.record]
        rows = list(pool.map(compile_case, wanted))
    heads = (*Case._fields, "config", *KEPT, "matrix", "copies", "")
    lines = []
    for row in rows:
        flags = " ".join(name.upper() for name in ("serialised", "racing", "narrow") if row.get(name))
        found = [str(row.get(name, "")) for name in heads[len(Case._fields) : -1]]
        lines.append([*map(str, row["case"].values()), *found, row["error"] or flags])
    print(table(heads, lines))
    if arguments.json:
        write(arguments.json, rows)
    if arguments.record:
        import triton

        record = [row["case"] | {name: row[name] for name in KEPT} for row in rows]
        write(RESULTS / "kernels" / f"triton_{triton.__version__}.json", record)
