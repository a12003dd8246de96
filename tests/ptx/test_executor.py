"""The executor itself: numbers that it must compute, and faults that it must see, in PTX written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.executor import FaultError, Launch, execute
from ptx.program import Program

HEAD = """.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
{
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mul.wide.s32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	shl.b32 %r3, %r1, 2;
"""


def launch(body: str, out: torch.Tensor, grid: int = 1, warps: int = 1, shared: int = 256) -> Launch:
    program = Program(HEAD + "".join(f"\t{line};\n" for line in [*body.split("; "), "ret"]) + "}\n")
    span = ("out", out.data_ptr(), out.data_ptr() + 4 * out.numel(), True)
    return execute(program, [out.data_ptr()], (grid,), warps, shared, [span], [])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shl.b32 %r4, %r1, 3; st.global.b32 [%rd3], %r4", lambda lane: lane * 8),
        ("setp.lt.s32 %p1, %r1, 5; selp.b32 %r4, 1, 2, %p1; st.global.b32 [%rd3], %r4", lambda lane: 2 - (lane < 5)),
        ("shfl.sync.bfly.b32 %r4, %r1, 3, 31, -1; st.global.b32 [%rd3], %r4", lambda lane: lane ^ 3),
        ("bfe.u32 %r4, %r1, 1, 2; st.global.b32 [%rd3], %r4", lambda lane: lane >> 1 & 3),
        ("prmt.b32 %r4, %r1, 0, 0x4404; st.global.b32 [%rd3], %r4", lambda lane: lane << 8),
    ],
)
def test_numbers(body: str, expected: object) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    seen = launch(body, out)
    np.testing.assert_array_equal(out.numpy(), expected(np.arange(32)))
    assert seen.stats[-2].tolist()[:4] == [1, 32, 4, 128]  # the store: once, 32 lanes, 4 sectors, 128 bytes


SHARED = "add.s32 %r4, %r3, 1024; "


@pytest.mark.parametrize(
    ("body", "message", "options"),
    [
        ("st.global.b32 [%rd3 + 4], %r1", "store of 4 bytes outside every tensor: 4 bytes past the end", {}),
        ("st.global.b32 [%rd3 + 2], %r1", "misaligned global store", {}),
        ("st.global.b32 [%rd3], %r1", "which program 0 wrote too", {"grid": 2}),
        (SHARED + "st.shared.b32 [%r4], %r1", "outside 64 bytes", {"shared": 64}),
        ("mov.b32 %r4, 1024; st.shared.b32 [%r4], %r1", "which warps 0x1 wrote since", {"warps": 2}),
        (
            SHARED + "st.shared.b32 [%r4], %r1; xor.b32 %r5, %r4, 128; ld.shared.b32 %r6, [%r5]",
            "race: writes shared byte 128, which warps 0x1 read",
            {"warps": 2},
        ),
        (
            SHARED + "cp.async.ca.shared.global [%r4], [%rd3], 4; ld.shared.b32 %r5, [%r4]",
            "before the copy into it was waited for",
            {},
        ),
    ],
)
def test_faults(body: str, message: str, options: dict[str, int]) -> None:
    with pytest.raises(FaultError, match=message):
        launch(body, torch.zeros(32, dtype=torch.int32), **options)


def test_what_is_not_known_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="sin"):
        launch("sin.approx.f32 %r4, %r1", torch.zeros(32, dtype=torch.int32))
