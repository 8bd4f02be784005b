"""Control laws side by side on simulated links and losses.

What limits the quantity: a law hears of a step's times one step later, and cannot tell a slower
link from a stall by one exchange; so after a fall of the rate two to four steps are late whatever
the law. The simulated run is a model of 124M parameters on 4 and on 8 hosts. Every law sees the
same noise, outliers and stragglers. Ours is the one that training uses, driven by the signals that
the ranks' headers would carry. Nothing is timed but the laws themselves.

    python -m labs.control --seeds 20 --steps 2000
    python -m labs.control rounds ...      islands whose interval the law chooses, see rounds --help
    python -m labs.control bed ...         ours on a real link that changes, see bed --help

With `--replay FILE`, a run that `bed` recorded: its link becomes one more for all laws, and the run
itself is made once more by the simulator, beside what was recorded (`replay` in the document).

The last line of stdout is one JSON document: under `laws`, for each law, `settle_down_p95`,
`settle_up_p95`, `late_down_p95` (steps), `in_budget`, `density_vs_oracle`, `density_vs_fill`,
`stationary_changes`, `false_miss` (null: the law does not look at the loss) and `update_us`.
"""

import sys

if __name__ == "__main__":
    sys.argv[0] = "python -m labs.control"  # as results pages say it
    if sys.argv[1:2] == ["bed"]:
        from labs.control import bed_command

        sys.exit(bed_command.main(sys.argv[2:]))
    if sys.argv[1:2] == ["rounds"]:
        from labs.control import rounds

        sys.exit(rounds.main(sys.argv[2:]))

    from labs.control.command import main

    sys.exit(main(description=__doc__))
