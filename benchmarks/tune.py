"""Times other tiles for attend_kernel on this GPU, beside the row of the table that they would replace.

A run changes nothing: whoever finds a better row writes it into densecl_ops/info_nce/triton_plan.py, with the number,
and runs the tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.records import OURS, Shape, Suite
from benchmarks.rivals import Inputs, Loss
from densecl_ops.info_nce import triton_plan
from densecl_ops.info_nce.triton_plan import Config

# What compiles for sm_90 without spills (bfloat16, D = 128) and can win: two or three programs a multiprocessor let the
# exponentials of one overlap the products of another. The most likely first.
CANDIDATES = (
    Config(64, 128, 4, 3, 2),
    Config(64, 128, 4, 3, 2, descriptor=True),
    Config(64, 64, 4, 3, 3),
)


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    dtype = "float32" if arguments.toy else "bfloat16"
    for n, k, d in [(33, 100, 16)] if arguments.toy else [(12544, 65536, 128), (1568, 65536, 128)]:
        yield {"n": n, "k": k, "d": d, "dtype": dtype, "mode": "train", "cache": "warm"}


def with_tile(config: Config, inputs: Inputs) -> Tensor:
    with mock.patch.object(triton_plan, "choose", return_value=config):
        return loss.ours(inputs, "triton")


def contestants(device: torch.device, dtype: torch.dtype) -> dict[str, Loss]:
    tried = {str(tuple(config)): partial(with_tile, config) for config in CANDIDATES}
    return {OURS: partial(loss.ours, backend="triton"), **tried}


SUITE = Suite("tune", loss.TITLE, shapes, partial(loss.measure, losses=contestants))
