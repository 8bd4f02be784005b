#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, one process): weights of a checkpoint that do not arrive.
#
# 1. load_checkpoint(load_module_only=True) loads the weights at ZeRO stages 0, 1 and 2. At stage 3
#    it returns the path as if it had, and the model keeps the weights that it had.
# 2. bf16, load_checkpoint(load_optimizer_states=False): the weights are loaded at all stages. At
#    stage 0 the fp32 weights of the optimizer are not, so the next step writes the old weights back.
#
#   load_module_only, loaded: stage 0 True, stage 1 True, stage 2 True, stage 3 False
#   load_optimizer_states=False, kept after a step: stage 0 False, stage 1 True, stage 2 True
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


def make(stage, seed, is_bf16):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": is_bf16},
    }
    parameters = model.parameters()
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def step(engine):
    rows = torch.ones(2, 8, dtype=next(engine.module.parameters()).dtype)
    engine.backward(engine(rows).float().square().mean())
    engine.step()


def weights(engine):
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([p.detach().float().reshape(-1) for p in parameters])


def load(stage, is_bf16, **how):
    folder = f"{sys.argv[1]}_{stage}_{is_bf16}"
    engine = make(stage, 0, is_bf16)
    step(engine)
    engine.save_checkpoint(folder, tag="t")
    saved = weights(engine)
    engine = make(stage, 5, is_bf16)
    path, _ = engine.load_checkpoint(folder, tag="t", **how)
    assert path is not None
    return engine, saved


loaded, kept = {}, {}
for stage in (0, 1, 2, 3):
    engine, saved = load(stage, False, load_module_only=True)
    loaded[stage] = bool(torch.equal(weights(engine), saved))
for stage in (0, 1, 2):
    engine, saved = load(stage, True, load_optimizer_states=False)
    assert torch.equal(weights(engine), saved)
    step(engine)  # moves a weight by about the learning rate, 0.001
    kept[stage] = float((weights(engine) - saved).abs().max()) < 0.05


def listed(found):
    return ", ".join(f"stage {stage} {answer}" for stage, answer in found.items())


print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
print("load_module_only, loaded:", listed(loaded))
print("load_optimizer_states=False, kept after a step:", listed(kept))
changed = loaded != {0: True, 1: True, 2: True, 3: False} or kept != {0: False, 1: True, 2: True}
print("changed" if changed else "as described")
sys.stdout.flush()
os._exit(int(changed))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
cd "$folder"
"$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
