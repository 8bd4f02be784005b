"""What a run of islands says when it starts."""

from __future__ import annotations

from typing import Any

import pytest

from ds_gradprune.config import BLOCK, load_block
from ds_gradprune.deepspeed.opening import opening


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ({}, "4 islands exchange updates after every step, waited for; update_scale is 2"),
        (
            {"overlap": "auto"},
            "4 islands exchange updates after every step, hidden behind the next steps; "
            "update_scale is 2",
        ),
        (
            {"overlap": "auto", "update_scale": 1.5, "sync_every": 5},
            "4 islands exchange updates every 5 steps, hidden behind the next steps; "
            "update_scale is 1.5",
        ),
        (
            {"sync_every": "auto"},
            "4 islands exchange updates as often as the law says, waited for; "
            "update_scale is 2 up to 0.0312 of the elements, 1 where all go",
        ),
    ],
)
def test_it_names_interval_and_factor(block: dict[str, Any], line: str) -> None:
    assert opening(load_block({BLOCK: block}), 4) == line
