#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, two processes on gloo, plain SGD, one step).
#
# Ranks may use different parameters in a step: here rank 0 uses layer b and rank 1 layer c, as
# routed or data-dependent models do. The average counts a missing gradient as zero. Stage 0 does
# so. At stages 1 and 2 every rank fills its bucket with the gradients that it has, in the order in
# which they come, and sums buckets by position: b's gradient is added to c's. Nothing is said, and
# training goes on with wrong weights. Largest distance of a weight from the right one:
#
#   stage 0: 1.49e-08
#   stage 1: 0.00376
#   stage 2: 0.00376
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

LR = 0.1
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
        self.c = torch.nn.Linear(8, 8, bias=False)

    def forward(self, rows, number):
        return (self.b, self.c)[number](self.a(rows)).square().mean()


def model():
    torch.manual_seed(0)
    return Model()


def rows(number):
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(number))


def right():
    one = model()
    for number in range(2):
        (one(rows(number), number) / 2).backward()
    return {name: (p - LR * p.grad).detach() for name, p in one.named_parameters()}


def distance(stage):
    one = model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=one, model_parameters=one.parameters(), config=config)[0]
    engine.backward(engine(rows(rank), rank))
    engine.step()
    wanted = right()
    return max(float((p.detach() - wanted[n]).abs().max()) for n, p in one.named_parameters())


changed = False
if not rank:
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
for stage, is_wrong in ((0, False), (1, True), (2, True)):
    found = distance(stage)
    if not rank:
        print(f"stage {stage}: {found:.3g}")
    changed |= (found > 1e-6) != is_wrong
if not rank:
    print("changed" if changed else "as described")
sys.stdout.flush()
os._exit(int(changed))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
cd "$folder"
RANK=1 LOCAL_RANK=1 "$folder/venv/bin/python" finding.py "$folder/store" >"$folder/other" 2>&1 &
RANK=0 "$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
wait
