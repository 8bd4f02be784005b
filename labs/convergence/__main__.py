"""What pruning costs in loss: methods, densities and seeds against dense, per bit received.

N simulated hosts in one process train a small GPT on the bytes of a real text. Islands and pruned
gradients are the product's own classes over a loopback, and their bits are the bytes that its
channel counts. Dense, 1-bit Adam and PowerSGD are counted as rings and halves of them. Bits are
per parameter and step, after warm-up. Gaps are paired: the same seed gives the same weights and
the same sequences.

    python -m labs.convergence --grid labs/convergence/grids/frontier.json --text FILE \
        --steps 3000 --seeds 3 --workers 4 --out results/frontier.json

A finished run is one line of convergence_runs.jsonl beside --out. A run that is there is not made
again, by whichever grid, so a grid can be stopped at any time, and widened. Beside --out lie the
page (.md) and the picture (.png). Every run takes one thread; --jobs 2 makes two at a time.

With --device cuda the islands train on the accelerator. The product exchanges on the host, or with
--exchange-device cuda on the accelerator. A run's key names the device, unless it is the CPU.
`labs.convergence.campaign` makes the runs of many grids there, side by side.

The last line of stdout is one JSON document: {"rows": [{"method", "bits_per_param", "val_loss",
"gap_pct", "gap_std", "gap_error", "seeds", ...}]}, dense included.
"""

import sys

from labs.convergence.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
