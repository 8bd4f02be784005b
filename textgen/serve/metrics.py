"""Counters and histograms as Prometheus reads them."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper ends in seconds."""

PREFIX = "ds_gradprune_serve_"

HELP = {
    "requests_total": "Requests by path and HTTP status.",
    "replies_total": "Replies by how they ended.",
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "reply_tokens_total": "Tokens of replies.",
    "reloads_total": "Newer models taken, by outcome.",
    "first_token_seconds": "From the request to the first token.",
    "reply_seconds": "From the request to the end of the reply.",
}


class Metrics:
    """What has happened since the start. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = defaultdict(float)
        self._times: dict[str, list[float]] = {
            name: [0.0] * (len(BUCKETS) + 2) for name in HELP if name.endswith("_seconds")
        }

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        inside = ",".join(f'{key}="{text}"' for key, text in sorted(labels.items()))
        with self._lock:
            self._counts[name, f"{{{inside}}}" if inside else ""] += value

    def time(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        with self._lock:
            row = self._times[name]
            for place, end in enumerate(BUCKETS):
                row[place] += seconds <= end
            row[-2] += 1
            row[-1] += seconds

    def text(self, **gauges: float) -> str:
        """Everything, in Prometheus' text format 0.0.4.

        Args:
            gauges: what holds now, by name.
        """
        with self._lock:
            counts, times = dict(self._counts), {k: list(v) for k, v in self._times.items()}
        lines = []
        for name, help_text in HELP.items():
            kind = "histogram" if name in times else "counter"
            lines += [f"# HELP {PREFIX}{name} {help_text}", f"# TYPE {PREFIX}{name} {kind}"]
            for (counted, labels), value in sorted(counts.items()):
                if counted == name:
                    lines.append(f"{PREFIX}{name}{labels} {value:.17g}")
            if name in times:
                row = times[name]
                for end, value in zip((*map(str, BUCKETS), "+Inf"), row, strict=False):
                    lines.append(f'{PREFIX}{name}_bucket{{le="{end}"}} {value:.17g}')
                lines.append(f"{PREFIX}{name}_sum {row[-1]:.17g}")
                lines.append(f"{PREFIX}{name}_count {row[-2]:.17g}")
        for name, value in gauges.items():
            lines += [f"# TYPE {PREFIX}{name} gauge", f"{PREFIX}{name} {value:.17g}"]
        return "\n".join(lines) + "\n"


def rss_bytes() -> float:
    """Memory of this process that is in use; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1]) * 1024
    return 0.0
