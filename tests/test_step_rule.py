"""The factor on the islands' mean update."""

from __future__ import annotations

import pytest

from ds_gradprune.step_rule import update_scale


@pytest.mark.parametrize(("islands", "scale"), [(1, 1.0), (4, 2.0), (16, 4.0)])
def test_by_default_the_root_of_the_number_of_islands(islands: int, scale: float) -> None:
    assert update_scale(islands, None) == scale


def test_a_users_number_is_taken_as_it_is() -> None:
    assert update_scale(4, 1.5) == 1.5
