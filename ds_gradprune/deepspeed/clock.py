"""Where time comes from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from; tests put a virtual one in.

    Attributes:
        now_s: seconds, monotonic.
        sleep: waits so many seconds (only emulated links do).
    """

    now_s: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep


def after_device(now_s: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """A clock that first waits for everything an accelerator was told to do.

    Work is queued there and done later: without the wait, the seconds of a backward would count
    where somebody next reads a number from the device.

    Args:
        now_s: the clock.
        device: where the model lies; on the CPU work is done when a call returns.
    """
    if device.type == "cpu":
        return now_s

    def read() -> float:
        get_accelerator().synchronize()
        return now_s()

    return read
