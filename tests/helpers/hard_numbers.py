"""Arrays of float32 that are hard on selection and arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ds_gradprune.native.library import Floats

Hard = Callable[[int, int], Floats]
"""(numel, seed) -> values."""


def _signs(rng: np.random.Generator, numel: int) -> np.ndarray:
    return rng.integers(0, 2, numel, dtype=np.uint32) << np.uint32(31)


def _from_bits(low: int, high: int, numel: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    magnitudes = rng.integers(low, high, numel, dtype=np.uint32)
    return (magnitudes | _signs(rng, numel)).view(np.float32)


def _normal(numel: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(numel, dtype=np.float32)


def _with_nonfinite(numel: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(numel, dtype=np.float32)
    for wrong in (np.inf, -np.inf, np.nan):
        x[rng.random(numel) < 0.003] = wrong
    return x


def _heavy(numel: int, seed: int) -> Floats:
    """Magnitudes over the whole range of float32."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        return (rng.standard_normal(numel) * 10.0 ** rng.uniform(-45, 38, numel)).astype(np.float32)


HARD: dict[str, Hard] = {
    "normal": _normal,
    "heavy": _heavy,
    "ties": lambda numel, seed: np.round(3 * _normal(numel, seed)),
    "all_equal": lambda numel, seed: np.copysign(np.float32(0.3), _normal(numel, seed)),
    "zeros": lambda numel, seed: np.copysign(np.float32(0.0), _normal(numel, seed)),
    "denormal": lambda numel, seed: _from_bits(0, 1 << 22, numel, seed),
    "denormal_ties": lambda numel, seed: _from_bits(0, 3, numel, seed),
    "neighbours": lambda numel, seed: _from_bits(0x3F800000, 0x3F800040, numel, seed),
    "huge": lambda numel, seed: _from_bits(0x7F000000, 0x7F800001, numel, seed),
    "nonfinite": _with_nonfinite,
    "one_large": lambda numel, seed: np.where(
        np.arange(numel) % 4096 == seed % 4096, np.float32(1.0), np.float32(0.0)
    ),
    "rising": lambda numel, seed: np.arange(numel, dtype=np.float32),
    "falling": lambda numel, seed: -np.arange(numel, 0, -1, dtype=np.float32),
}


def same_bits(got: Floats, want: Floats) -> bool:
    """Equal bits, but for nan: any nan is as good as any other."""
    differs = got.view(np.uint32) != want.view(np.uint32)
    return bool((np.isnan(got) & np.isnan(want))[differs].all())
