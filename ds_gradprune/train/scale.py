"""How the factor on the islands' mean update follows what is sent, where rounds reset the residual.

The mean lacks what has not been sent, so the less is sent the larger the factor may be. Where all
is sent nothing is lacking. All functions are local, and their bits are equal on all hosts.
"""

from __future__ import annotations

from typing import Literal

SPARSE_SCALE = 2.0
"""See `sparse_scale`. Four islands lose more with 4."""

SPARSE_FROM, SPARSE_TO, WHOLE_FROM = 1 / 32, 1 / 8, 1 / 4
"""Densities between which the factor falls, see `scale_at`. With two islands and rounds of 10 steps
2 is better at 1/32, the root at 1/4 by 2 % of the loss, and 1 where all is sent, by 1 % (LOG.md,
2026-11-27)."""


def sparse_scale(setting: float | None, residual: Literal["used", "reset"]) -> float | None:
    """The least factor where little is sent; None: `update_scale` holds everywhere.

    With the residual kept aside an element that one island alone has sent moves by its part of the
    mean, and the rest of it is nowhere. So the updates of two islands are added (docs/modes.md).

    Args:
        setting: the user's factor, which holds as it is; None: the default.
        residual: the form of it that holds.
    """
    return SPARSE_SCALE if setting is None and residual == "reset" else None


def scale_at(density: float, scale: float, sparse: float | None, islands: int) -> float:
    """The factor at a density.

    From `sparse` it falls to `scale`, stays, and falls to 1 where all is sent: then nothing is
    missing in the mean, and a longer step is too long after some steps. Both along a line. Only
    operations whose bits are equal on all hosts.

    Args:
        density: kept / all elements of the exchange.
        scale: between `SPARSE_TO` and `WHOLE_FROM`.
        sparse: at least, up to `SPARSE_FROM`; None: `scale` holds everywhere.
        islands: how many there are; `sparse` counts for no more than their number.

    Returns:
        The factor, > 0.
    """
    if sparse is None:
        return scale
    if density > WHOLE_FROM:
        return scale + (1.0 - scale) * (density - WHOLE_FROM) / (1.0 - WHOLE_FROM)
    share = (SPARSE_TO - density) / (SPARSE_TO - SPARSE_FROM)
    more = max(0.0, min(sparse, float(islands)) - scale)
    return scale + more * min(1.0, max(0.0, share))


def words_of_scale(setting: float | None, residual: Literal["used", "reset"], scale: float) -> str:
    """The factor that holds, for a user.

    Args:
        setting: see `sparse_scale`.
        residual: see there.
        scale: see `scale_at`.
    """
    sparse = sparse_scale(setting, residual)
    if sparse is None:
        return f"{scale:.3g}"
    return f"{max(scale, sparse):.3g} up to {SPARSE_FROM:.3g} of the elements, 1 where all go"
