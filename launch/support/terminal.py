"""A terminal, or a pipe to `head`, may go away before a run of hours has ended."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Lasting:
    """A stream that drops what is written when its reader is gone.

    Args:
        stream: of text.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop: there is nobody to tell of it."""
        try:
            return int(self._stream.write(text))
        except OSError:
            return len(text)

    def flush(self) -> None:
        """The same."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """The loss of standard output or error ends nothing inside. Local."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
