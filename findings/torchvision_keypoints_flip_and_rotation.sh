#!/bin/bash
# torchvision 0.29.1 with torch 2.14.1: transforms.v2 moves KeyPoints by two conventions. Flips count from the centre of a pixel
# (x -> W - 1 - x), rotations, scalings and resizes from its edge (x -> W - x for 180 degrees). The image of a rotation by 180 degrees is
# that of both flips, bit for bit, and its keypoints are one pixel off on both axes; at 90 degrees one axis is. No shift of the input
# mends both. Bounding boxes are right in all of them (edges everywhere). A keypoint whose pixel has moved is the ground truth of a
# dense match.
# The guess was: one convention, so that rotation by 180 degrees equals the two flips for keypoints as for images.
# Output seen: pixel (10, 20) of 64 x 64: flipped to (53, 43), keypoint (53, 43); rotated by 180 to (53, 43), keypoint (54, 44); by 90 to (20, 53), keypoint (20, 54)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

SIZE, X, Y = 64, 10, 20
image = tv_tensors.Image(torch.zeros(1, SIZE, SIZE))
image[0, Y, X] = 1
point = tv_tensors.KeyPoints(torch.tensor([[float(X), float(Y)]]), canvas_size=(SIZE, SIZE))
box = tv_tensors.BoundingBoxes(torch.tensor([[X, Y, X + 1.0, Y + 1.0]]), format="XYXY", canvas_size=(SIZE, SIZE))
seen = {}
for name, transform in (
    ("flipped to", lambda x: F.vertical_flip(F.horizontal_flip(x))),
    ("rotated by 180 to", lambda x: F.rotate(x, 180)),
    ("by 90 to", lambda x: F.rotate(x, 90)),
):
    y, x = transform(image)[0].nonzero()[0].tolist()
    assert transform(box).round().tolist() == [[x, y, x + 1, y + 1]], name
    seen[name] = ((x, y), tuple(transform(point)[0].round().int().tolist()))
print(f"pixel {X, Y} of {SIZE} x {SIZE}: " + "; ".join(f"{name} {pixel}, keypoint {moved}" for name, (pixel, moved) in seen.items()))
assert list(seen.values()) == [((53, 43), (53, 43)), ((53, 43), (54, 44)), ((20, 53), (20, 54))], seen
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore case.py
