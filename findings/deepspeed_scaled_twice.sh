#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, one process, plain SGD, four micro-steps).
#
# engine.backward(loss, scale_wrt_gas=False) is for callers who divide the loss by the accumulation
# steps themselves; the Hugging Face Trainer does so. At ZeRO stage 0 DeepSpeed divides all the
# same, if the loss is the very tensor that the model returned, and not if it was multiplied by 1.
# At stages 1 to 3 it never does. How far the same step moves the weights:
#
#   stage 0: 0.461, loss * 1: 1.85
#   stage 1: 1.85, loss * 1: 1.85
#   stage 2: 1.85, loss * 1: 1.85
#   stage 3: 1.85, loss * 1: 1.85
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
from deepspeed.utils import logger

logger.setLevel(logging.ERROR)
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # spares compiling it
deepspeed.init_distributed(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1, verbose=False
)
STEPS = 4


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, bias=False)

    def forward(self, rows):
        return self.layer(rows).square().mean()


def moved(stage, is_other_tensor):
    torch.manual_seed(0)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": STEPS,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    parameters = model.parameters()
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]

    def weights():
        with deepspeed.zero.GatheredParameters([model.layer.weight]):
            return model.layer.weight.detach().clone()

    rows, before = torch.randn(2, 4), weights()
    for _ in range(STEPS):
        loss = engine(rows)
        engine.backward(loss * 1 if is_other_tensor else loss, scale_wrt_gas=False)
        engine.step()
    return float((weights() - before).norm())


changed = False
print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
for stage in (0, 1, 2, 3):
    same, other = moved(stage, False), moved(stage, True)
    print(f"stage {stage}: {same:.3g}, loss * 1: {other:.3g}")
    expected = other / STEPS if stage == 0 else other
    changed |= abs(same - expected) > 1e-4
print("changed" if changed else "as described")
sys.stdout.flush()
os._exit(int(changed))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
cd "$folder"
"$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
