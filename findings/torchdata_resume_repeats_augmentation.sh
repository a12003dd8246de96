#!/bin/bash
# torchdata 0.11.0 with torch 2.13.0: StatefulDataLoader with worker processes resumes the order of a map-style dataset exactly, but its
# workers draw the random numbers of the *start* of the epoch again: the first batches after a resume get the crops, flips and colours
# that the first batches of the epoch had. The state holds the workers' seed, and nothing has advanced their generators, since no
# sample is read again. The seed of the resuming process does not matter. An IterableDataset without a state of its own is read again from
# its beginning, and so does get the right numbers.
# The guess was: either the numbers that the uninterrupted run draws, or fresh ones from the new process's seed.
# Output seen: samples as without the stop: True; random numbers as without the stop: False; as at the start of the epoch: True
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torchdata==0.11.0
cd "$dir"
cat > case.py <<'PY'
import torch
from torchdata.stateful_dataloader import StatefulDataLoader


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()).item()])


def loader():
    return StatefulDataLoader(Augmented(), batch_size=2, num_workers=2)


torch.manual_seed(0)
interrupted = loader()
batches = iter(interrupted)
start = torch.cat([next(batches) for _ in range(4)])
state = interrupted.state_dict()
rest = torch.cat(list(batches))

torch.manual_seed(99)  # another process
resumed = loader()
resumed.load_state_dict(state)
again = torch.cat(list(resumed))

answers = (torch.equal(again[:, 0], rest[:, 0]), torch.equal(again[:, 1], rest[:, 1]), torch.equal(again[:, 1], start[:, 1]))
print("samples as without the stop: {}; random numbers as without the stop: {}; as at the start of the epoch: {}".format(*answers))
assert answers == (True, False, True), answers
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore case.py
