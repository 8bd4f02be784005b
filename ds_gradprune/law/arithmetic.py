"""Logarithm, exponential and hypotenuse with the same bits on every host.

All ranks must reach the same decision from the same signals. `math.log`, `math.exp` and `math.pow`
belong to the host's C library, and `math.hypot` to its Python: the same glibc with and without FMA
differs in the last bit of 12 of 400,000 logarithms. A density would then differ on one host
wherever such a number meets a threshold. So nothing in this room that decides calls them. It calls
the functions below, which use `+ - * /`, `sqrt`, `frexp` and `ldexp` in a fixed order. IEEE 754
defines every one of these to the last bit. They err by at most 2 units in the last place, and
`power` by 1 + |y log x| times as much, which tests compare with `math`.

`fingerprint` is what hosts compare at attach. Equal fingerprints mean the same version of this file
on floating point that follows IEEE 754. It does not change with the C library.
"""

from __future__ import annotations

import hashlib
import math
import struct

_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
"""log(2) in two parts; the first has 32 bits, so its multiples by an exponent are exact."""

_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")

_LOG_TERMS = tuple(1.0 / n for n in range(23, 1, -2))
"""atanh(s) / s = 1 + s^2 / 3 + s^4 / 5 + ..., highest power first; |s| <= 0.172."""

_T23, _T21, _T19, _T17, _T15, _T13, _T11, _T9, _T7, _T5, _T3 = _LOG_TERMS

_EXP_TERMS = tuple(1.0 / math.factorial(n) for n in range(15, 1, -1))
"""exp(r) = 1 + r + r^2 / 2! + ..., highest power first; |r| <= 0.347."""


def log(x: float) -> float:
    """Natural logarithm.

    Args:
        x: finite, > 0.

    Raises:
        ValueError: x is outside that range.
    """
    if not 0.0 < x < math.inf:
        raise ValueError(f"x must be finite and above 0, got {x!r}.")
    mantissa, exponent = math.frexp(x)
    if mantissa < _SQRT_HALF:
        mantissa, exponent = 2.0 * mantissa, exponent - 1
    f = mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    # Horner's rule over _LOG_TERMS, written out: the law takes five logarithms a step.
    series = ((((_T23 * z + _T21) * z + _T19) * z + _T17) * z + _T15) * z + _T13
    series = ((((series * z + _T11) * z + _T9) * z + _T7) * z + _T5) * z + _T3
    # log(1 + f) = 2 atanh(s) = f - s * (f - 2 z series), where f is exact and the rest is small.
    return exponent * _LN2_HIGH - (s * (f - 2.0 * z * series) - exponent * _LN2_LOW - f)


def exp(x: float) -> float:
    """Exponential.

    Args:
        x: between -700 and 700.

    Raises:
        ValueError: x is outside that range.
    """
    if not -700.0 <= x <= 700.0:
        raise ValueError(f"x must be between -700 and 700, got {x!r}.")
    exponent = math.floor(x / (_LN2_HIGH + _LN2_LOW) + 0.5)
    r = (x - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    series = 0.0
    for term in _EXP_TERMS:
        series = series * r + term
    return math.ldexp(1.0 + (r + r * r * series), exponent)


def power(x: float, y: float) -> float:
    """Power x^y, for x > 0 and |y log(x)| <= 700."""
    return exp(y * log(x))


def hypot(x: float, y: float) -> float:
    """Square root of x^2 + y^2, for numbers whose squares do not overflow."""
    return math.sqrt(x * x + y * y)


_AWKWARD = tuple(
    value
    for n in range(1, 33)
    for value in (1.0 + n * 2.0**-52, 1.0 - n * 2.0**-30, n / 3.0, n * 1e-9 / 7.0, n * 1e9 / 11.0)
)
"""Numbers next to 1, thirds, and the shortest and longest times that count."""


def fingerprint() -> str:
    """A short hash over results of this host's arithmetic, equal on hosts that decide alike.

    Returns:
        Eight hexadecimal digits.
    """
    results = [math.fsum(_AWKWARD)]
    for x in _AWKWARD:
        results += [log(x), exp(x % 30.0), math.sqrt(x), power(x, 1.5), hypot(x, 1.0 / 3.0)]
    return hashlib.sha256(struct.pack(f"<{len(results)}d", *results)).hexdigest()[:8]
