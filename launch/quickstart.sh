#!/usr/bin/env bash
# From a fresh clone to a text generator that replies, over a link that is slow and gets worse.
#
# Makes .venv (launch/setup_venv.sh), trains the 1M-parameter model on two ranks of this machine
# behind an emulated link (ds_configs/laptop.json: 20 Mbit/s, then 5, then 20 again), shows how the
# density followed it, draws the run, and prints replies to two prompts. The last line of stdout is
# one JSON document. Runs on the CPU even where there is a GPU, since two ranks need two devices.
#
#   launch/quickstart.sh [flags of launch/train.py, for example --steps 60]
#   launch/quickstart.sh --finetune [flags of launch/finetune.py]
#
# The second takes a real model instead, SmolLM2-135M-Instruct (a download of 98 MB), and teaches it
# the questions of docs/faq.md. It shows replies before and after. Two ranks need 6 GB of memory.
#
# The run lies in runs/quickstart or runs/quickstart-finetune. An earlier one is kept: it is moved
# to runs/quickstart-<time>.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
started=$SECONDS
say() { printf '[quickstart] %s\n' "$*"; }

kind=train
if [ "${1:-}" = --finetune ]; then
  kind=finetune
  shift
fi

launch/setup_venv.sh
export PATH="$root/.venv/bin:$PATH"       # deepspeed and ninja
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
export HF_HUB_OFFLINE=1                   # everything needed is here

run=runs/quickstart
[ "$kind" = train ] || run=runs/quickstart-finetune
if [ -e "$run" ]; then
  # A run writes by path: moved aside under its feet, it would go on in the new one's folder.
  python -c 'import sys
from pathlib import Path
from launch.support.run_folder import is_in_use
sys.exit(is_in_use(Path(sys.argv[1])))' "$run" \
    || { say "another quickstart trains in $run right now; wait for it, or end it" >&2; exit 2; }
  aside="$run-$(date -r "$run" +%Y%m%d-%H%M%S)"
  while [ -e "$aside" ]; do aside="$aside-again"; done
  mv "$run" "$aside"
  say "an earlier run was there; it is now $aside"
fi

port="$(python -c 'import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(probe.getsockname()[1])')"
start=(deepspeed --log_level error --num_accelerators 2 --master_port "$port")

show() {  # what the run did
  echo
  ds-gradprune report "$run"
  picture="$(ds-gradprune plot "$run")"
  say "the picture of the run: $picture"
}

say_next() {
  say "done in $((SECONDS - started)) s. Ask more, or chat in a browser:"
  say "  .venv/bin/ds-gradprune reply --model $run/model"
  say "  .venv/bin/ds-gradprune serve --model $run/model"
}

if [ "$kind" = finetune ]; then
  pip -qq install --constraint constraints.txt --no-build-isolation --editable ".[finetune]"
  say "fetching SmolLM2-135M-Instruct, unless it is here"
  model="$(PYTHON=python labs/smollm2.sh)"
  inputs="$(mktemp -d)"
  trap 'rm -rf "$inputs"' EXIT
  python -m launch.support.questions docs/faq.md "$inputs"
  say "fine-tuning it on two ranks, into $run"
  "${start[@]}" launch/finetune.py --model "$model" --data "$inputs/questions.jsonl" \
    --prompts "$inputs/prompts.txt" --config ds_configs/finetune_laptop.json --steps 60 \
    --out "$run" "$@"
  show
  python -m launch.support.questions --replies "$run/result.json"
  echo
  say_next
  exit
fi

say "training on two ranks behind an emulated link (ds_configs/laptop.json), into $run"
"${start[@]}" launch/train.py --config ds_configs/laptop.json --model nano \
  --steps 360 --eval-every 120 --out "$run" "$@"
show

prompts=("The for statement" "To open a file")
replies=()
for i in "${!prompts[@]}"; do
  printf '\n> %s\n' "${prompts[$i]}"
  ds-gradprune reply --model "$run/model" --prompt "${prompts[$i]}" --seed 0 \
    --max_new_tokens 60 | tee "$run/reply_$i.txt"
  replies+=("$run/reply_$i.txt")
done

echo
say "A model of 1M parameters babbles. launch/quickstart.sh --finetune takes a real one."
say_next
python -m launch.support.summary "$run" "${replies[@]}"
