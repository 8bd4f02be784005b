#!/bin/bash
# DeepSpeed 0.19.8 (torch 2.13.0, CPU, one host, two ranks).
#
# A host that is taken away (spot), systemd and `kill` send SIGTERM to the process that they know,
# the `deepspeed` command. On one host it dies of it at once, and passes it on to nobody. Its child
# `deepspeed.launcher.launch` would end the ranks, but hears nothing: they go on, keep their port,
# their memory and their GPUs, and write on. launcher/runner.py listens to signals only where it
# starts several hosts with pdsh:
#
#   after SIGTERM: deepspeed ended with -15, ranks alive 5 s later: 2
#
# Exits 0 while that is so, 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy
cat >"$folder/rank.py" <<'PYTHON'
import os
import sys
import time

open(f"{sys.argv[-1]}.{os.getpid()}", "w").close()
time.sleep(300)
PYTHON
cat >"$folder/finding.py" <<'PYTHON'
import glob
import os
import signal
import subprocess
import sys
import time


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def left(number):
    """The launcher's exit code, and how many ranks live on."""
    name = f"rank{int(number)}"
    words = ["venv/bin/deepspeed", "--num_accelerators", "2", "--master_port", "29512", "rank.py"]
    launcher = subprocess.Popen(
        [*words, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(glob.glob(f"{name}.*")) < 2:
        time.sleep(0.2)
    pids = [int(path.split(".")[1]) for path in glob.glob(f"{name}.*")]
    launcher.send_signal(number)
    code = launcher.wait(60)
    time.sleep(5)
    count = sum(alive(pid) for pid in pids)
    try:
        os.killpg(launcher.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return code, count


code, count = left(signal.SIGTERM)
print(f"after SIGTERM: deepspeed ended with {code}, ranks alive 5 s later: {count}")
sys.exit((code, count) != (-15, 2))
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
cd "$folder"
python3 finding.py
