"""Islands leave and join over gloo: every epoch is a group of its own beside torch's world."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from ds_gradprune.wire.members import NEVER
from tests.helpers.ranks import run_processes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(100)]


@pytest.mark.parametrize("absent", [0, 1])
def test_processes_go_on_without_one_and_let_it_in_again(absent: int) -> None:
    """The first one as well: the store lives apart."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    given = {"port": store.port, "absent": absent}
    told = run_processes(3, "tests.helpers.epochs_main", "lose_and_find", given, timeout_s=80)
    others = [island for island in range(3) if island != absent]
    assert [one["first"] for one in told] == [[0, 1, 2]] * 3
    for island in others:
        assert "no answer" in told[island]["fault"]
        assert told[island]["without"] == [others, True]
        assert told[island]["second"] == others
    assert f"go on without island {absent}" in told[absent]["left out"]
    assert [one["with"] for one in told] == [[[0, 1, 2], NEVER, False]] * 3
    assert [one["third"] for one in told] == [[10, 11, 12]] * 3
