#!/bin/bash
# webdataset 1.0.2: WebDataset(urls, shardshuffle=N) shuffles the shards once, not once an epoch. The constructor draws one seed, and every
# epoch starts a new generator from it, with worker processes or without. The order differs from run to run, so that nobody sees it
# repeat. A sample shuffle behind it hides it within its buffer only: with shards larger than the buffer, neighbours stay neighbours for
# the whole training. detshuffle=True gives another order each epoch in one process or with persistent workers, as long as a sample
# shuffle follows; with workers that start anew each epoch, the shard order repeats again.
# The guess was: another order every epoch, as DataLoader(shuffle=True).
# Output seen: 5 epochs, 1 order of shards (shardshuffle), 5 orders (shardshuffle and detshuffle)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import webdataset

SHARDS = 8
for shard in range(SHARDS):
    with webdataset.TarWriter(f"{shard}.tar") as writer:
        for i in range(4):
            writer.write({"__key__": f"{shard}{i}", "txt": str(shard)})


def orders(**options):
    dataset = webdataset.WebDataset([f"{shard}.tar" for shard in range(SHARDS)], shardshuffle=SHARDS, **options)
    epochs = [tuple(dict.fromkeys(sample["txt"] for sample in dataset)) for _ in range(5)]
    assert all(len(epoch) == SHARDS for epoch in epochs)
    return len(set(epochs))


plain, deterministic = orders(), orders(detshuffle=True)
print(f"5 epochs, {plain} order of shards (shardshuffle), {deterministic} orders (shardshuffle and detshuffle)")
assert (plain, deterministic) == (1, 5), (plain, deterministic)
PY
"$dir/env/bin/python" case.py
