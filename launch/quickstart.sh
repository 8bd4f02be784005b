#!/usr/bin/env bash
# From a fresh clone to a text generator that replies, over a link that is slow and gets worse.
#
# Makes .venv (launch/setup_venv.sh), trains the 1M-parameter model on two ranks of this machine
# behind an emulated link (ds_configs/laptop.json: 20 Mbit/s, then 5, then 20 again), shows how the
# density followed it, and prints replies to two prompts. The last line of stdout is one JSON
# document. Runs on the CPU even where there is a GPU, since two ranks need two devices.
#
#   launch/quickstart.sh [flags of launch/train.py, for example --steps 60]
#
# The run lies in runs/quickstart. An earlier one is kept: it is moved to runs/quickstart-<time>.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
started=$SECONDS
say() { printf '[quickstart] %s\n' "$*"; }

launch/setup_venv.sh
export PATH="$root/.venv/bin:$PATH"       # deepspeed and ninja
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
export HF_HUB_OFFLINE=1                   # everything needed is here

run=runs/quickstart
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
say "training on two ranks behind an emulated link (ds_configs/laptop.json), into $run"
deepspeed --log_level error --num_accelerators 2 --master_port "$port" launch/train.py \
  --config ds_configs/laptop.json --model nano --steps 360 --eval-every 120 --out "$run" "$@"

echo
python -m ds_gradprune report "$run"

prompts=("The for statement" "To open a file")
replies=()
for i in "${!prompts[@]}"; do
  printf '\n> %s\n' "${prompts[$i]}"
  python launch/reply.py --model "$run/model" --prompt "${prompts[$i]}" --seed 0 \
    --max_new_tokens 60 | tee "$run/reply_$i.txt"
  replies+=("$run/reply_$i.txt")
done

echo
say "done in $((SECONDS - started)) s; ask more: .venv/bin/python launch/reply.py --model $run/model"
python -m launch.support.summary "$run" "${replies[@]}"
