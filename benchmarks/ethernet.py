"""ds_gradprune against what users would pick instead, on real shaped links.

What limits the quantity: a dense step of P parameters sends 4 P bytes per host with two hosts, and
the link carries rate / 8 bytes per second; a compressed one sends less and computes more. Hosts are
network namespaces behind `tc` (tools/netbed), so TCP, its headers and its queues are real;
they share this machine's cores, so compute is not. Every method trains the same model on the same
tokens in the same order with the same AdamW; bytes are those of the interface counters.

    sudo python benchmarks/ethernet.py --hosts 2 --rates 20mbit,100mbit,1gbit --text FILE

Needs root, iproute2, openssh-server and pdsh; `--bed none` runs on the loopback interface instead,
unshaped and uncounted. A loss is measured where a run was made at that rate; methods whose loss
does not depend on the link are run once unshaped, and their times at a rate come from a short
stretch: such rows are marked.

`--zero-stage` is that of every method in DeepSpeed, `--ranks-per-host` ranks form an island, and
`--model smollm2` fine-tunes a real model of 135M parameters (labs/smollm2.py).

`topk_*` and `ours` prune the gradient, `islands_*` and `ours_update` the update; the first of each
pair at a fixed density, the second under the controller.

1-bit Adam and 0/1 Adam are simulated: their last release, DeepSpeed 0.19.6, packs signs with CuPy
(backends nccl and mpi), torch_npu (hccl) or a SYCL kernel (compressed); none runs on a CPU. Here
the same update is made with the same packed bits on the wire (labs/race/onebit_adam.py says
where it differs), on schedules scaled to the run (labs/race/job.py). zeroone_adam exchanges
in every step, which is its authors' rule where the learning rate does not fall; zeroone_adam_4 lets
the interval grow to 4 steps.

The last line of stdout is one JSON document: results, one row per method and rate
(labs/race/figures.py says what its keys mean), and the link rate below which the first topk method
beats dense_fp32 (null: the winner is the same everywhere).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from labs.race.command import main

    sys.exit(main(description=__doc__))
