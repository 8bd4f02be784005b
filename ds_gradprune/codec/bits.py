"""Numbers of 1 to 12 bits, packed without gaps. Local functions only.

Eight numbers of `width` bits are one group of `width` bytes. Up to 8 bits, the first number takes
the lowest bits of the group read as a little-endian integer. From 9 bits on, a group is the
numbers' low bytes and then a group of their remaining bits. A last group of fewer numbers leaves
out what it has not; its unused bits are zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ds_gradprune.codec.header import Bytes
from ds_gradprune.errors import WireFormatError

_LANES = (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)
"""Every second byte, pair of bytes, four bytes of a 64-bit word."""


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` numbers of `width` bits take; none at width 0."""
    if width > 8:
        return count + packed_bytes(count, width - 8)
    return -(-count * width // 8)


def pack(numbers: npt.NDArray[np.int16] | Bytes, width: int, out: Bytes) -> None:
    """Fill `out`, (packed_bytes,), from the lowest `width` bits, 0 .. 12, of (n,) numbers."""
    count = len(numbers)
    whole = count // 8
    if width > 8:
        groups = out[: whole * width].reshape(whole, width)
        rest = out[whole * width :]
        np.bitwise_and(
            numbers[: whole * 8].reshape(whole, 8), 0xFF, out=groups[:, :8], casting="unsafe"
        )
        groups[:, 8:] = _narrowed(numbers[: whole * 8] >> 8, width - 8)
        last = numbers[whole * 8 :]
        rest[: len(last)] = last & 0xFF
        pack(last >> 8, width - 8, rest[len(last) :])
    elif width and count:
        groups = _narrowed(numbers, width)
        out[: whole * width].reshape(whole, width)[:] = groups[:whole]
        out[whole * width :] = groups[-1, : len(out) - whole * width]


def unpack(data: Bytes, count: int, width: int) -> npt.NDArray[np.int16]:
    """The (count,) numbers of `width` bits in (packed_bytes,) bytes; zeros at width 0.

    Raises:
        WireFormatError: an unused bit is not zero.
    """
    numbers = np.zeros(count, dtype=np.int16)
    whole = count // 8
    groups, rest = data[: whole * width].reshape(whole, width), data[whole * width :]
    if width > 8:
        wide = numbers[: whole * 8]
        wide[:] = _widened(groups[:, 8:])
        np.left_shift(wide, 8, out=wide)
        wide.reshape(whole, 8)[:] |= groups[:, :8]
        last = count % 8
        numbers[whole * 8 :] = unpack(rest[last:], last, width - 8) << 8 | rest[:last]
    elif width and count:
        numbers[: whole * 8] = _widened(groups)
        if len(rest):
            padded = np.zeros((1, width), dtype=np.uint8)
            padded[0, : len(rest)] = rest
            last_numbers = _widened(padded)
            if last_numbers[count % 8 :].any():
                raise WireFormatError("payload's unused bits must be zeros.")
            numbers[whole * 8 :] = last_numbers[: count % 8]
    return numbers


def _narrowed(numbers: npt.NDArray[np.int16] | Bytes, width: int) -> Bytes:
    """(n,) numbers, their lowest 1 .. 8 bits, as (n / 8 rounded up, width) bytes."""
    padded = np.zeros(-(-len(numbers) // 8) * 8, dtype=np.uint8)
    np.bitwise_and(numbers, (1 << width) - 1, out=padded[: len(numbers)], casting="unsafe")
    words = padded.view("<u8")
    # Neighbours move together: lanes of 1, 2 and 4 numbers become lanes of 2, 4 and 8.
    for step, lanes in enumerate(_LANES):
        gap = np.uint64((8 - width) << step)
        words = words & np.uint64(lanes) | (words & ~np.uint64(lanes)) >> gap
    as_bytes: Bytes = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    return as_bytes.reshape(-1, 8)[:, :width]


def _widened(groups: Bytes) -> Bytes:
    """(groups, width) bytes as the (8 * groups,) numbers in them, width 1 .. 8."""
    width = groups.shape[1]
    padded = np.zeros((len(groups), 8), dtype=np.uint8)
    padded[:, :width] = groups
    words = padded.reshape(-1).view("<u8")
    for step in (2, 1, 0):
        # Of every lane of 2 << step bytes the lower numbers stay, the upper ones move up.
        gap = np.uint64((8 - width) << step)
        upper = words << gap & ~np.uint64(_LANES[step])
        words = words & np.uint64(_lower(width, step)) | upper
    as_bytes: Bytes = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    return as_bytes


def _lower(width: int, step: int) -> int:
    """Masks the lower `width << step` bits of every lane of ``2 << step`` bytes."""
    mask = (1 << (width << step)) - 1
    return sum(mask << start for start in range(0, 64, 16 << step))
