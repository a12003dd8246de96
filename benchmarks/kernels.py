"""What the compiler makes of every Triton kernel, for GPUs that need not be here: registers, spills, shared memory.

Public calls run on CPU tensors, with the target in the place of the device. Triton's just-in-time compiler then
specialises and compiles the kernel in question as it would there, and nothing is launched.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from benchmarks.loss import CANDIDATES
from benchmarks.measure import Row
from benchmarks.records import RESULTS, print_rows, write
from densecl_ops import _backends, _triton
from densecl_ops.functional import dense_correspondence, dense_info_nce
from densecl_ops.info_nce import triton_plan

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
MATRIX_INSTRUCTIONS = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "HMMA": "mma", "UTCQMMA": "tcgen05", "v_mfma": "mfma"}
# Names in a variant: the first two candidates for the table, in place of its row.
TUNED = {"pointers": CANDIDATES[0], "descriptor": CANDIDATES[1]}


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
    ("attend_kernel", "bfloat16", 128, "rank"),
    ("attend_kernel", "bfloat16", 128, "running max, rank, exclude"),
    ("attend_kernel", "float32", 128, "no shift"),
    ("grad_negatives_kernel", "bfloat16", 128, "exclude"),
    ("match_kernel", "bfloat16", 2048, "7x7 mutual"),
    ("match_kernel", "bfloat16", 2048, "14x14"),
)


class Compiled(BaseException):
    """The kernel of the case, and the options of its launch: nothing after it is of interest."""


@contextmanager
def in_place_of(target: str, run: Callable[..., Any]) -> Iterator[None]:
    """The library takes the CPU for a device of this architecture, where launching a kernel is to call `run`.

    Each target has a device number of its own, since Triton keeps binders by device.
    """
    family = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    stand_in = SimpleNamespace(
        get_current_device=lambda: list(TARGETS).index(target),
        get_current_stream=lambda device: 0,
        get_current_target=lambda: family,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    with (
        mock.patch.object(driver, "_active", stand_in),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(_triton, "describe", return_value=_triton.Device(target, TARGETS[target][0])),
        mock.patch.object(_backends, "KERNEL_DEVICES", ("cuda", "cpu")),
    ):
        yield


def compile_case(case: Case) -> Row:
    """What came out; `error` says why if nothing did."""
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if self.__name__ == case.kernel:
            raise Compiled(compile_only(self, *args, grid=grid, warmup=True, **options), options)

    row = next((row for form, row in TUNED.items() if form in case.variant), None)
    chosen = mock.patch.object(triton_plan, "choose", return_value=row) if row else nullcontext()
    try:
        with in_place_of(case.target, run), chosen:
            call(case)
        raise RuntimeError("not launched")
    except Compiled as found:
        compiled, options = found.args
        assert options["enable_fp_fusion"], "where a launch does not say, Triton 3.9 warns and 3.10 does not fuse"
    except Exception as error:  # a report, not a crash: the table shows it
        return {"case": case._asdict(), "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    blocks = "x".join(str(options[name]) for name in ("BLOCK_N", "BLOCK_K", "BLOCK_P", "BLOCK_D") if name in options)
    config = f"{blocks} w{options.get('num_warps', 4)} s{options.get('num_stages', '-')}"
    return {"case": case._asdict(), "config": config, **read(case.target, compiled), "error": ""}


def call(case: Case) -> None:
    """The call of a user that launches the kernel."""
    dtype, channels, has = getattr(torch, case.dtype), case.channels, case.variant.__contains__
    if found := re.match(r"(\d+)x\1", case.variant):
        layout = torch.channels_last if has("channels_last") else torch.contiguous_format
        maps = torch.zeros(32, channels, *map(int, (found[1], found[1])), dtype=dtype).to(memory_format=layout)
        dense_correspondence(maps, maps, mutual=has("mutual"), backend="triton")
        return
    batch, positions, size = (1, 1, 1) if has("size 1") else (32, 1 if has("vectors") else 49, 65536)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        start = int(has("unaligned"))
        return torch.zeros(start + math.prod(shape), dtype=dtype)[start:].view(shape)

    def projections() -> torch.Tensor:
        if has("tokens"):  # channels_last maps and token sequences
            return zeros(batch, positions, channels).mT
        return zeros(batch, channels, positions)

    rows = zeros(size, channels, dtype=torch.float32 if has("autocast") else dtype)
    if has("columns"):
        rows = zeros(channels, size).t()
    elif has("slice"):
        rows = zeros(size, channels + 8)[:, 8:]
    rows.requires_grad_(case.kernel == "grad_negatives_kernel")
    unit = case.kernel == "attend_kernel" and not has("running")
    queue = SimpleNamespace(rows=rows, count=torch.tensor(size - 1), unit_rows=unit)  # a full one's is known on a CPU
    with torch.autocast("cpu", torch.bfloat16, enabled=has("autocast")):
        loss = dense_info_nce(
            projections().requires_grad_(not has("forward")),
            projections().requires_grad_(case.kernel == "grad_key_kernel"),
            queue,
            torch.zeros(batch, positions, dtype=torch.int64),
            temperature=torch.tensor(0.2) if has("learned") else 0.2,
            exclude=torch.zeros(batch, dtype=torch.int64) if has("exclude") else None,
            return_rank=has("rank"),
            backend="triton",
        )
    torch.autograd.backward(loss)


def read(target: str, compiled: Any) -> dict[str, Any]:
    """Registers, memory, instructions, and what is wrong with them; kept in Triton's cache beside the binary."""
    key = hashlib.sha256(compiled.hash.encode() + Path(__file__).read_bytes()).hexdigest()
    cache = get_cache_manager(key)
    path = cache.get_file("facts.json")
    if path is not None:
        return dict(json.loads(Path(path).read_text()))
    report, assembly = "", compiled.asm["amdgcn" if target.startswith("gfx") else "sass"]
    if target.startswith("gfx"):
        fields = {key: int(value) for key, value in re.findall(r"\.([sv]gpr\w*count):\s+(\d+)", assembly)}
        registers, spills = fields["vgpr_count"], fields["vgpr_spill_count"] + fields["sgpr_spill_count"]
        instructions = len(re.findall(r"^\t[a-z]+_\w+", assembly, re.M))
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
            source.write(compiled.asm["ptx"])
            source.flush()
            number = int(target[3:])
            name = f"--gpu-name={sm_arch_from_capability(number)}"
            command = [get_ptxas(number).path, "-v", name, source.name, "-o", os.devnull]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = int(re.findall(r"Used (\d+) registers", report)[0])
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
        instructions = assembly.count(";")
    reduced = re.findall(r'"tt\.reduce".*?\}\) : \((.*?)\) ->', compiled.asm["ttir"], re.S)
    found = {
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "instructions": instructions,
        "matrix": next((x for mark, x in MATRIX_INSTRUCTIONS.items() if re.search(rf"\b{mark}", assembly)), "none"),
        "copies": "+".join(label for mark, label in COPY_INSTRUCTIONS.items() if mark in assembly),
        "serialised": "C751" in report,
        "racing": overwrites(compiled.asm["ttgir"]),
        "narrow": any(re.search(r"x(bf16|f16)>", operands) for operands in reduced),  # tl.sum adds in its tile's dtype
    }
    cache.put(json.dumps(found), "facts.json", binary=False)
    return found


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


