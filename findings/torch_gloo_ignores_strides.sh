#!/bin/bash
# torch 2.13.0 (2.14.1 alike), gloo: broadcast and all_reduce send a tensor as it lies in memory. Where two ranks hold tensors of one shape
# with other strides, each of them dense, the numbers arrive at wrong places, and nothing is raised. A convolution whose weights are
# channels_last on rank 0 (from a checkpoint that was taken over with assign=True, say) and contiguous on the rank that receives them is
# such a pair, and so is a row-major matrix beside the transpose of a product. all_gather of the same tensors is right: it copies.
# DistributedDataParallel compares strides when it is built, and raises.
# The guess was: an error, as for a tensor that is not dense, or the right numbers.
# Output seen: weights that arrive at their place: 6%; all_reduce of [[0, 3], [1, 4], [2, 5]] with itself: [[0, 4], [3, 7], [6, 10]]; all_gather: right
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$dir"
cat > case.py <<'PY'
import sys

import torch
import torch.distributed as dist

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
weight = torch.randn(8, 4, 3, 3)
mine = weight.to(memory_format=torch.channels_last) if rank == 0 else torch.zeros_like(weight)
dist.broadcast(mine, 0)
right = float((mine == weight).float().mean())

matrix = torch.arange(6.0).view(2, 3).t()  # (3, 2)
summed = matrix.clone() if rank == 0 else matrix.contiguous()
gathered = [torch.zeros(3, 2) for _ in range(2)]
dist.all_gather(gathered, summed)
assert summed.is_contiguous() == (rank == 1) and all(torch.equal(each, matrix) for each in gathered)
dist.all_reduce(summed)
dist.barrier()
dist.destroy_process_group()
if rank == 1:
    summed = summed.int().tolist()
    print(f"weights that arrive at their place: {right:.0%}; all_reduce of [[0, 3], [1, 4], [2, 5]] with itself: {summed}; all_gather: right")
    assert right < 0.5 and summed == [[0, 4], [3, 7], [6, 10]], (right, summed)
PY
export OMP_NUM_THREADS=1
"$dir/env/bin/python" -W ignore case.py 0 "$dir/meet" &
"$dir/env/bin/python" -W ignore case.py 1 "$dir/meet"
wait $!
