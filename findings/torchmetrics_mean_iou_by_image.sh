#!/bin/bash
# torchmetrics 1.9.0: segmentation.MeanIoU is the mean over images of each image's own mean IoU. It is not the mIoU of PASCAL VOC, ADE20K
# and Cityscapes, which divides the sums over all images, and which classification.MulticlassJaccardIndex is; the documentation does not
# say so. A class that neither an image nor its prediction holds is left out of that image, so that a small object in one image weighs
# as much as a large one, and an image with few classes as much as a crowded one. For one network the two can be many points apart, in
# either direction.
# The guess was: the same number from both, the two names being the two names of that measure.
# Output seen: small object missed in 1 of 4 images: MeanIoU 0.867, MulticlassJaccardIndex 0.969; one of four equal ones: 0.812, 0.775
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torchmetrics==1.9.0
cd "$dir"
cat > case.py <<'PY'
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

SIDE = 16


def both(objects, missed):
    """Images with one object of `objects[i]` rows each, all found but one."""
    target = torch.zeros(len(objects), SIDE, SIDE, dtype=torch.long)
    for image, rows in zip(target, objects):
        image[:rows] = 1
    prediction = target.clone()
    prediction[missed] = 0
    by_image, over_all = MeanIoU(num_classes=2, input_format="index"), MulticlassJaccardIndex(num_classes=2)
    for one in zip(prediction.split(1), target.split(1)):
        by_image.update(*one)
        over_all.update(*one)
    sums = [((prediction == c) & (target == c)).sum() / ((prediction == c) | (target == c)).sum() for c in (0, 1)]
    assert abs(over_all.compute() - sum(sums) / 2) < 1e-6
    return float(by_image.compute()), float(over_all.compute())


small, large = both([1, 12, 12, 12], 0), both([8, 8, 8, 8], 3)
print("small object missed in 1 of 4 images: MeanIoU {:.3f}, MulticlassJaccardIndex {:.3f}; ".format(*small)
      + "one of four equal ones: {:.3f}, {:.3f}".format(*large))
assert small[0] < small[1] - 0.05 and large[0] > large[1] + 0.03, (small, large)
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore case.py
