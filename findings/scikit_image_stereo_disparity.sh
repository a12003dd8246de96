#!/bin/bash
# scikit-image 0.26.0: the docstring of skimage.data.stereo_motorcycle, real ground truth for dense correspondence, is wrong twice.
# It says that unknown disparities are NaN: they are inf (7.35 % of the pixels), so that a nan-aware mean is inf and a mask by isnan keeps
# them all. And left[y, x] matches right[y, x - d], not x + d: the mean grey difference tells the two apart.
# The guess was: what the docstring says.
# Output seen: NaN: 0.00%, inf: 7.35%; grey difference at x - d: 0.031, at x + d: 0.177
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check scikit-image==0.26.0 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import numpy as np
import skimage

left, right, disparity = skimage.data.stereo_motorcycle()
left, right = (image.astype(float).mean(2) / 255 for image in (left, right))
known = np.isfinite(disparity)
y, x = np.nonzero(known)
shift = np.rint(disparity[known]).astype(int)


def difference(sign):
    target = x + sign * shift
    inside = (target >= 0) & (target < right.shape[1])
    return np.abs(left[y[inside], x[inside]] - right[y[inside], target[inside]]).mean()


nan, inf = np.isnan(disparity).mean(), np.isinf(disparity).mean()
print(f"NaN: {nan:.2%}, inf: {inf:.2%}; grey difference at x - d: {difference(-1):.3f}, at x + d: {difference(1):.3f}")
assert nan == 0 and round(inf, 4) == 0.0735
assert difference(-1) * 3 < difference(1)
PY
"$dir/env/bin/python" case.py
