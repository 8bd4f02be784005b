"""labs/stages.py: turns at every rate, and the slowest rank of all hosts."""

from __future__ import annotations

from typing import Any

from labs.stages import Case, row

ZEROS = {"loss": 0.0, "compute_s": 0.0, "codec_s": 0.0, "comm_s": 0.0}
OTHERS = {"payload_bytes": None, "density": None, "kind": "usual"}


class FakeCrew:
    """Two ranks whose steps take known times.

    Args:
        first_s: of the first step of the first rank; each next step takes a second more.
    """

    num_parameters = 7

    def __init__(self, first_s: float) -> None:
        self._next_s, self._steps = first_s, 0

    def tell(self, command: dict[str, Any]) -> None:
        self._steps = command["steps"]

    def hear(self) -> list[dict[str, Any]]:
        times = [self._next_s + n for n in range(self._steps)]
        self._next_s += self._steps
        return [
            {
                "rest_bytes": int(self._next_s),
                "peak_bytes": 9 + rank,
                "steps": [
                    ZEROS | OTHERS | {"step": n, "wall_s": s - rank} for n, s in enumerate(times)
                ],
            }
            for rank in range(2)
        ]


class FakeBed:
    """Remembers the rates."""

    def __init__(self) -> None:
        self.rates: list[str | None] = []

    def set_rate(self, rate: str | None) -> None:
        self.rates.append(rate)


def test_the_slowest_rank_of_all_hosts_counts_but_in_the_first_step_of_a_turn() -> None:
    case: Any = Case([FakeCrew(1.0), FakeCrew(5.0)], ["20mbit", None])  # type: ignore[list-item]
    bed: Any = FakeBed()
    case.take_turns(bed, 2)
    case.take_turns(bed, 2)
    assert case.seconds == {"20mbit": [6.0, 7.0, 12.0, 13.0], None: [9.0, 10.0, 15.0, 16.0]}
    assert case.memory == {"parameters": 7, "rest_bytes": 17, "peak_bytes": 10}
    assert bed.rates == ["20mbit", None, None, None] * 2


def test_a_row_holds_the_median_and_the_quartiles_distance() -> None:
    assert row([1.0, 2.0, 3.0, 4.0, 5.0]) == {"step_s": 3.0, "iqr_s": 3.0, "steps": 5}
