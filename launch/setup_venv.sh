#!/usr/bin/env bash
# Makes .venv beside this folder and installs the pinned dependencies and this package into it.
#
#   launch/setup_venv.sh          what training, replying, pictures and serving need
#   launch/setup_venv.sh --dev    the same and the tools of the tests
#
# A finished installation leaves a stamp that names its inputs, so the next call is over at once.
# Environment:
#   PYTHON           interpreter that makes the venv (default python3; the pins need 3.11 or newer)
#   TORCH_INDEX_URL  where a machine without a GPU takes PyTorch's CPU build from; without it pip
#                    decides, and may fetch the CUDA build of several GB
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="${PYTHON:-python3}"

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] %s\n' "$*" >&2; exit 2; }

kind=run
case "${1:-}" in
  "") ;;
  --dev) kind=dev ;;
  *) fail "unknown option '$1': setup_venv.sh takes nothing or --dev." ;;
esac

command -v "$python" >/dev/null || fail "$python is not installed. Install Python 3.11 or newer."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$("$python" --version) is too old. The pinned packages need 3.11: set PYTHON to a newer one."

# What the installation depends on. The folder is part of it: the package is installed in place.
extras="deepspeed,textgen,plot,serve"
inputs() {
  cat "$root/constraints.txt" "$root/pyproject.toml"
  "$python" --version
  echo "$root" "$extras"
}
key="$(inputs | "$python" -c 'import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"

stamped() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$key" ]; }

install() {
  local torch_options=()
  if [ ! -x "$venv/bin/python" ]; then
    say "making $venv"
    "$python" -m venv "$venv" \
      || fail "python -m venv failed. On Debian and Ubuntu: apt-get install python3-venv."
  fi
  rm -f "$venv"/.installed-*
  local pip=("$venv/bin/python" -m pip -qq --disable-pip-version-check install
             --constraint "$root/constraints.txt")

  say "installing pip and setuptools"
  "${pip[@]}" --upgrade pip setuptools

  # PyTorch first and on its own: which build it is must not depend on what else asks for it.
  if ! command -v nvidia-smi >/dev/null; then
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
      torch_options=(--extra-index-url "$TORCH_INDEX_URL")
      say "no GPU here: PyTorch's CPU build is taken from TORCH_INDEX_URL"
    else
      say "no GPU here and TORCH_INDEX_URL is not set: pip chooses PyTorch's build (see README.md)"
    fi
  fi
  say "installing PyTorch"
  "${pip[@]}" ${torch_options[@]+"${torch_options[@]}"} torch

  say "installing DeepSpeed, transformers and this package"
  "${pip[@]}" --no-build-isolation --editable "$root[$extras]"
  if [ "$kind" = dev ]; then
    say "installing the tools of the tests"
    "${pip[@]}" --group "$root/pyproject.toml:dev"
    printf '%s\n' "$key" > "$venv/.installed-dev"
  fi
  printf '%s\n' "$key" > "$venv/.installed-run"
}

if stamped "$kind"; then
  say "$venv is up to date"
else
  start=$SECONDS
  install
  say "installed in $((SECONDS - start)) s"
fi
