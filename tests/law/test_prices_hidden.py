"""What an exchange costs when it travels behind the computation."""

from __future__ import annotations

import pytest

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.prices import Prices

PRICES = Prices(
    compute_s=1.0,
    spread_s=0.0,
    codec_s=0.01,
    codec_per_k_s=0.0,
    dense_codec_s=0.0,
    overhead_s=0.001,
    seconds_per_byte=1e-6,
    noise=0.05,
    fixed_bytes=1000.0,
    bytes_per_k=2000.0,
    dense_bytes=8e6,
    dense_factor=1.0,
)
HIDDEN = PRICES._replace(hide_s=0.5)


def test_only_what_does_not_hide_lengthens_a_step() -> None:
    assert HIDDEN.step_s(100) == pytest.approx(1.01)  # 0.202 s on the wire
    assert HIDDEN.step_s(400) == pytest.approx(1.01 + 0.802 - 0.5)
    assert HIDDEN.step_s(CHUNK_NUMEL) == PRICES.step_s(CHUNK_NUMEL)  # dense ones are waited for


def test_a_budget_affords_what_hides() -> None:
    exposed = PRICES.affordable_k(1.1, 1, CHUNK_NUMEL)
    hidden = HIDDEN.affordable_k(1.1, 1, CHUNK_NUMEL)
    assert hidden > 5 * exposed
    assert HIDDEN.fits(hidden, 1.1)
    assert not HIDDEN.fits(2 * hidden, 1.1)