BOTH, BFLOAT16 = ("bfloat16", "float32"), ("bfloat16",)
FORMS = ("no shift", "running max, rank, exclude")
LOOPS = ("forward only", "running max", "rank")
LAYOUTS = ("", "tokens", "learned", "unaligned", "vectors", "size 1")
# Every row of the configuration tables, and the variants of the kernels that change their loops.
CASES: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[str, ...]], ...] = (
    ("attend_kernel", BOTH, (64, 128, 256, 512), FORMS),
    ("attend_kernel", BFLOAT16, (64, 128, 256, 512), ("exclude", "rank, exclude")),
    ("grad_negatives_kernel", BOTH, (64, 128, 256, 512), ("exclude",)),
    ("attend_kernel", BFLOAT16, (128,), (*LOOPS, "unaligned", "vectors, exclude", "size 1")),
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


def cases(targets: list[str]) -> Iterator[Case]:
    for target in targets:
        for kernel, dtypes, widths, variants in CASES:
            for dtype, channels, variant in itertools.product(dtypes, widths, variants):
                yield Case(target, kernel, dtype, channels, variant)
        if target in ("sm_90", "sm_100", "sm_103"):
            for form, variant in itertools.product(TUNED, (*FORMS, *LOOPS, "vectors, exclude")):
                yield Case(target, "attend_kernel", "bfloat16", 128, f"{form}, {variant}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--record", action="store_true", help="keep some of them, to compare versions of Triton by")


def main(arguments: argparse.Namespace) -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        wanted = [case for case in cases(arguments.target) if case[1:] in RECORDED or not arguments.record]
        rows = list(pool.map(compile_case, wanted))
    print_rows("", {" ".join(map(str, row["case"].values())): dict([*row.items()][1:]) for row in rows})
    if arguments.json:
        write(arguments.json, rows)
    if arguments.record:
        record = [row["case"] | {name: row[name] for name in KEPT} for row in rows]
        write(RESULTS / "kernels" / f"triton_{triton.__version__}.json", record)
