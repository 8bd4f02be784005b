"""Which ranks a supervisor starts again, and how often that counts."""

from __future__ import annotations

from launch.support.comebacks import Comebacks


def test_the_ranks_of_an_island_count_as_one_restart() -> None:
    counted: list[int] = []

    def may() -> bool:
        counted.append(1)
        return len(counted) < 4

    comebacks = Comebacks(4, lambda: True, may, 60.0, of_island=2)
    for host, rank, total in (
        ("a", 1, 1),  # its island is lost
        ("a", 0, 1),
        ("a", 0, 2),  # once more
        ("a", 1, 2),
        ("a", 2, 3),  # another island of this host
        ("b", 0, 4),  # one too many
    ):
        comebacks.rank_later(host, rank)
        assert len(counted) == total
    assert ("b", 0) not in comebacks._due_s
    assert set(comebacks._due_s) == {("a", 0), ("a", 1), ("a", 2)}
