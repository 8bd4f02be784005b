"""A bed for the tests of beds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from tools.netbed import Bed


@pytest.fixture(scope="module", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Beds in a folder of our own: others on this machine neither add to it nor sweep it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("beds"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def shared_bed() -> Iterator[Bed]:
    with Bed(hosts=2, rate="100mbit") as bed:
        yield bed


@pytest.fixture
def bed(shared_bed: Bed) -> Iterator[Bed]:
    """Two hosts at 100 Mbit/s."""
    yield shared_bed
    shared_bed.set_rate("100mbit")
    shared_bed.set_link(up=True)
