"""What pruning costs in loss: methods, densities and seeds against dense, per bit received.

N simulated hosts in one process train a small GPT on the bytes of a real text. What is sent passes
the plug-in's own selection and codec (values below 16 bits, where the codec has none, are
simulated and the page says so). Received bits are those of an all-gather for pruned methods, of a
ring all-reduce for dense, PowerSGD and 1-bit Adam's two halves, per parameter and step, after
warm-up. Gaps are paired: the same seed gives the same weights and the same sequences.

    python benchmarks/convergence.py --grid benchmarks/grids/frontier.json --text FILE \
        --steps 3000 --seeds 3 --workers 4 --out results/frontier.json

A finished run is one line of convergence_runs.jsonl beside --out; a run that is there is not made
again, by whichever grid, so a grid can be stopped at any time, and widened. Beside --out lie the
page (.md) and the picture (.png).

The last line of stdout is one JSON document: {"rows": [{"method", "bits_per_param", "val_loss",
"gap_pct", "gap_std", "seeds", ...}]}, dense included.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from benchmarks.convergence_lab.command import main

    sys.exit(main(description=__doc__))
