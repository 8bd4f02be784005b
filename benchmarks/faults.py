"""The fault laboratory: scripted and random schedules of faults, and what becomes of the runs.

    python benchmarks/faults.py --loopback 300 --seed 1
    sudo python benchmarks/faults.py --bed 30 --bed-lost 18 --seed 1

On loopback the product's own algorithms, loop, channels, codecs and checkpoints run as threads. A
rank raises, is killed or frozen inside a call, is late, sends or receives a flipped bit, learns
nan, counts a step less, differs in a bit, or finds the disk full, and a bit of a checkpoint flips.
After a fault the run goes on from its last whole checkpoint. What was put in, over all ranks and
steps, must be what was delivered and what is still owed, within a bound of fp32's rounding, and a
run that was resumed must end with the bits of an unbroken one.

On the bed (root, iproute2, openssh-server) hosts are network namespaces behind shaped links. A rank
is killed or frozen, a cable is pulled for good or for seconds, packets of one direction are lost,
the rate falls. Two thirds of the runs are started by launch/supervise.py, and must finish. The
others must end typed, on every rank that lives. With --bed-lost three hosts are started with
`min_islands` and by hand, with --ranks ranks each: who can still be reached must train on to the
end.

The last line of stdout is one JSON document: schedules, finished, typed_error, hung, untyped,
diverged, lost_gradient, recover_s_p95 (from a deed that lasts to the first step of the run that
launch/supervise.py has started again), typed_s_p95 (from a deed to the end of the last rank without
a supervisor).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from labs.faults.command import main

    sys.exit(main(description=__doc__))
