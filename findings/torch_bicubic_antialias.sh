#!/bin/bash
# torch 2.13.0 (2.14.1 alike): antialias=True of F.interpolate(mode="bicubic") changes the result where nothing is reduced, too. It takes
# another cubic: Pillow's (a = -0.5), where without it OpenCV's (a = -0.75) is taken. transformers 5.24.0 resamples a ViT's position
# embeddings without it, and timm 1.0.31 with it: one file of weights, at any grid but its own, is two networks. Embeddings of 14 x 14
# tokens made of white noise differ by 9 % of their length at 16 x 16, and by their whole length at 7 x 7. (timm needs torchvision, and
# so was tried by hand: its resample_abs_pos_embed equals antialias=True at six grids.)
# The guess was: equal but for rounding where the grid grows, since there is nothing to smooth.
# Output seen: 14 -> 16: 8.7% (antialias=True is Pillow, False is OpenCV and transformers), 14 -> 7: 101.3%
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 pillow==13.0.0 opencv-python-headless==5.0.0.93
cd "$dir"
cat > case.py <<'PY'
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ViTConfig, ViTModel

WIDTH, GRID = 32, 14
torch.manual_seed(0)
noise = torch.randn(1, 1 + GRID * GRID, WIDTH)  # a class token, and the patches
grid = noise[:, 1:].transpose(1, 2).view(1, WIDTH, GRID, GRID)
model = ViTModel(ViTConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=WIDTH))
model.embeddings.position_embeddings.data.copy_(noise)


def resized(side, antialias):
    return F.interpolate(grid, size=(side, side), mode="bicubic", antialias=antialias)[0]


def by_transformers(side):
    rows = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + side * side, WIDTH), 16 * side, 16 * side)
    return rows[0, 1:].detach().t().reshape(WIDTH, side, side)


def each_channel(resize):
    return torch.from_numpy(np.stack([resize(channel.numpy()) for channel in grid[0]]))


pillow = each_channel(lambda channel: np.asarray(Image.fromarray(channel).resize((16, 16), Image.Resampling.BICUBIC)))
opencv = each_channel(lambda channel: cv2.resize(channel, (16, 16), interpolation=cv2.INTER_CUBIC))
for same, other in ((True, pillow), (False, opencv), (False, by_transformers(16))):
    torch.testing.assert_close(resized(16, same), other, rtol=0, atol=1e-4)
torch.testing.assert_close(resized(7, False), by_transformers(7), rtol=0, atol=1e-4)
larger, smaller = (float((resized(side, True) - resized(side, False)).norm() / resized(side, True).norm()) for side in (16, 7))
print(f"14 -> 16: {larger:.1%} (antialias=True is Pillow, False is OpenCV and transformers), 14 -> 7: {smaller:.1%}")
assert 0.08 < larger < 0.1 and 0.9 < smaller < 1.1, (larger, smaller)
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore case.py
