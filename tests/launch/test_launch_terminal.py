"""Whoever reads the output may go away: the run goes on."""

from __future__ import annotations

import os
import sys

import pytest
from tqdm import tqdm

from launch.support.shown import say
from launch.support.terminal import outlived


def test_a_reader_that_has_left_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.py | head` killed rank 0 at its next line, and with it the run."""
    reads, writes = os.pipe()
    os.close(reads)
    stream = os.fdopen(writes, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(BrokenPipeError):  # noqa: PT012 - either may be the one
        say("a line")
        stream.flush()
    with outlived():
        say("a line")
        for _ in tqdm(range(3), file=sys.stderr):
            pass
        print("a line", file=sys.stderr, flush=True)
        assert sys.stderr.fileno() == writes
    assert sys.stderr is stream
    os.dup2(1, writes)  # so that closing it can write what is left
    stream.close()
