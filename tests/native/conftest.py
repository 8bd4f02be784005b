"""What the tests of this room share: the kernels, and numbers that are hard on them."""

from __future__ import annotations

import pytest

from ds_gradprune.native import library
from ds_gradprune.native.library import Kernels
from tests.helpers.hard_numbers import HARD, Hard


@pytest.fixture(scope="session")
def native() -> Kernels:
    kernels = library.kernels()
    if kernels is None:
        pytest.skip("needs the native kernels, so a C++ compiler")
    return kernels


@pytest.fixture(params=list(HARD))
def hard(request: pytest.FixtureRequest) -> Hard:
    return HARD[request.param]
