"""What an exchange between islands costs on this machine: memory and time, all but the wire.

One process plays island 0. Its peers are played by a transport that answers at once with payloads
like the own ones, so nothing but the island's own work is measured. Every case runs in a process of
its own; the builds take turns. With `--before FOLDER`, a checkout of commit 10d4b5d, that build is
measured beside this one.

    python -m labs.exchange --before ../former --numels 10000000,124000000 --rounds 5

Transient memory is the highest resident set during the exchange, less that before it, less the
encoded payloads. The last line of stdout is one JSON document.

Longer than 300 lines: two builds, one measure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 768
HEADER_BYTES, ROW_BYTES = 64, 80


def peers(payload: Any, out: Any) -> None:
    """Answer a gather: every row is the own payload under another rank's name."""
    import google_crc32c
    import numpy as np

    own = payload.numpy()
    for rank, row in enumerate(out.numpy()):
        row[:] = own
        start = 0
        while start < len(row):
            head = row[start : start + HEADER_BYTES]
            (body_bytes,) = struct.unpack_from("<I", head.tobytes(), 32)
            stop = start + HEADER_BYTES + body_bytes
            head[14:16] = np.frombuffer(struct.pack("<H", rank), dtype=np.uint8)
            crc = google_crc32c.value(head[:60].tobytes())
            crc = google_crc32c.extend(crc, row[start + HEADER_BYTES : stop])
            head[60:64] = np.frombuffer(struct.pack("<I", crc), dtype=np.uint8)
            start = stop if len(row) != ROW_BYTES else len(row)


