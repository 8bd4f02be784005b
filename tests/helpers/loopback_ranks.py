"""Many ranks in one test that may all raise: threads on the loopback transport."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ds_gradprune.errors import GradPruneError
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.transport import Transport


def on_ranks(
    world_size: int, work: Callable[[Transport], Any], timeout_s: float = 30.0
) -> list[Any]:
    """What `work` returned on each rank, or the error of ours that it raised there.

    Any other exception is a failure of the test.
    """
    hub = LoopbackHub(world_size, timeout_s)
    answers: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            answers[rank] = work(hub.transport(rank))
        except GradPruneError as exc:
            answers[rank] = exc
        except BaseException as exc:
            failures.append(exc)
            hub.abort()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return answers
