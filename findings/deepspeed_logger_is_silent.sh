#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, one process, SGD, 20 steps).
#
# "steps_per_print" is 10 by default and meant for a line on progress. The line goes to DeepSpeed's
# logger at level INFO, and the level of that logger is WARNING. So a script that asks for a line in
# every step sees none, until it sets the level itself:
#
#   level of the logger: WARNING
#   lines with steps_per_print 1: 0
#   lines after logger.setLevel(INFO): 0 (its handler has the level WARNING, too)
#   lines after both were set: 10
#
# Exits 0 while that is so, 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy
cat >"$folder/finding.py" <<'PYTHON'
import contextlib
import io
import logging
import sys
import warnings

warnings.filterwarnings("ignore")
import deepspeed
import torch
from deepspeed.utils import logger

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # spares compiling it
deepspeed.init_distributed(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1, verbose=False
)
model = torch.nn.Linear(4, 1)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "steps_per_print": 1,
}
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=config
)


def lines():
    """Lines on progress of ten steps."""
    text = io.StringIO()
    for handler in logger.handlers:
        handler.setStream(text)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        for _ in range(10):
            engine.backward(engine(torch.ones(1, 4)).sum())
            engine.step()
    return text.getvalue().count("skipped=")


level = logging.getLevelName(logger.level)
silent = lines()
logger.setLevel(logging.INFO)
half = lines()
for handler in logger.handlers:
    handler.setLevel(logging.INFO)
loud = lines()
print(f"level of the logger: {level}")
print(f"lines with steps_per_print 1: {silent}")
print(f"lines after logger.setLevel(INFO): {half}")
print(f"lines after both were set: {loud}")
sys.exit((level, silent, half, loud) != ("WARNING", 0, 0, 10))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
cd "$folder"
"$folder/venv/bin/python" finding.py "$folder/store" 2>"$folder/errors" || { code=$?; tail -n 5 "$folder/errors" >&2; exit "$code"; }
