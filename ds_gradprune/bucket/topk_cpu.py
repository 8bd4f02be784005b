"""The k largest magnitudes of every row of a matrix, exactly, ties by lowest index, on CPUs.

Knows nothing of buckets and layouts. Infinities and NaN count as larger than every number. This is
the reference of the native kernels, and what is used where they cannot be built.

How `CpuTopK` finds them without sorting a row::

    bits of |t|, 31 bits          key, 31 bits
    [ exponent, mantissa ]  --->  [ upper 19 bits of |t| | 4095 - index ]

The bits of |t| rise with |t| (IEEE 754), so one integer partition of the keys (quick-select, which
numpy runs on AVX-512 or AVX2) yields the k largest together with their places, and where the upper
bits tie, the lower index wins. What the 12 lost mantissa bits could change is decided among the few
elements that share the k-th key's upper bits: they are looked for in a margin of keys beside the
kept ones, and in the whole row where the margin is full (rows of zeros, for example).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

MAX_ROW_NUMEL = 4096
"""Longest row: an index takes 12 bits of a key."""

_INDEX_BITS = 12
_INDEX_MASK = MAX_ROW_NUMEL - 1
_MAGNITUDE_MASK = 0x7FFFFFFF
_UPPER_MASK = _MAGNITUDE_MASK ^ _INDEX_MASK
_MARGIN = 32
"""Keys looked at beside the kept ones; a full margin costs time, never exactness."""

_Int32: TypeAlias = npt.NDArray[np.int32]

_RANK: _Int32 = np.arange(MAX_ROW_NUMEL - 1, -1, -1, dtype=np.int32)
"""4095 - index: the lower index has the larger key."""


class CpuTopK:
    """Finds the largest magnitudes of every row, with reused scratch memory.

    Args:
        max_numel: most elements of one matrix; 4 bytes of scratch each.
    """

    def __init__(self, max_numel: int) -> None:
        self._scratch = np.empty(max_numel, dtype=np.int32)

    def __call__(self, t: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Find the largest magnitudes of every row.

        Args:
            t: (rows, row_numel) float32, contiguous; row_numel <= MAX_ROW_NUMEL.
            indices: (rows, k) int16, contiguous, 1 <= k < row_numel; receives the places,
                ascending in each row.
            values: (rows, k) float32, contiguous; receives the elements of `t` there.
        """
        array: npt.NDArray[np.float32] = t.numpy()
        bits: _Int32 = array.view(np.int32)
        keys = self._scratch[: bits.size].reshape(bits.shape)
        picked = _pick(bits, indices.shape[1], keys)
        np.copyto(indices.numpy(), picked, casting="unsafe")  # below 4096: fits
        flat = picked + np.arange(0, bits.size, bits.shape[1])[:, None]
        # "clip" never acts, but spares the copy that np.take makes for "raise".
        np.take(array.reshape(-1), flat, out=values.numpy(), mode="clip")


def _pick(bits: _Int32, k: int, keys: _Int32) -> _Int32:
    """Indices of the k largest magnitudes of every row, ascending; see the head of this file.

    Args:
        bits: (rows, row_numel), the bits of float32 numbers; not changed.
        k: elements to pick per row, 1 .. row_numel - 1.
        keys: (rows, row_numel), scratch.
    """
    row_numel = bits.shape[1]
    np.bitwise_and(bits, _UPPER_MASK, out=keys)
    np.bitwise_or(keys, _RANK[:row_numel], out=keys)
    margin = min(_MARGIN, row_numel - k)
    first = row_numel - k - margin
    keys.partition(first, axis=1)
    candidates = keys[:, first:].copy()
    lowest = candidates[:, 0] & _UPPER_MASK
    candidates.partition(margin, axis=1)
    upper = candidates[:, margin] & _UPPER_MASK
    tied = upper == candidates[:, :margin].max(axis=1) & _UPPER_MASK
    if tied.any():
        _settle_near(bits, candidates, margin, np.flatnonzero(tied & (lowest < upper)))
        _settle_far(bits, candidates, margin, np.flatnonzero(tied & (lowest == upper)), upper)
    picked: _Int32 = np.invert(candidates[:, margin:])
    np.bitwise_and(picked, _INDEX_MASK, out=picked)
    picked.sort(axis=1)
    return picked


def _settle_near(bits: _Int32, candidates: _Int32, margin: int, rows: npt.NDArray[np.intp]) -> None:
    """Rows in which all that share the k-th key's upper bits are candidates: rank those anew.

    Args:
        bits: (all rows, row_numel).
        candidates: (all rows, margin + k) keys; the k to pick come to lie after the margin.
        margin: candidates that are not picked.
        rows: which rows to settle.
    """
    if not rows.size:
        return
    ranks = candidates[rows] & _INDEX_MASK
    magnitude = bits[rows[:, None], ranks ^ _INDEX_MASK] & _MAGNITUDE_MASK
    exact = magnitude.astype(np.int64) << _INDEX_BITS | ranks
    exact.partition(margin, axis=1)
    candidates[rows] = exact & _INDEX_MASK


def _settle_far(
    bits: _Int32,
    candidates: _Int32,
    margin: int,
    rows: npt.NDArray[np.intp],
    upper: _Int32,
) -> None:
    """Rows in which elements with the k-th key's upper bits may lie anywhere: rank lower bits.

    Elements with other upper bits become the smallest or the largest of all, whatever they are.

    Args:
        bits: (all rows, row_numel).
        candidates: (all rows, margin + k) keys; the k to pick come to lie after the margin.
        margin: candidates that are not picked.
        rows: which rows to settle.
        upper: (all rows,) upper bits of the k-th keys.
    """
    if not rows.size:
        return
    row_numel = bits.shape[1]
    lower = (bits[rows] & _MAGNITUDE_MASK) - upper[rows, None]
    np.clip(lower, -1, MAX_ROW_NUMEL, out=lower)
    np.left_shift(lower, _INDEX_BITS, out=lower)
    np.bitwise_or(lower, _RANK[:row_numel], out=lower)
    first = row_numel - candidates.shape[1] + margin
    lower.partition(first, axis=1)
    candidates[rows, margin:] = lower[:, first:]
