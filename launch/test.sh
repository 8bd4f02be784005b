#!/usr/bin/env bash
# Every check of the project: format, lint, types, tests. Makes .venv with the tools they need.
#
#   launch/test.sh [arguments of pytest, for example -m "not slow" or tests/config]
#
# Without arguments three things run side by side: mypy, the tests that start processes of their own,
# whose time is mostly waiting, and all other tests.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
launch/setup_venv.sh --dev
export PATH="$root/.venv/bin:$PATH"

step() { printf '\n[test] %s\n' "$*"; "$@"; }
step ruff format --check .
step ruff check .
if [ $# -gt 0 ]; then
  step mypy
  step pytest "$@"
  exit
fi

apart=(tests/launch tests/tools tests/labs)
logs="$(mktemp -d)"
printf '\n[test] mypy and pytest %s, beside all others\n' "${apart[*]}"
mypy >"$logs/types" 2>&1 &
types=$!
pytest --durations=25 "${apart[@]}" >"$logs/apart" 2>&1 &
first=$!
pytest --durations=25 "${apart[@]/#/--ignore=}" >"$logs/others" 2>&1 &
second=$!
failed=0
for job in "$types" "$first" "$second"; do
  wait "$job" || failed=1
done
cat "$logs/types" "$logs/apart" "$logs/others"
rm -rf "$logs"
[ "$failed" = 0 ] || { printf '\n[test] failed\n'; exit 1; }
