"""From how many islands on owners pay: an exchange through the product's classes, 2 to 64 islands.

All islands live in this process, over a loopback, and exchange a model of random weights through
`Islands`. Told are the bytes that an island sends, the seconds of one core that its part takes, and
from both the time of an exchange at some rates of the link, with one latency for an all-gather and
two for owners. Nothing is computed meanwhile, and every island has a core of its own.

    python -m labs.owners [--numel 2000000] [--islands 2 4 8 16 32 64] [--rounds 3]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.train.islands import Islands, Prepared, refuse
from ds_gradprune.train.outer import make_rule
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from labs.convergence.ranks import SILENT, Ranks, RowShards
from labs.machine import commit, machine

EXCHANGES = ("all_gather", "owner_reduce")
RATES_MBIT = (20, 100, 1000)
LATENCY_S = 0.001
WIDTH = 1024


def measure(exchange: str, num_islands: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Some exchanges; medians after a first one, which allocates."""
    ranks = Ranks(num_islands, exchange)
    rows = torch.zeros(num_islands, flags.numel // WIDTH, WIDTH)
    islands = []
    for row, channel in zip(rows, ranks.channels, strict=True):
        weights = SharedWeights(RowShards([row[None]]))
        islands.append(
            Islands(
                weights,
                channel,
                Stopwatch(lambda: 0.0),
                value_bits=4,
                scale=num_islands**0.5,  # the default, as all else
                rule=make_rule(0.0, 1),
            )
        )
    k = kept_per_chunk(flags.density)
    seconds, bits = [], 0.0

    def deliver(prepared: Prepared) -> None:
        refuse(prepared.deliver(), 0)

    for step in range(1, 2 + flags.rounds):
        rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(step)))
        began_s = time.process_time()
        begun = [one.prepare(k, step=step, signals=SILENT) for one in islands]
        for prepared in begun:
            prepared.write()
            prepared.start()
        ranks.at_once(deliver, begun)
        for prepared in begun:
            prepared.commit()
        seconds.append((time.process_time() - began_s) / num_islands)
        bits = ranks.take_received_bits()
        assert len({one.weights.crc() for one in islands}) == 1
    ranks.close()
    codec_s = statistics.median(seconds[1:])
    latencies = 1 if exchange == "all_gather" else 2
    return {
        "exchange": exchange,
        "islands": num_islands,
        "bits_per_parameter": bits / rows[0].numel(),
        "codec_s": codec_s,
        "spread_s": max(seconds[1:]) - min(seconds[1:]),
        "exchange_s": {
            str(rate): bits / (1e6 * rate) + latencies * LATENCY_S + codec_s for rate in RATES_MBIT
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Print a table and, last, one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=int, default=2_000_000, help="parameters of the model")
    parser.add_argument("--density", type=float, default=0.01, help="kept / all elements")
    parser.add_argument("--islands", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="exchanges that count")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for num_islands in flags.islands:
        for exchange in EXCHANGES:
            row = measure(exchange, num_islands, flags)
            rows.append(row)
            times = "  ".join(f"{s * 1e3:8.1f}" for s in row["exchange_s"].values())
            print(
                f"{num_islands:3} {exchange:12} {row['bits_per_parameter']:7.3f} bits  "
                f"{row['codec_s'] * 1e3:7.1f} ms  at {', '.join(map(str, RATES_MBIT))} Mbit/s, "
                f"ms: {times}",
                flush=True,
            )
    document = {
        "machine": machine(),
        "commit": commit(Path(__file__).resolve().parents[1]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "numel": flags.numel,
        "density": flags.density,
        "latency_s": LATENCY_S,
        "rows": rows,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
