#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, two processes on gloo, ZeRO stage 2, fp32).
#
# deepspeed.utils.safe_get_full_fp32_param returns a parameter's fp32 weights. With
# round_robin_gradients it returns those of other parameters, or of none, for all but the first.
# The largest difference from the model's own fp32 weights:
#
#   round_robin_gradients False: a 0, b 0, c 0
#   round_robin_gradients True: a 0, b 0.61, c 0.601
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
import warnings

warnings.filterwarnings("ignore")
import deepspeed
import torch
from deepspeed.utils import logger, safe_get_full_fp32_param

logger.setLevel(logging.ERROR)
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # spares compiling it
deepspeed.init_distributed(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2, verbose=False
)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 8, bias=False)
        self.b = torch.nn.Linear(8, 8, bias=False)
        self.c = torch.nn.Linear(8, 5, bias=False)

    def forward(self, rows):
        return self.c(self.b(self.a(rows))).square().mean()


def differences(is_round_robin):
    torch.manual_seed(0)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2, "round_robin_gradients": is_round_robin},
    }
    parameters = model.parameters()
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    engine.backward(engine(torch.randn(2, 8)))
    engine.step()
    return [
        float((safe_get_full_fp32_param(p) - p.detach()).abs().max()) for p in model.parameters()
    ]


changed = False
for is_round_robin in (False, True):
    found = differences(is_round_robin)
    changed |= (max(found) > 0) != is_round_robin
    if rank == 0:
        listed = ", ".join(f"{name} {value:.3g}" for name, value in zip("abc", found))
        print(f"round_robin_gradients {is_round_robin}: {listed}")
if rank == 0:
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    print("changed" if changed else "as described")
sys.stdout.flush()
os._exit(int(changed))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
cd "$folder"
RANK=1 LOCAL_RANK=1 "$folder/venv/bin/python" finding.py "$folder/store" >"$folder/other" 2>&1 &
RANK=0 LOCAL_RANK=0 timeout 300 "$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
wait
