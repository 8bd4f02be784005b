"""Ours against static densities on a real link whose rate changes while it trains.

What limits the quantity: the link carries rate / 8 bytes per second, and a static density is right
for one rate only; what a changing density gains is what each static one loses on the other rates.
Every method trains the same model on the same tokens in the same order, through the same rates:
--by steps gives each rate the same share of the steps, --by time changes the rate on the training's
own clock, as a network would.

    sudo python benchmarks/control_bed.py --rates 1gbit,200mbit,50mbit,500mbit --text FILE

Needs what benchmarks/ethernet.py needs; `--bed none` runs unshaped on the loopback interface, to
try the script. Every step's times are in the JSON file of --out, and
`benchmarks/control.py --replay FILE` plays the link that was recorded to all laws.

The last line of stdout is one JSON document: for each method `wall_s`, `wall_s_to_loss` (null:
never), `val_loss`, `in_budget`, `density_min`, `density_max`, `changes`; and `speedup`: the best
static density's time to the loss over ours. The loss is the worst final one of the static densities
and ours, so all that did not diverge reach it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from benchmarks.control_lab.bed_command import main

    sys.exit(main(description=__doc__))
