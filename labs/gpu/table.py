"""The document of a check as a short table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_FAULT_CHARS = 300


def rows(document: dict[str, Any]) -> Iterator[str]:
    """Parts, then figures, then what failed."""
    yield f"{'part':12} {'ok':>7} {'seconds':>8}"
    for name, part in document["parts"].items():
        cases = list(part.get("cases", {}).values())
        passed = f"{sum(case['ok'] for case in cases)}/{len(cases)}" if cases else str(part["ok"])
        yield f"{name:12} {passed:>7} {part['seconds']:8.1f}"
    yield from _figures(document)
    for name, part in document["parts"].items():
        if "fault" in part:
            yield f"FAILED {name}: {_line(part['fault'])}"
        for case, found in part.get("cases", {}).items():
            if not found["ok"]:
                yield f"FAILED {name}, {case}: {_line(found['fault'])}"


def _figures(document: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{'run':32} {'step s':>7} {'compute':>8} {'codec':>7} {'wire':>7} {'hidden':>7} "
        f"{'MB sent':>8} {'rest B':>7} {'peak B':>7} {'loss':>6}"
    )
    for name, part in document["parts"].items():
        for case, found in part.get("cases", {}).items():
            if "step_s" in found:
                parts = found.get("parts_s", {})
                values = [parts.get(key) for key in ("compute", "codec", "comm", "hidden")]
                sent = found.get("wire_bytes")
                told = [None if sent is None else sent / 1e6]
                told += [found.get(f"{key}_bytes_per_parameter") for key in ("rest", "peak")]
                yield (
                    f"{name + ' ' + case:32} {found['step_s']:7.3f} "
                    + " ".join(
                        f"{_cell(v, 3):>{w}}" for v, w in zip(values, (8, 7, 7, 7), strict=True)
                    )
                    + f" {_cell(told[0], 2):>8} {_cell(told[1], 1):>7} {_cell(told[2], 1):>7} "
                    f"{_cell(found.get('validation_loss'), 3):>6}"
                )


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _line(fault: Any) -> str:
    """What was raised: the last line of the first rank that says more than that a peer is gone."""
    texts = list(fault.values()) if isinstance(fault, dict) else [str(fault)]
    lasts = [text.strip().splitlines()[-1] if text.strip() else "?" for text in texts]
    own = [last for last in lasts if "closed the connection" not in last]
    return (own or lasts)[0][:_FAULT_CHARS]
