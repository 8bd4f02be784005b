"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere.

Knows nothing of what the fields mean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

PLAIN_LINES = 40
"""Without a terminal a run prints about so many progress lines, whatever its length."""


class Progress:
    """The steps of one run, on one stream.

    Args:
        total: steps of the whole run.
        done: steps finished before, by the run that is resumed.
        enabled: False on all ranks but one: then nothing is ever written.
        stream: where to, None: stderr; a terminal gets a bar, anything else a line now and then.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._done = done
        self._clock = clock
        self._began_s = clock()
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._every = max(1, total // PLAIN_LINES)
        self._bar: Any = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(total=total, initial=done, file=self._stream, unit="step")

    def step(self, step: int, fields: Mapping[str, str]) -> None:
        """Show one finished step.

        Args:
            step: counted from 1.
            fields: short name to short value, in the order to show.
        """
        if self._bar is not None:
            self._bar.set_postfix(fields, refresh=False)
            self._bar.update(1)
        elif self._enabled and (step % self._every == 0 or step == self._total):
            shown = "  ".join(f"{name} {value}" for name, value in fields.items())
            spent_s = self._clock() - self._began_s
            left_s = spent_s / max(1, step - self._done) * (self._total - step)
            left = tqdm.format_interval(left_s)
            print(f"step {step}/{self._total}  {shown}  left {left}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Show one line between the steps."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and end its line; twice is fine."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
