#!/bin/bash
# accelerate 1.15.0 with transformers 5.23.0 and DeepSpeed 0.19.8 (torch 2.13.0, CPU, two processes).
#
# The Trainer with deepspeed=... under torchrun on CPUs: DeepSpeed averages gradients over two
# ranks, and accelerate counts one process. So both ranks train on the same examples, which costs
# twice and learns as one, and nothing is said. With use_cpu=True they share the data. The examples
# of the first two steps of batch size 2, as numbers:
#
#   TrainingArguments(...): world_size 1 of 2, rank 0 [6, 3, 0, 7], rank 1 [6, 3, 0, 7]
#   TrainingArguments(..., use_cpu=True): world_size 2 of 2, rank 0 [6, 3, 10, 15], rank 1 [0, 7, 2, 12]
#
# Exits 0 while that is so, 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 transformers==5.23.0 accelerate==1.15.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import logging
import os
import sys
import warnings

warnings.filterwarnings("ignore")
import accelerate
import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import logger

logger.setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # spares compiling it


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def forward(self, number, labels=None):
        self.seen += number.flatten().int().tolist()
        return {"loss": (self.layer(number) - labels).square().mean()}


is_told = sys.argv[1] == "told"
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 1},
}
arguments = transformers.TrainingArguments(
    output_dir=f"out{os.environ['RANK']}",  # both make it
    max_steps=2,
    per_device_train_batch_size=2,
    report_to=[],
    disable_tqdm=True,
    save_strategy="no",
    logging_strategy="no",
    deepspeed=config,
    **({"use_cpu": True} if is_told else {}),
)
data = [{"number": torch.tensor([float(i)]), "labels": torch.zeros(1)} for i in range(16)]
model = Model()
trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
logging.disable()
trainer.train()
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, model.seen)
if dist.get_rank() == 0:
    words = "TrainingArguments(..., use_cpu=True)" if is_told else "TrainingArguments(...)"
    if not is_told:
        print(f"accelerate {accelerate.__version__}, transformers {transformers.__version__}")
    ranks = ", ".join(f"rank {rank} {numbers}" for rank, numbers in enumerate(seen))
    print(f"{words}: world_size {arguments.world_size} of {len(seen)}, {ranks}")
is_shared = arguments.world_size == 2 and not set(seen[0]) & set(seen[1])
is_same = arguments.world_size == 1 and seen[0] == seen[1]
sys.stdout.flush()
dist.barrier()
os._exit(0 if (is_shared if is_told else is_same) else 1)
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
cd "$folder"
for way in plain told; do
    if ! "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 \
        finding.py "$way" >"$folder/out" 2>"$folder/errors"; then
        cat "$folder/out"
        tail -n 5 "$folder/errors" >&2
        echo changed
        exit 1
    fi
    grep -v train_runtime "$folder/out"
done
echo "as described"
