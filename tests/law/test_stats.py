"""Small statistics of the law."""

import itertools
import math

import pytest

from ds_gradprune.law.stats import clamp

NUMBERS = (-math.inf, -2.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, math.inf)


def test_clamped_numbers_are_those_of_max_and_min() -> None:
    for x, least, most in itertools.product(NUMBERS, repeat=3):
        if least <= most:
            assert clamp(x, least, most) == max(least, min(most, x))


@pytest.mark.parametrize(("x", "clamped"), [(0, 1), (1, 1), (3, 3), (7, 7), (8, 7)])
def test_whole_numbers_stay_whole(x, clamped) -> None:
    assert clamp(x, 1, 7) == clamped
    assert isinstance(clamp(x, 1, 7), int)


def test_what_is_no_number_is_the_least() -> None:
    assert clamp(math.nan, -1.0, 1.0) == -1.0
