"""The key that lets a run go on without a lost island, and what it cannot be used with."""

from __future__ import annotations

from typing import Any

import pytest

from ds_gradprune.config import load_block
from ds_gradprune.errors import ConfigError


def block(**keys: Any) -> dict[str, Any]:
    return {"gradient_pruning": {"min_islands": 2} | keys}


def test_it_is_off_unless_asked_for() -> None:
    assert load_block({"gradient_pruning": {}}).min_islands is None
    assert load_block(block()).min_islands == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prune": "gradient"}, 'min_islands must be null with prune = "gradient", got 2'),
        ({"exchange": "owner_reduce"}, 'exchange must be "all_gather" with min_islands, got "own'),
        ({"transport": "mpi"}, 'transport must be "torch" with min_islands, got "mpi"'),
        ({"min_islands": 0}, "gradient_pruning.min_islands must be"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_block(block(**keys))
    assert message in str(caught.value)
