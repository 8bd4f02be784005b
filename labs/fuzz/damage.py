"""Bytes as a damaged file or wire would hold them."""

from __future__ import annotations

import random
from collections.abc import Sequence


def damaged(
    rng: random.Random, data: bytes, scraps: Sequence[bytes], most: int, kinds: int = 5
) -> bytes:
    """Data that was cut, grown, shortened, overwritten in a byte, or overwritten by a scrap. Pure.

    Args:
        rng: draws.
        data: whole.
        scraps: what is put in.
        most: damages at most; one at least.
        kinds: the first so many of those above.
    """
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(kinds)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + rng.choice(scraps) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + rng.randint(1, 8) :]
        elif kind == 3:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        else:
            data = data[:at] + rng.choice(scraps) + data[at + rng.randint(1, 4) :]
    return data
