"""Parses the PTX that Triton emits and decodes it for core.cpp. An opcode or a form that is not known is an error."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("core.cpp")
SHARED = 1024  # where shared memory starts; a multiple of 1024, for the swizzles


def build() -> ctypes.CDLL:
    out = Path(tempfile.gettempdir()) / f"ptx_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not out.exists():
        flags = "-O2 -ftree-vectorize -march=native -ffp-contract=off -fno-strict-aliasing -shared -fPIC -std=c++17"
        part = out.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *flags.split(), "-o", str(part), str(SOURCE)], check=True)
        part.replace(out)
    return ctypes.CDLL(str(out))


_OPCODES = re.search(r"//OPS(.*?)//END", SOURCE.read_text(), re.S)
assert _OPCODES is not None
CODES = {name: i for i, name in enumerate(re.findall(r"\w+", _OPCODES[1]))}
ALIASES = {  # PTX opcodes that do what another does; else ours has the same name, with _ for a point
    "and.b16": "AND_B32", "or.b16": "OR_B32", "shr.u16": "SHR_U32", "selp.b16": "SELP_B32", "selp.f32": "SELP_B32",
    "cvt.u32.u16": "MOV_32", "max.NaN.f32": "MAX_F32", "min.NaN.f32": "MIN_F32",
}  # fmt: skip
WIDE_OPERANDS = {  # bits of each operand where they are not all those of the opcode's last type
    "MUL_WIDE_S32": (64, 32, 32), "MUL_WIDE_U32": (64, 32, 32), "MAD_WIDE_S32": (64, 32, 32, 64),
    "MAD_WIDE_U32": (64, 32, 32, 64), "SHL_B64": (64, 64, 32), "SHR_U64": (64, 64, 32), "SHR_S64": (64, 64, 32),
    "SELP_B32": (32, 32, 32, 1), "SELP_B64": (64, 64, 64, 1), "CVT_S64_S32": (64, 32), "CVT_U64_U32": (64, 32),
    "CVT_U64_U16": (64, 16), "CVT_U32_U64": (32, 64),
}  # fmt: skip
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
COMPARED = {
    "f32": "F32", "s32": "S32", "u32": "U32", "b32": "U32", "s64": "S64", "u64": "U64", "b64": "U64", "b16": "U32",
    "u16": "U32",
}  # fmt: skip
ELEMENTS = {"bf16": 0, "f16": 1, "tf32": 2}


def split(text: str) -> list[str]:
    out, depth, part = [], 0, ""
    for c in text:
        depth += c in "{["
        depth -= c in "}]"
        if c == "," and not depth:
            out.append(part.strip())
            part = ""
        else:
            part += c
    return [*out, part.strip()] if part.strip() else out


class Program:
    """One kernel, decoded."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.name = re.search(r"\.entry (\w+)", text).group(1)
        head, body = re.search(r"\.entry \w+\((.*?)\n\)(.*)", text, re.S).groups()
        self.params = re.findall(r"\.param (?:\.align \d+ )?\.(\w+) .*?(\w+_param_\d+)(?:\[\d+\])?", head)
        self.slots: dict[object, int] = {}
        self.size = 0
        self.constants: list[tuple[int, int, int]] = []  # slot, bits, value
        self.from_params: list[tuple[int, str, str]] = []  # slot, parameter, type
        self.ops: list[tuple[int, ...]] = []
        self.operands: list[int] = []
        self.names: list[str] = []
        self.places: list[str] = []
        self.sources: list[str] = []
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.spec = [self.slot(f"%{x}", 32) for x in ("tid.x", "ctaid.x", "ctaid.y", "ctaid.z")]
        self._parse(body)
        for at, label in self.jumps:
            op = list(self.ops[at])
            op[1] = self.labels[label]
            self.ops[at] = tuple(op)

    def slot(self, key: object, bits: int) -> int:
        if key not in self.slots:
            self.slots[key] = self.size
            self.size += 2 if bits == 64 else 1
        return self.slots[key]

    def register(self, name: str) -> int:
        return self.slot(name, 64 if name.startswith("%rd") else 32)

    def value(self, text: str, bits: int) -> int:
        """The slot of a source operand."""
        if text in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z"):
            return self.slots[text]
        if re.fullmatch(r"%(p|r|rs|rd|f|fd)\d+|complete", text):
            wide = text.startswith("%rd")
            if wide != (bits == 64):
                raise NotImplementedError(f"{text} as {bits} bits")
            return self.register(text)
        if text == "global_smem":
            number = SHARED
        elif re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
            number = int(text[2:], 16)
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            number = int(text, 0)
            if bits == 1:
                number = -1 if number else 0
        else:
            raise NotImplementedError(f"operand {text}")
        width = {1: 32, 16: 16}.get(bits, bits)
        number &= (1 << width) - 1
        key = ("constant", number, bits == 64)
        if key not in self.slots:
            self.constants.append((self.slot(key, bits), 64 if bits == 64 else 32, number))
        return self.slots[key]

    def emit(self, code: str, operands: list[int], a: int = 0, b: int = 0, c: int = 0, nd: int = 0) -> None:
        self.ops.append((CODES[code], a, b, c, *self.guard, len(self.operands), nd))
        self.operands += operands
        self.names.append(self.opcode)
        self.places.append(self.place)
        self.sources.append(self.statement)

    def _parse(self, body: str) -> None:
        body = body[body.index("\n{") + 2 :]
        self.place, blocks = "", 0
        for line in body.split("\n"):
            found = re.match(r"\s*\.loc\s+\d+ \d+ \d+\s*(?:// (.*))?", line)
            if found:
                self.place = found.group(1) or ""
                continue
            line = re.sub(r"//.*", "", line).strip()
            if not line:
                continue
            if line.startswith(("$L__func_end", ".section", ".file")):
                break
            if line.startswith((".reg", ".pragma")):
                continue
            if line in "{}":
                blocks += line == "{"
                continue
            found = re.fullmatch(r"(\$?\w+):", line)
            if found:
                label = found.group(1) if line[0] == "$" else f"{found.group(1)}@{blocks}"
                self.labels[label] = len(self.ops)
                continue
            if not line.endswith(";"):
                raise NotImplementedError(f"line {line}")
            for statement in line[:-1].split(";"):
                self.statement = statement.strip()
                try:
                    self._instruction(self.statement, blocks)
                except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
                    raise NotImplementedError(f"{self.name}: {statement!r}: {error!r}") from error

    def _group(self, text: str, bits: int) -> list[int]:
        inner = text.strip()[1:-1] if text.strip().startswith("{") else text
        return [self.value(x.strip(), bits) for x in inner.split(",")]

    def _address(self, text: str, bits: int) -> tuple[int, int]:
        found = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        return self.value(found.group(1), bits), int(found.group(2) or 0)

    def _instruction(self, statement: str, block: int) -> None:
        found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
        negated, predicate, op, rest = found.groups()
        self.guard = (self.value(predicate, 1), int(bool(negated))) if predicate else (-1, 0)
        if op.startswith(("st.shared::cta", "ld.shared::cta")):  # as triton 3.8 spells it
            op = op.replace("::cta", "")
        self.opcode = op
        args = split(rest)
        parts = op.split(".")
        code = ALIASES.get(op, re.sub(r"[.:]+", "_", op).upper())
        if op in ("bra", "bra.uni"):
            self.jumps.append((len(self.ops), args[0] if args[0][0] == "$" else f"{args[0]}@{block}"))
            self.emit("BRA", [])
        elif code in CODES:  # operands are plain registers or constants
            last = parts[-1]
            bits = 1 if last == "pred" else 64 if last.endswith("64") else 16 if last.endswith("16") else 32
            widths = WIDE_OPERANDS.get(code, (32 if op.startswith("cvt") else bits,) * len(args))
            if op in ("selp.b16", "shl.b16", "shr.u16"):
                widths = (16, 16, 16 if op == "selp.b16" else 32, 1)
            self.emit(code, [self.value(x, w) for x, w in zip(args, widths, strict=False)], a=int("NaN" in op))
            if len(args) > len(widths):
                raise NotImplementedError("operands")
        elif parts[0] == "setp":
            kind = COMPARED[parts[-1]]
            if len(parts) != 3 or len(args) != 3:
                raise NotImplementedError("form of setp")
            bits = 64 if kind.endswith("64") else 16 if parts[-1].endswith("16") else 32
            slots = [self.value(args[0], 1), self.value(args[1], bits), self.value(args[2], bits)]
            self.emit(f"SETP_{kind}", slots, COMPARE.index(parts[1]))
        elif parts[0] == "mov":
            self._mov(parts[1], *args)
        elif op.startswith("ld.param"):
            name = re.fullmatch(r"\[(\w+)\]", args[1]).group(1)
            wide = args[0].startswith("%rd")
            key = ("param", name, parts[2], wide)
            if key not in self.slots:
                self.from_params.append(
                    (self.slot(key, 64 if wide else 32), name, parts[2] + (" wide" if wide else ""))
                )
            self.emit("MOV_64" if wide else "MOV_32", [self.register(args[0]), self.slots[key]])
        elif op == "cvta.param.u64":
            self.emit("MOV_64", [self.value(args[0], 64), self.value(args[1], 64)])
        elif re.fullmatch(r"(ld|st)\.(global|shared)(\.v[24])?\.[bsu](8|16|32|64)", op):
            size = int(parts[-1][1:]) // 8
            space = parts[1].upper()
            count = int(parts[2][1:]) if len(parts) == 4 else 1
            bits = 64 if space == "GLOBAL" else 32
            load = parts[0] == "ld"
            group = args[0] if load else args[1]
            wide = "%rd" in group
            values = self._group(group, 64 if wide or size == 8 else size * 8)
            address, offset = self._address(args[1] if load else args[0], bits)
            if len(values) != count or (not load and wide != (size == 8)):
                raise NotImplementedError("form of ld or st")
            flags = int(wide) + 2 * (parts[-1][0] == "s")
            slots = [*values, address] if load else [address, *values]
            self.emit(f"{parts[0].upper()}_{space}", slots, size, count, offset, flags)
        elif re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", op):
            (shared, off), (source, goff) = self._address(args[0], 32), self._address(args[1], 64)
            slots = [shared, source, self.value(args[3], 32) if len(args) > 3 else -1]
            self.emit("CP_ASYNC", slots, int(args[2], 0), off, goff)
        elif op in ("cp.async.wait_group", "wgmma.wait_group.sync.aligned"):
            self.emit("CP_WAIT" if parts[0] == "cp" else "WG_WAIT", [], int(args[0], 0))
        elif op == "bar.sync":
            if args != ["0"]:
                raise NotImplementedError("a named barrier")
            self.emit("BAR", [])
        elif re.fullmatch(r"shfl\.sync\.(bfly|idx)\.b32", op):
            if "|" in args[0] or args[4] not in ("-1", "0xffffffff"):
                raise NotImplementedError("form of shfl")
            self.emit(f"SHFL_{parts[2].upper()}", [self.value(x, 32) for x in args[:4]])
        elif found := re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", op):
            address, offset = self._address(args[1], 32)
            self.emit("LDMATRIX", [*self._group(args[0], 32), address], int(found[1]), int(bool(found[2])), offset)
        elif found := re.fullmatch(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", op):
            address, offset = self._address(args[0], 32)
            self.emit("STMATRIX", [address, *self._group(args[1], 32)], int(found[1]), int(bool(found[2])), offset)
        elif found := re.fullmatch(r"mma\.sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.(\w+)\.\2\.f32", op):
            if (found[1] == "8") != (found[2] == "tf32"):
                raise NotImplementedError("shape of mma")
            self.emit(f"MMA_{found[2].upper()}", [slot for x in args for slot in self._group(x, 32)])
        elif found := re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.\3", op):
            in_registers = args[1].startswith("{")
            kind, more = ELEMENTS[found[3]], args[4:]
            if more[:2] != ["1", "1"] or (found[2] == "8") != (kind == 2):
                raise NotImplementedError("form of wgmma")
            trans = [int(x) for x in more[2:]]
            trans = [0, *trans] if len(trans) == 1 else trans or [0, 0]
            a = self._group(args[1], 32) if in_registers else [self.value(args[1], 64)]
            slots = [*self._group(args[0], 32), *a, self.value(args[2], 64), self.value(args[3], 1)]
            self.emit("WGMMA", slots, int(found[1]), kind | in_registers << 4 | trans[0] << 5 | trans[1] << 6)
        elif op == "elect.sync":
            register, flag = args[0].split("|")
            self.emit("ELECT", [self.value(register, 32), self.value(flag, 1)])
        elif op.startswith("mbarrier.init.shared::cta"):
            self.emit("MB_INIT", [self._address(args[0], 32)[0], self.value(args[1], 32)])
        elif op.startswith("mbarrier.inval.shared::cta"):
            self.emit("MB_INVAL", [self._address(args[0], 32)[0]])
        elif op.startswith("mbarrier.arrive.expect_tx.shared::cta"):
            self.emit("MB_EXPECT", [self._address(args[1], 32)[0], self.value(args[2], 32)])
        elif op.startswith("mbarrier.try_wait.parity.shared::cta"):
            self.emit("MB_TRY", [self.value(args[0], 1), self._address(args[1], 32)[0], self.value(args[2], 32)])
        elif op.startswith("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"):
            where, coordinates = split(args[1].strip()[1:-1])
            x, y = self._group(coordinates, 32)
            self.emit(
                "TMA_2D", [self._address(args[0], 32)[0], self.value(where, 64), x, y, self._address(args[2], 32)[0]]
            )
        else:
            raise NotImplementedError("opcode")

    def _mov(self, kind: str, to: str, source: str) -> None:
        if to.startswith("{"):
            halves = 64 if kind == "b64" else 32
            names = [x.strip() for x in to[1:-1].split(",")]
            outs = [self.slot("scratch", 32) if x == "_" else self.register(x) for x in names]
            self.emit("UNPACK_32" if halves == 64 else "UNPACK_16", [*outs, self.value(source, halves)])
        elif source.startswith("{"):
            wide = kind == "b64"
            self.emit("PACK_32" if wide else "PACK_16", [self.register(to), *self._group(source, 32 if wide else 16)])
        elif kind in ("b64", "u64"):
            if source.endswith(tuple("0123456789")) and "_param_" in source:  # the address of a tensor map
                key = ("param", source, "map", True)
                if key not in self.slots:
                    self.from_params.append((self.slot(key, 64), source, "map"))
                self.emit("MOV_64", [self.register(to), self.slots[key]])
            else:
                self.emit("MOV_64", [self.register(to), self.value(source, 64)])
        else:
            self.emit("MOV_32", [self.register(to), self.value(source, 16 if kind in ("b16", "u16") else 32)])

    def template(self, arguments: list[object]) -> np.ndarray:
        """The register file a warp starts with: constants and parameters filled in, all else a NaN pattern."""
        file = np.full((self.size, 32), 0xFFFFBAD1, np.uint32)

        def put(slot: int, bits: int, number: int) -> None:
            file[slot] = number & 0xFFFFFFFF
            if bits == 64:
                file[slot : slot + 2].reshape(-1).view(np.uint64)[:] = np.uint64(number & (2**64 - 1))

        for slot, bits, number in self.constants:
            put(slot, bits, number)
        place = {name: i for i, (_, name) in enumerate(self.params)}
        for slot, name, kind in self.from_params:
            value = arguments[place[name]]
            if isinstance(value, float):
                value = struct.unpack("I", struct.pack("f", value))[0]
            if kind.startswith(("b32", "u32")):
                value &= 0xFFFFFFFF
            put(slot, 64 if "wide" in kind or kind == "map" else 32, value)
        return file
