#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, one process, bf16, AdamW, no clipping).
#
# The search for inf and nan answers on the device, "so that callers accumulating it across many
# gradients do not pay a host synchronization per tensor" (has_inf_or_nan's docstring). At ZeRO
# stages 1 and 2 engine.step() asks for few scalars, whatever the number of parameters. At stage 0
# it asks for two per parameter, in every step, so on an accelerator the host waits that often.
# Scalars that the host fetches in one engine.step():
#
#   stage 0: 4 parameters 11, 40 parameters 83
#   stage 1: 4 parameters 3, 40 parameters 3
#   stage 2: 4 parameters 3, 40 parameters 3
#
# What counts is whether they grow with the parameters. Exits 0 while that is so, 1 if it has
# changed.
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
from torch.utils._python_dispatch import TorchDispatchMode

logger.setLevel(logging.ERROR)
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # spares compiling it
deepspeed.init_distributed(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1, verbose=False
)


class Fetches(TorchDispatchMode):
    """Counts what the host reads of tensors, as item() and bool() do."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "is_nonzero", "equal")
        self.count += function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


def fetched(stage, parameters):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(parameters)]
    model = torch.nn.Sequential(*layers)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )[0]
    for number in range(3):
        rows = torch.randn(2, 8, dtype=torch.bfloat16)
        engine.backward(engine(rows).float().square().mean())
        with Fetches() as fetches:
            engine.step()
    return fetches.count


changed = False
print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
for stage, grows in ((0, True), (1, False), (2, False)):
    few, many = fetched(stage, 4), fetched(stage, 40)
    print(f"stage {stage}: 4 parameters {few}, 40 parameters {many}")
    changed |= (many >= few + 36) != grows or (not grows and many > few + 8)
print("changed" if changed else "as described")
sys.stdout.flush()
os._exit(int(changed))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
cd "$folder"
"$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
