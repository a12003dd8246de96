#!/bin/bash
# torch 2.13.0 and 2.14.1 on a CPU with AVX-512. OMP_THREAD_LIMIT is a standard variable of OpenMP: a region may then
# have fewer threads than it asked for, as under OMP_DYNAMIC=true on a busy machine. oneDNN shares a bfloat16 product
# out to the threads it asked for, and nobody computes the parts of those that never came: they stay as the memory was,
# without an error. Float32 products (MKL) and convolutions were right.
# Output seen (of 38,416 numbers of a product of 196 x 512 and 512 x 196, how many are never written):
# {'no limit': 0, 'OMP_NUM_THREADS=1': 0, 'OMP_THREAD_LIMIT=1': 13328}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$dir"
cat > product.py <<'PY'
import torch

torch.manual_seed(0)
torch.set_num_threads(2)
a, b = torch.randn(196, 512).bfloat16(), torch.randn(512, 196).bfloat16()
out = torch.full((196, 196), float("nan"), dtype=torch.bfloat16)
torch.mm(a, b, out=out)
there = ~out.isnan()
assert ((out.double() - a.double() @ b.double()).abs()[there] < 1).all()
print(int((~there).sum()))
PY
cat > case.py <<'PY'
import os
import subprocess
import sys

seen = {}
for setting in ("no limit", "OMP_NUM_THREADS=1", "OMP_THREAD_LIMIT=1"):
    extra = dict([setting.split("=")]) if "=" in setting else {}
    seen[setting] = int(subprocess.check_output([sys.executable, "product.py"], env={**os.environ, **extra}))
print(seen)
assert seen["no limit"] == 0 < seen["OMP_THREAD_LIMIT=1"], seen
PY
"$dir/env/bin/python" case.py
