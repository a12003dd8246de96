#!/bin/bash
# torch 2.13.0 (2.14.1 alike), CPU, bfloat16: the gradient of a row that is read n times is a sum of n terms. Which way of reading keeps
# that sum in float32, and which stops at 256, where adding 1 changes nothing in bfloat16, no two of them tell: eagerly x.gather counts
# 3,136 reads (a map of 56 x 56 that matches one key), x[index] and embedding stop at 256, and index_select counts in dimension 0 and stops
# in dimension 1 of the same numbers. Compiled, gather stops at 256 and embedding counts. index_add of the same terms counts, where
# index_put(accumulate=True) stops, and index_reduce("mean") of ones is 0.08. In float16 the stop is at 2,048. A collapsed network, whose
# positions all match one key, is the case where that shows.
# The guess was: all of them in bfloat16, or all in float32, and compiled as eager.
# Output seen: eager gather 3136, index 256, embedding 256, index_select(0) 3136, index_select(1) 256; compiled gather 256, index 256, embedding 3136, index_select(0) 3136, index_select(1) 256; index_add 3136, index_put 256, index_reduce mean 0.0815
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
READS = 3136
index = torch.zeros(READS, dtype=torch.long)
FORMS = {
    "gather": lambda x: x.gather(0, index[:, None].expand(READS, 8)),
    "index": lambda x: x[index],
    "embedding": lambda x: F.embedding(index, x),
    "index_select(0)": lambda x: x.index_select(0, index),
    "index_select(1)": lambda x: x[None].index_select(1, index),
}


def gradient(read):
    x = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    read(x).sum().backward()
    return int(x.grad.max())


def show(forms):
    return ", ".join(f"{name} {value}" for name, value in forms.items())


eager = {name: gradient(read) for name, read in FORMS.items()}
compiled = {}
for name, read in FORMS.items():
    torch.compiler.reset()
    compiled[name] = gradient(torch.compile(read))
zeros, ones = torch.zeros(4, 8, dtype=torch.bfloat16), torch.ones(READS, 8, dtype=torch.bfloat16)
added = int(zeros.index_add(0, index, ones).max())
put = int(zeros.index_put((index,), ones, accumulate=True).max())
mean = float(zeros.index_reduce(0, index, ones, "mean", include_self=False).max())
print(f"eager {show(eager)}; compiled {show(compiled)}; index_add {added}, index_put {put}, index_reduce mean {mean:.4f}")
assert list(eager.values()) == [3136, 256, 256, 3136, 256], eager
assert list(compiled.values()) == [256, 256, 3136, 3136, 256], compiled
assert (added, put) == (3136, 256) and 0.08 < mean < 0.083
PY
"$dir/env/bin/python" -W ignore case.py
