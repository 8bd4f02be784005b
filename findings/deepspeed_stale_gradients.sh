#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, one process, plain SGD without momentum or weight decay).
#
# A parameter that takes no part in a step keeps its value, in torch and at ZeRO stages 0, 1 and 2.
# At stage 3, and at stages 1 to 3 with offload_optimizer, it is stepped again with its last
# gradient. The model below uses layer b in the first step only. How far b moved in the second:
#
#   stage 0: 0
#   stage 1: 0
#   stage 2: 0
#   stage 1, offloaded: 0.00975
#   stage 2, offloaded: 0.00975
#   stage 3: 0.00975
#   stage 3, offloaded: 0.00975
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


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 8, bias=False)
        self.b = torch.nn.Linear(8, 8, bias=False)

    def forward(self, rows, uses_b):
        loss = self.a(rows).square().mean()
        return loss + self.b(rows).square().mean() if uses_b else loss


def moved(stage, offload):
    torch.manual_seed(0)
    model = Model()
    zero = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    parameters = model.parameters()
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]

    def b():
        with deepspeed.zero.GatheredParameters([model.b.weight]):
            return model.b.weight.detach().clone()

    rows = torch.randn(2, 8)
    engine.backward(engine(rows, True))
    engine.step()
    before = b()
    engine.backward(engine(rows, False))
    engine.step()
    return float((b() - before).abs().max())


changed = False
print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
for stage, offload, is_stepped in (
    (0, False, False), (1, False, False), (2, False, False),
    (1, True, True), (2, True, True), (3, False, True), (3, True, True),
):
    distance = moved(stage, offload)
    print(f"stage {stage}{', offloaded' if offload else ''}: {distance:.3g}")
    changed |= (distance > 0) != is_stepped
print("changed" if changed else "as described")
sys.stdout.flush()
os._exit(int(changed))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
cd "$folder"
"$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
