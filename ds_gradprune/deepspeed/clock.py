"""Where time comes from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from; tests put a virtual one in.

    Attributes:
        now_s: seconds, monotonic.
        sleep: waits so many seconds (only emulated links do).
    """

    now_s: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep
