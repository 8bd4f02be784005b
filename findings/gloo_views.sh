#!/bin/bash
# torch 2.13.0 (CPU, two processes on gloo).
#
# dist.all_reduce, broadcast and reduce of a view that is not contiguous raise nothing and work on
# other elements than those of the view: on as many as it has, from its first one on in memory. So
# elements beside the view change, and elements of the view do not. A matrix of 2 x 4 on rank 0
# holds 0 .. 7, on rank 1 100 .. 107; the view is its first two columns.
#
#   all_reduce of the view, rank 0: [[100, 102, 104, 106], [4, 5, 6, 7]]
#   all_reduce of a contiguous copy: [[100, 102], [108, 110]]
#   broadcast of the view, rank 1: [[0, 1, 2, 3], [104, 105, 106, 107]]
#   reduce of the view, rank 0: [[100, 102, 104, 106], [4, 5, 6, 7]]
#
# Exits 0 while that is so, 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)


def matrix():
    return torch.arange(8.0).view(2, 4) + 100 * rank


def left(collective):
    """The whole matrix after a collective of its first two columns."""
    whole = matrix()
    collective(whole[:, :2])
    return whole.int().tolist()


copy = matrix()[:, :2].contiguous()
dist.all_reduce(copy)
found = {
    "all_reduce of the view, rank 0": left(dist.all_reduce),
    "all_reduce of a contiguous copy": copy.int().tolist(),
    "broadcast of the view, rank 1": left(lambda view: dist.broadcast(view, src=0)),
    "reduce of the view, rank 0": left(lambda view: dist.reduce(view, dst=0)),
}
described = {
    "all_reduce of the view, rank 0": (0, [[100, 102, 104, 106], [4, 5, 6, 7]]),
    "all_reduce of a contiguous copy": (0, [[100, 102], [108, 110]]),
    "broadcast of the view, rank 1": (1, [[0, 1, 2, 3], [104, 105, 106, 107]]),
    "reduce of the view, rank 0": (0, [[100, 102, 104, 106], [4, 5, 6, 7]]),
}
told = [None, None]
dist.all_gather_object(told, found)
changed = False
if rank == 0:
    print(f"torch {torch.__version__}")
for name, (where, expected) in described.items():
    changed |= told[where][name] != expected
    if rank == 0:
        print(f"{name}: {told[where][name]}")
if rank == 0:
    print("changed" if changed else "as described")
sys.stdout.flush()
dist.barrier()
os._exit(int(changed))
PYTHON
export OMP_NUM_THREADS=1
cd "$folder"
RANK=1 "$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors1" &
RANK=0 "$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
wait
