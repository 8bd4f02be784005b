"""All hosts' payloads to all hosts over shaped links: in one piece, and in segments as we send it.

What limits the quantity: each host sends payload * (hosts - 1) bytes and receives as many, both
directions at once, so no exchange is shorter than 8 * payload * (hosts - 1) / rate. One piece
leaves the host as fast as TCP takes it; what the queue of the link drops has to be sent again.

    sudo python benchmarks/gather.py --rates 20mbit,100mbit --sizes 300000,5000000

The last line of stdout is one JSON document: {"results": [{"rate_mbit", "payload_bytes", "way",
"exchange_s" (median over rounds of the slowest host), "least_s"}]}. Needs root, iproute2 and sshd.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from benchmarks.netbed import Bed, parse_rate
from benchmarks.peers.crew import PINNED, ROOT
from ds_gradprune.textgen.ranks import leave_group
from ds_gradprune.transport import torchdist

WAYS = {"one piece": 2**40, "segments": torchdist.SEGMENT_BYTES}
PAUSE_S = 0.5
"""Between exchanges, as computation would be: queues drain, TCP forgets its window."""


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--hosts", type=int, default=2, help="2 to 8 (default: 2)")
    add("--rates", default="20mbit,100mbit,1gbit", help="of every link")
    add("--sizes", default="100000,1000000,5000000", help="bytes of a payload")
    add("--repeats", type=int, default=5, help="exchanges of each kind (default: 5)")
    add("--rank", type=int, help=argparse.SUPPRESS)
    add("--store", help=argparse.SUPPRESS)
    return flags


def work(flags: argparse.Namespace) -> None:
    """One host: exchange, tell the times. Collective."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{flags.store}", rank=flags.rank, world_size=flags.hosts
    )
    transport = torchdist.TorchDistTransport()
    times: dict[str, list[float]] = {}
    for size in [int(text) for text in flags.sizes.split(",")]:
        payload = torch.randint(0, 255, (size,), dtype=torch.uint8)
        out = torch.empty((flags.hosts, size), dtype=torch.uint8)
        for _ in range(flags.repeats + 1):  # the first of each kind does not count
            for way, segment_bytes in WAYS.items():
                torchdist.SEGMENT_BYTES = segment_bytes
                dist.barrier()
                time.sleep(PAUSE_S)
                start_s = time.perf_counter()
                transport.all_gather(payload, out)
                times.setdefault(f"{size} {way}", []).append(time.perf_counter() - start_s)
    print(json.dumps(times), flush=True)
    dist.barrier()
    leave_group()


def measure(flags: argparse.Namespace, bed: Bed, rate: str) -> list[dict[str, object]]:
    """All sizes and both ways at one rate."""
    bed.set_rate(rate)
    bps = parse_rate(rate)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "benchmarks/gather.py", "--hosts", str(flags.hosts)]
        words += ["--sizes", flags.sizes, "--repeats", str(flags.repeats)]
        words += ["--store", str(Path(folder) / "store")]
        processes = [
            host.popen(
                [*words, "--rank", str(rank)],
                cwd=ROOT,
                env=bed.environ() | PINNED,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(bed.hosts)
        ]
        answers = [json.loads(process.communicate()[0]) for process in processes]
    results = []
    for key in answers[0]:
        size, _, way = key.partition(" ")
        slowest = [max(times) for times in zip(*(answer[key] for answer in answers), strict=True)]
        least_s = None if bps is None else 8.0 * int(size) * (flags.hosts - 1) / bps
        results.append(
            {
                "rate_mbit": None if bps is None else bps / 1e6,
                "payload_bytes": int(size),
                "way": way,
                "exchange_s": statistics.median(slowest[1:]),
                "least_s": least_s,
            }
        )
    return results


def main() -> None:
    """Measure, print a table and the document."""
    flags = parser().parse_args()
    if flags.rank is not None:
        work(flags)
        return
    results = []
    with Bed(hosts=flags.hosts) as bed:
        for rate in flags.rates.split(","):
            for row in measure(flags, bed, rate):
                results.append(row)
                least = "" if row["least_s"] is None else f"  least {row['least_s']:.3f} s"
                print(
                    f"{rate:>8}  {row['payload_bytes']:>9} B  {row['way']:<9}  "
                    f"{row['exchange_s']:.3f} s{least}",
                    flush=True,
                )
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
