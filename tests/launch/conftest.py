"""Inputs of a run, and the process that forks its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import scripts
from tests.helpers.forked import Nursery


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, model/ and config.json; tests leave it as it is."""
    return scripts.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("told")
    with Nursery(folder, scripts.script_environ(), scripts.ROOT) as nursery:
        yield nursery