def tensors_of(numel: int) -> dict[str, Any]:
    """A model's weights: matrices of 2 to 40 rows times a multiple of its width, and vectors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    left, number = numel, 0
    while left > 0:
        rows = min(50257 if number == 0 and numel > 10**8 else 4 * WIDTH, max(1, left // WIDTH))
        tensors[f"matrix{number}"] = torch.randn(rows, WIDTH, generator=generator)
        tensors[f"vector{number}"] = torch.randn(WIDTH, generator=generator)
        left -= (rows + 1) * WIDTH
        number += 1
    return tensors


def train(tensors: dict[str, Any], step: int) -> None:
    """Move every weight a little, as an optimizer would."""
    import torch

    generator = torch.Generator().manual_seed(step)
    for tensor in tensors.values():
        noise = torch.empty(tensor.shape[-1]).normal_(generator=generator)
        tensor.add_(noise.mul_(1e-3)).mul_(1.0 + 1e-4 * (step % 3))


class Now:
    """This build."""

    def __init__(self, numel: int, world_size: int) -> None:
        import torch

        from ds_gradprune.train.islands import Islands
        from ds_gradprune.train.outer import make_rule
        from ds_gradprune.train.piece import Piece
        from ds_gradprune.train.shared_weights import SharedWeights
        from ds_gradprune.train.stopwatch import Stopwatch
        from ds_gradprune.wire.all_gather import AllGather
        from ds_gradprune.wire.transport import Finished, Transport, Work

        lab = self
        self.transport_s = 0.0
        self.payload_bytes = 0
        self.tensors = tensors_of(numel)

        class Peers(Transport):
            rank = 0

            def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
                began = time.perf_counter()
                peers(payload, out)
                if payload.numel() != ROW_BYTES:
                    lab.payload_bytes = payload.numel() * (world_size + 1)
                lab.transport_s += time.perf_counter() - began
                return Finished()

            def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
                raise NotImplementedError

            def start_all_reduce(self, tensor: torch.Tensor) -> Work:
                raise NotImplementedError

            def close(self) -> None:
                pass

        Peers.world_size = world_size

        class Shards:
            has_masters = True

            def every_piece(self) -> list[Piece]:
                return [Piece(n, n, t.view(-1), t.dim() > 1) for n, t in lab.tensors.items()]

            pieces = every_piece

            def publish(self) -> None:
                pass

        before = _status("VmRSS")
        self.islands = Islands(
            SharedWeights(Shards()),  # type: ignore[arg-type]
            AllGather(Peers()),
            Stopwatch(time.perf_counter),
            value_bits=4,
            scale=1.4,
            rule=make_rule(0.0, 1),
        )
        self.resident_bytes = _status("VmRSS") - before

    def exchange(self, step: int, k: int) -> None:
        """One exchange, from announcement to commit."""
        from ds_gradprune import codec
        from ds_gradprune.law.signals import RankSignals

        signals = RankSignals(1.0, False, 0.1, 0.0, 0.0, 0, 0)
        prepared = self.islands.prepare(k, step=step, signals=signals)
        header = codec.encode_signals(step=step, rank=0, k=k, signals=signals)
        announcement = self.islands.channel.announce(header, prepared.sizes)
        prepared.write()
        announcement.headers()
        prepared.start()
        assert not prepared.deliver()
        prepared.commit()


class Before:
    """The build of commit 10d4b5d."""

    def __init__(self, numel: int, world_size: int) -> None:
        import torch
        from ds_gradprune.islands import IslandSession  # type: ignore[import-not-found]
        from ds_gradprune.shared import SharedWeights  # type: ignore[import-not-found]
        from ds_gradprune.transport.base import Transport  # type: ignore[import-not-found]

        lab = self
        self.transport_s = 0.0
        self.payload_bytes = 0
        self.tensors = tensors_of(numel)

        class Peers(Transport):  # type: ignore[misc]
            rank = 0

            def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
                began = time.perf_counter()
                peers(payload, out)
                lab.payload_bytes = max(lab.payload_bytes, payload.numel() * (world_size + 1))
                lab.transport_s += time.perf_counter() - began

            def all_reduce(self, tensor: torch.Tensor) -> None:
                raise NotImplementedError

            def close(self) -> None:
                pass

        Peers.world_size = world_size
        from ds_gradprune.config import GradientPruningConfig

        config = GradientPruningConfig(warmup_steps=0, ramp_steps=0)
        before = _status("VmRSS")
        weights = SharedWeights(lambda: list(self.tensors.values()))
        self.session = IslandSession(config, Peers(), weights, time.perf_counter)
        self.resident_bytes = _status("VmRSS") - before

    def exchange(self, step: int, k: int) -> None:
        """One exchange."""
        import dataclasses

        session = self.session
        session.step = step - 1
        session.decision = dataclasses.replace(session.decision, density=k / 4096)
        session.exchange(1.0)


def probe(build: str, numel: int, world_size: int, density: float, rounds: int) -> dict[str, Any]:
    """Measure one case in this process."""
    import torch

    torch.set_num_threads(1)
    lab = Now(numel, world_size) if build == "now" else Before(numel, world_size)
    k = max(1, -(-int(density * 4096 * 1000) // 1000))
    times_s: list[float] = []
    peak = payloads = 0
    for step in range(1, rounds + 2):
        train(lab.tensors, step)
        lab.transport_s = 0.0
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status("VmRSS")
        began = time.perf_counter()
        lab.exchange(step, k)
        times_s.append(time.perf_counter() - began - lab.transport_s)
        if step == 1:  # memory that is kept is taken by the first exchange
            peak, payloads = _status("VmHWM") - resident, lab.payload_bytes
    numel = sum(t.numel() for t in lab.tensors.values())
    return {
        "times_s": times_s[1:],
        "transient_bytes": (peak - payloads) / numel,
        "payload_bytes": payloads / numel,
        "resident_bytes": lab.resident_bytes / numel,
        "numel": numel,
    }


def _status(field: str) -> int:
    """Bytes, as /proc says."""
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def run(build: str, folder: Path, case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--probe", build]
    command += [json.dumps(case | {"rounds": rounds})]
    env = os.environ | {
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        # glibc gives large blocks back at once, so that the resident set tells what is in use.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"{build} {case} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases, builds in turns."""
    builds = {"now": ROOT} | ({"before": Path(options.before)} if options.before else {})
    memory, cost = [], []
    for world_size in (2, 4, 8):
        case = {"numel": options.numels[0], "world_size": world_size, "density": 0.25}
        row: dict[str, Any] = dict(case)
        for build, folder in builds.items():
            found = run(build, folder, case, 1)
            row[build] = {k: round(found[k], 3) for k in found if k.endswith("_bytes")}
        memory.append(row)
        print(json.dumps(row), flush=True)
    for numel in options.numels:
        for density in (0.01, 0.05):
            case = {"numel": numel, "world_size": 2, "density": density}
            times: dict[str, list[float]] = {build: [] for build in builds}
            for _ in range(options.rounds):
                for build, folder in builds.items():
                    times[build].append(statistics.median(run(build, folder, case, 3)["times_s"]))
            row = dict(case)
            for build, seconds in times.items():
                row[build] = {
                    "median_s": round(statistics.median(seconds), 4),
                    "spread_s": [round(min(seconds), 4), round(max(seconds), 4)],
                }
            if "before" in builds:
                ratios = [a / b for a, b in zip(times["now"], times["before"], strict=True)]
                row["ratio"] = round(statistics.median(ratios), 3)
            cost.append(row)
            print(json.dumps(row), flush=True)
    return {"memory": memory, "local_cost": cost}


def main() -> None:
    """Print every case, and last one JSON document."""
    if sys.argv[1:2] == ["--probe"]:
        print(json.dumps(probe(sys.argv[2], **json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--before", help="checkout of commit 10d4b5d")
    parser.add_argument("--numels", default="10000000,124000000", help="sizes of the model")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    options = parser.parse_args()
    options.numels = [int(numel) for numel in options.numels.split(",")]
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
