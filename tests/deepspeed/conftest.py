"""One process that has imported everything for the ranks of this folder's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.fork_ranks import Ranks
from tests.helpers.zero_bench import WARM


@pytest.fixture(scope="session")
def cradle() -> Iterator[Ranks]:
    """Every start of ranks is a fork of it."""
    ours = ["cases", "faults", "features", "files"]
    modules = ["ds_gradprune.deepspeed.attach", *(f"tests.helpers.zero_{name}" for name in ours)]
    with Ranks([*WARM, *modules]) as ranks:
        yield ranks
