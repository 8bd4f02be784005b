#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, one host, two ranks).
#
# Where all ranks are on one host, DeepSpeed's CPU backend makes a file of 69 MB per rank in /dev/shm
# for its own all-reduce, whether anybody calls it or not. It never removes one: shared_close() in
# csrc/cpu/comm/shm.cpp has no caller. The name holds address and port, so every run on another port
# leaves 138 MB of main memory taken until the machine starts again. `free` shows it as shared.
#
#   after a run that ended normally: 2 files, 138.4 MB
#
# Exits 0 while that is so, 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy ninja
cat >"$folder/rank.py" <<'PYTHON'
import deepspeed
import deepspeed.comm as dist
import torch

deepspeed.init_distributed("gloo")
dist.all_reduce(torch.ones(4))
dist.barrier()
dist.destroy_process_group()
PYTHON
port=29517
cd "$folder"
export PATH="$folder/venv/bin:$PATH"
DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/ops" \
    venv/bin/deepspeed --num_accelerators 2 --master_port $port rank.py >"$folder/out" 2>&1 ||
    { tail -5 "$folder/out"; exit 1; }
files=$(find /dev/shm -name "deepspeed_allreduce_buffer_*_${port}_?")
told="$(echo "$files" | grep -c .) files, $(echo "$files" | xargs -r cat | wc -c | awk '{printf "%.1f", $1 / 1e6}') MB"
echo "$files" | xargs -r rm -f
echo "after a run that ended normally: $told"
[ "$told" = "2 files, 138.4 MB" ]
