#!/bin/bash
# torchvision 0.29.1 with torch 2.14.1, CPU: roi_align in float16 adds up the samples of a bin in float16, where mean and
# adaptive_avg_pool2d of the same numbers keep the sum in float32. The sum of ones stops at 2,048, so that the mean over a box of 64 x 64
# positions is 0.5, and over 224 x 224 it is 0.04. Positive features (|normal|) of 64 x 64 lose 9 % of their mean, without one that is
# large. sampling_ratio=2, which takes four samples of a bin, is right there. Under autocast the operator runs in float32.
# The guess was: sums in float32, as in every pooling of torch itself.
# Output seen: mean of ones over 32 x 32: 1.0, 64 x 64: 0.5, 224 x 224: 0.041; features 64 x 64: -8.6%; sampling_ratio=2: 1.0; adaptive_avg_pool2d: 1.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align


def over_all(x, **options):
    box = torch.tensor([[0, 0, 0, x.shape[3], x.shape[2]]], dtype=x.dtype)
    return roi_align(x, box, output_size=1, aligned=True, **options)


ones = {side: torch.ones(1, 1, side, side, dtype=torch.float16) for side in (32, 64, 224)}
means = {side: over_all(x).item() for side, x in ones.items()}
few, pooled = over_all(ones[224], sampling_ratio=2).item(), F.adaptive_avg_pool2d(ones[224], 1).item()
torch.manual_seed(0)
features = torch.randn(1, 64, 64, 64).abs().half()
exact = over_all(features.float())
bias = float((over_all(features).float() / exact - 1).mean())
shown = ", ".join(f"{side} x {side}: {round(mean, 3)}" for side, mean in means.items())
print(f"mean of ones over {shown}; features 64 x 64: {bias:.1%}; sampling_ratio=2: {few}; adaptive_avg_pool2d: {pooled}")
assert means[32] == 1 and means[64] == 0.5 and means[224] < 0.05 and bias < -0.02 and few == pooled == 1
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore case.py
