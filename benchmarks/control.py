"""Control laws side by side on simulated links and losses.

What limits the quantity: a law hears of a step's times one step later, and cannot tell a slower
link from a stall by one exchange; so after a fall of the rate two to four steps are late whatever
the law. The simulated run is a model of 124M parameters on 4 and on 8 hosts; every law sees the
same noise, outliers and stragglers, and ours is the one that training uses, driven by the signals
that the ranks' headers would carry. Nothing is timed but the laws themselves.

    python benchmarks/control.py --seeds 20 --steps 2000

With `--replay FILE`, a run that benchmarks/control_bed.py recorded: its link becomes one more for
all laws, and the run itself is made once more by the simulator, beside what was recorded (`replay`
in the document).

The last line of stdout is one JSON document: under `laws`, for each law, `settle_down_p95`,
`settle_up_p95`, `late_down_p95` (steps), `in_budget`, `density_vs_oracle`, `density_vs_fill`,
`stationary_changes`, `false_miss` (null: the law does not look at the loss) and `update_us`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from benchmarks.control_lab.command import main

    sys.exit(main(description=__doc__))
