"""Time on a device that works on its own: a phase ends when its work is done, not when queued."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.deepspeed import clock as module
from ds_gradprune.deepspeed.clock import after_device
from ds_gradprune.train.stopwatch import Stopwatch
from tests.helpers.ranks import VirtualClock


class Accelerator:
    """Work that was queued takes its time when somebody waits for it."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.queued_s = clock, 0.0

    def synchronize(self) -> None:
        self.clock.sleep(self.queued_s)
        self.queued_s = 0.0


def test_on_the_cpu_the_clock_is_read_as_it_is() -> None:
    clock = VirtualClock()
    assert after_device(clock.now_s, torch.device("cpu")) == clock.now_s


def test_work_that_an_accelerator_does_later_counts_where_it_was_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = VirtualClock(tick_s=0.0)
    device = Accelerator(clock)
    monkeypatch.setattr(module, "get_accelerator", lambda: device)
    watch = Stopwatch(after_device(clock.now_s, torch.device("cuda", 0)))
    watch.start()
    device.queued_s = 5  # forward, backward, optimizer
    with watch.phase("codec"):
        device.queued_s = 2
        with watch.phase("wire"):
            clock.sleep(3)
    times, _ = watch.lap()
    assert (times.compute_s, times.codec_s, times.wire_s) == (5, 2, 3)
