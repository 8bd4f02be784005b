#!/usr/bin/env bash
# Every check of the project: format, lint, types, tests. Makes .venv with the tools they need.
#
#   launch/test.sh [arguments of pytest, for example -m "not slow" or tests/test_config.py]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
launch/setup_venv.sh --dev
export PATH="$root/.venv/bin:$PATH"

step() { printf '\n[test] %s\n' "$*"; "$@"; }
step ruff format --check .
step ruff check .
step mypy
step pytest "$@"
