#!/usr/bin/env bash
# Gather the wheels that a GPU machine lacks for labs/gpu_check.py, which has no package index.
#
#   labs/gpu_kit.sh [FOLDER]        default: .whl, which git ignores
#
# The machine is Linux x86-64 with CPython 3.12, PyTorch, transformers and numpy. There:
#
#   python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl
#   PYTHONPATH=/tmp/site python3 -m labs.gpu_check --out FILE.json
#
# Environment: PYTHON   a Python with pip (.venv/bin/python, else python3)
#              TARGET   CPython that the wheels are for (3.12)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
target=${TARGET:-3.12}

# Versions are those of constraints.txt: what the tests ran with.
names=(annotated-types google-crc32c hjson pydantic pydantic_core typing-inspection
  typing_extensions)
pins=()
for name in "${names[@]}"; do
  pins+=("$(grep -i "^$name==" constraints.txt)")
done

mkdir -p "$folder"
rm -f "$folder"/*.whl
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "$target" "${platforms[@]}" --dest "$folder" "${pins[@]}"
# DeepSpeed comes as source only. Without prebuilt ops its wheel is plain Python.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" \
  "$(grep -i '^deepspeed==' constraints.txt)"
ls -l "$folder"
du -sh "$folder"
