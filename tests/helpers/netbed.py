"""What the tests of the bed share: the mark of those that need one."""

from __future__ import annotations

import pytest

from tools.netbed import requirements

ABSENT = requirements.missing()
netns = [pytest.mark.netns, pytest.mark.skipif(ABSENT is not None, reason=ABSENT or "")]


def with_netns(test):
    """Mark a test that needs a bed."""
    for mark in netns:
        test = mark(test)
    return test
