#!/bin/bash
# torch 2.13.0 (2.14.1 alike): torch.distributed.checkpoint takes what is under one name on several ranks for one thing, and spreads the
# writing: each name is saved by the rank that has the fewest bytes to write so far. Where the ranks' values differ, as those of a queue
# that each rank fills on its own do, the checkpoint holds the rows of one rank and the position of another, without a word, and every
# rank loads that mixture. dedup_save_to_lowest_rank=True takes all from rank 0, which is one queue that is whole. Names that hold the
# rank keep all of them.
# The guess was: every rank gets rank 0's rows and position, as after torch.save on rank 0 or a broadcast of buffers.
# Output seen: default: rows of rank 0, position of rank 1, count of rank 1; lowest rank: rows of rank 0, position of rank 0, count of rank 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import json
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner


def state(value):
    return {"rows": torch.full((64, 8), value), "position": torch.tensor(value), "count": torch.tensor(value)}


rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
seen = []
for name, lowest in (("default", False), ("lowest", True)):
    dcp.save(state(float(rank)), checkpoint_id=name, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=lowest))
    loaded = state(-1.0)
    dcp.load(loaded, checkpoint_id=name)
    assert (loaded["rows"] == loaded["rows"][0, 0]).all()
    seen.append({key: int(value.flatten()[0]) for key, value in loaded.items()})
both = [None, None]
dist.all_gather_object(both, json.dumps(seen))
assert both[0] == both[1], both
dist.destroy_process_group()
if rank == 0:
    mixed, whole = (", ".join(f"{key} of rank {value}" for key, value in each.items()) for each in seen)
    print(f"default: {mixed}; lowest rank: {whole}")
    assert seen[0] == {"rows": 0, "position": 1, "count": 1} and set(seen[1].values()) == {0}, seen
PY
export OMP_NUM_THREADS=1
"$dir/env/bin/python" -W ignore case.py 1 "$dir/meet" &
"$dir/env/bin/python" -W ignore case.py 0 "$dir/meet"
wait $!
