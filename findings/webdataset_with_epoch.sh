#!/bin/bash
# webdataset 1.0.2: with_epoch(n) on a dataset that is not resampled does not go on where the last epoch stopped. Every epoch begins at
# the first shard again, so that samples beyond the first n are never seen, however long the training. (With shardshuffle alone it
# is the same n every time, too: see webdataset_shard_order.sh.) resampled=True, or .repeat() before with_epoch and one iterator
# that is kept, reads them all.
# The guess was: the next epoch takes the next n samples, as an epoch of a sampler that cycles would.
# Output seen: 10 epochs of 16 of 32 samples: 16 distinct (plain), 32 (repeat, one iterator kept)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import itertools

import webdataset

SAMPLES, EPOCH = 32, 16
for shard in range(4):
    with webdataset.TarWriter(f"{shard}.tar") as writer:
        for i in range(SAMPLES // 4):
            writer.write({"__key__": f"{shard}{i}", "txt": f"{shard}{i}"})


def dataset():
    return webdataset.WebDataset([f"{shard}.tar" for shard in range(4)], shardshuffle=False)


cut = dataset().with_epoch(EPOCH)
plain = {sample["txt"] for _ in range(10) for sample in cut}
stream = iter(dataset().repeat())
kept = {sample["txt"] for _ in range(10) for sample in itertools.islice(stream, EPOCH)}
print(f"10 epochs of {EPOCH} of {SAMPLES} samples: {len(plain)} distinct (plain), {len(kept)} (repeat, one iterator kept)")
assert (len(plain), len(kept)) == (EPOCH, SAMPLES)
PY
"$dir/env/bin/python" case.py
