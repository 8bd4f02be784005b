#!/bin/bash
# torch 2.13.0 (CPU, two processes, gloo, one host).
#
# Every process group is given a timeout of 3 s. Rank 0's process, which keeps the store, is frozen
# (SIGSTOP, as by a host that hangs or a cable that is out). What rank 1 is in the middle of:
#
#   all_reduce: RuntimeError after 3 s
#   new_group: still waiting after 20 s
#   store.get: still waiting after 20 s
#
# The timeout bounds collectives. A question to the store, and so new_group, whose ranks meet in the
# store, waits for the frozen process without end. The store was given the same 3 s.
#
# Exits 0 while that is so, 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT, WATCHED = timedelta(seconds=3), 20.0


def rank(number, port, call):
    store = dist.TCPStore("127.0.0.1", port, 2, number == 0, timeout=LIMIT)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=LIMIT)
    dist.barrier()
    if number == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1.0)  # rank 0 is frozen by now
    calls = {
        "all_reduce": lambda: dist.all_reduce(torch.ones(1)),
        "new_group": lambda: dist.new_group([0, 1], timeout=LIMIT),
        "store.get": lambda: store.get("nobody sets this"),
    }
    ended = []

    def work():
        began = time.monotonic()
        try:
            calls[call]()
            ended.append("returned")
        except Exception as exc:
            ended.append(f"{type(exc).__name__} after {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WATCHED)
    print(f"{call}: {ended[0] if ended else f'still waiting after {WATCHED:.0f} s'}", flush=True)
    os._exit(0 if bool(ended) == (call == "all_reduce") else 1)


def main():
    codes = []
    for call in ("all_reduce", "new_group", "store.get"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks = [
            subprocess.Popen([sys.executable, __file__, number, port, call]) for number in "01"
        ]
        codes.append(ranks[1].wait())
        ranks[0].kill()
        ranks[0].wait()
    sys.exit(max(codes))


if len(sys.argv) > 1:
    rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
else:
    main()
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" 2>/dev/null
