"""The timeline laboratory: what it reads from a trace, and what its page says."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.profiler import record_function

from labs.timeline.__main__ import cases, page, summed
from labs.timeline.rank import traced


def test_a_trace_is_reduced_to_the_named_ranges_of_one_step() -> None:
    spans = [(0.0, 1.0)]

    def step() -> None:
        with record_function("forward"):
            torch.ones(8).sum()
        with record_function("something else"):
            torch.ones(8).sum()
        with record_function("backward"):
            torch.ones(8).sum()

    found = traced(step, spans)
    assert [row[0] for row in found["main"]] == ["forward", "backward"]
    assert found["thread"] == []
    assert found["link"] == spans == []  # only of this step
    (_, first, long), (_, second, _) = found["main"]
    assert 0.0 <= first <= first + long <= second + 0.1 <= found["step_ms"] + 0.2


def measured(step_s: float) -> dict[str, Any]:
    return {
        "step_s": step_s,
        "compute_s": 0.25,
        "codec_s": 0.125,
        "exposed_s": 0.25,
        "hidden_s": 0.75,
        "wire_bytes": 2e6,
    }


def test_the_page_holds_medians_over_rounds_and_the_share_that_was_hidden() -> None:
    rounds = [{"a": measured(step_s)} for step_s in (0.5, 0.75, 2.0)]
    table = summed(rounds)
    assert table["a"]["step_s"] == 0.75
    assert table["a"]["spread_s"] == [0.5, 2.0]
    assert table["a"]["hidden_fraction"] == 0.75
    versions = {"torch": "1", "deepspeed": "2"}
    document = {
        "commit": "abc",
        "date": "today",
        "machine": {"cpu": "c", "cores": 2, "load_average": [0.0], "versions": versions},
        "density": 0.05,
        "rounds": 3,
        "steps": 8,
        "cases": table,
    }
    assert "| a | 750 (500 to 2000) | 250 | 125 | 250 | 750 | 75 % | 2.00 |" in page(
        document, "command", "timeline"
    )


def test_every_exchange_is_waited_for_and_hidden() -> None:
    names = list(cases(0.05))
    assert [re.sub("waited for", "hidden", name) for name in names[::2]] == names[1::2]
    assert all(kind["density"] == 0.05 for kind in cases(0.05).values())
