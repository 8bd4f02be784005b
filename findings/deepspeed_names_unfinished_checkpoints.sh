#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, two processes, ZeRO stage 1).
#
# `engine.save_checkpoint` writes the file `latest` on rank 0 as soon as rank 0 has written its own
# files. It does not wait for the other ranks first: the barrier comes after. A rank that dies while
# it writes its part of the optimizer's state leaves `latest` at a checkpoint without that part,
# and a run that is started again cannot load it, though the one before is whole:
#
#   after the second save, in which rank 1 died: latest is "second"
#   files of "first": 3, of "second": 2
#   load_checkpoint: rank 0 loads, rank 1 fails
#
# Exits 0 while that is so, 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy
cat >"$folder/finding.py" <<'PYTHON'
import logging
import os
import sys
import time
from datetime import timedelta

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import logger

logger.setLevel(logging.CRITICAL)
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # spares compiling it
deepspeed.init_distributed("gloo", timeout=timedelta(seconds=10))
rank = torch.distributed.get_rank()
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1},
    },
)
if sys.argv[1] == "save":
    engine.backward(engine(torch.ones(1, 8)).square().mean())
    engine.step()
    engine.save_checkpoint("saved", tag="first")
    write = TorchCheckpointEngine.save

    def killed_in_a_slow_write(self, state_dict, path):
        if rank == 1 and "optim_states" in path:
            time.sleep(3)  # a slow disk
            os._exit(9)
        return write(self, state_dict, path)

    TorchCheckpointEngine.save = killed_in_a_slow_write
    try:
        engine.save_checkpoint("saved", tag="second")
    except RuntimeError:  # the other rank is gone
        pass
else:
    try:
        loaded = engine.load_checkpoint("saved")[0] is not None
    except Exception:
        loaded = False
    with open(f"loaded{rank}", "w") as file:
        file.write("loads" if loaded else "fails")
sys.stdout.flush()
os._exit(0)
PYTHON
cd "$folder"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 MASTER_ADDR=127.0.0.1 WORLD_SIZE=2
port=20000
for what in save load; do
    port=$((port + RANDOM % 9000 + 1))
    for rank in 0 1; do
        RANK=$rank LOCAL_RANK=$rank MASTER_PORT=$port \
            "$folder/venv/bin/python" finding.py $what >"$what$rank.txt" 2>&1 &
    done
    wait || true
done
latest=$(cat saved/latest)
first=$(ls saved/first | wc -l)
second=$(ls saved/second | wc -l)
echo "after the second save, in which rank 1 died: latest is \"$latest\""
echo "files of \"first\": $first, of \"second\": $second"
echo "load_checkpoint: rank 0 $(cat loaded0), rank 1 $(cat loaded1)"
test "$latest" = second && test "$second" -lt "$first"
