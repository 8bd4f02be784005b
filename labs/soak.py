"""A very long run on a tiny model: does memory stay, do the ranks stay equal, is the log bounded?

All ranks live in one process, over the loopback transport, and train a noisy quadratic. Loop, law,
codecs, channel, islands, outer rule and log are the product's own. Time is virtual: a link whose
rate changes every 5,000 steps, so that the law never comes to rest.

    python -m labs.soak --steps 100000 [--ranks 2] [--numel 20000] [--sync-every 1] [--out PAGE.md]

The last line of stdout is one JSON document. The exit code is 1 if memory grew by more than 2 %
since the first tenth of the run, the ranks differ, or the log is larger than its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import BLOCK, GradientPruningConfig, load_block
from ds_gradprune.deepspeed.monitor import KEPT_FILES, MAX_BYTES, StepLog
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.islands import Islands, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.channel import Channel
from labs.convergence.ranks import Ranks, RowShards
from labs.fuzz.__main__ import resident_bytes
from labs.machine import commit, machine

ROOT = Path(__file__).resolve().parents[1]
MAX_GROWTH = 0.02
COMPUTE_S = 0.1
RATES_BYTES_PER_S = (2e5, 2e4, 1e6, 5e4)
STEPS_PER_RATE = 5_000
LOOK_EVERY = 1_000
LR = 0.05


class Rank:
    """One island: its weights, its loop, its log.

    Args:
        config: the checked block.
        channel: to the others.
        numel: parameters.
        log: where rank 0 writes; None: nowhere.
    """

    def __init__(
        self, config: GradientPruningConfig, channel: Channel, numel: int, log: str | None
    ) -> None:
        self.now_s = 0.0
        self.config, self.channel = config, channel
        self.loop = Loop(config, lambda: self.now_s)
        rows = numel // 100
        self._row = torch.zeros(1, rows * 100)
        self._noise = torch.Generator().manual_seed(channel.rank)
        kept = KeptResidual(config.residual_decay) if config.residual_form == "reset" else None
        self.islands = Islands(
            SharedWeights(RowShards([self._row.view(1, rows, 100)])),
            channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            scale=update_scale(channel.world_size, config.update_scale),
            rule=make_rule(config.slow_momentum, config.sync_every),
            kept=kept,
        )
        self.islands.weights.capture()
        self._log = StepLog(log, max_bytes=MAX_BYTES)
        self._loss = 0.0
        self._begun: Any = None

    def train(self) -> None:
        """One optimizer step on data of its own."""
        self.loop.begin_step()
        self.now_s += COMPUTE_S
        away = self._row - 1.0
        self._loss = float(away.square().mean()) + 0.01
        noise = torch.randn(self._row.shape, generator=self._noise)
        self._row.sub_(away.add_(noise, alpha=0.3), alpha=LR)

    def begin(self) -> None:
        """Announce, select, encode, send."""
        loop, islands = self.loop, self.islands
        loop.begin_exchange()
        is_dense = loop.decision.density == 1.0
        signals = loop.signals(self._loss, nonfinite=is_dense and not islands.weights.is_finite())
        k = kept_per_chunk(loop.decision.density)
        step = loop.last_exchange
        header = codec.encode_signals(step=step, rank=self.channel.rank, k=k, signals=signals)
        prepared = None if is_dense else islands.prepare(k, step=step, signals=signals)
        sizes = () if prepared is None else prepared.sizes
        announcement = self.channel.announce(header, sizes)
        if prepared is not None:
            prepared.write()
            prepared.start()
        self._begun = announcement, prepared

    def begin_dense(self) -> None:
        """A dense exchange begins when all have announced."""
        announcement, prepared = self._begun
        if prepared is None:
            told = [header.signals for header in announcement.headers()]
            bad = [place for place, signals in enumerate(told) if signals.nonfinite]
            prepared = self.islands.prepare_dense(bad)
            prepared.start()
            self._begun = announcement, prepared

    def land(self, rate_bytes_per_s: float) -> None:
        """Take what has arrived, decide, write the log."""
        announcement, prepared = self._begun
        ranks: list[RankSignals] = [header.signals for header in announcement.headers()]
        refuse(prepared.deliver(), self.loop.last_exchange)
        prepared.commit()
        sent = self.channel.take_wire_bytes()
        with self.loop.stopwatch.phase("wire"):
            self.now_s += sent / rate_bytes_per_s
        before = self.loop.totals.steps
        report = self.loop.finish_exchange(
            ranks, wire_bytes=sent, dense_bytes=self.islands.dense_bytes()
        )
        every = self.config.verify_every_steps
        if every is not None and report.step // every > before // every:
            self.loop.note_weights(self.islands.weights.crc())
        self._log.write(report)

    def close(self) -> None:
        """Close the log."""
        self._log.close()


def soak(steps: int, ranks: int, numel: int, sync_every: int, folder: Path) -> dict[str, Any]:
    """Make the run; see the module.

    Returns:
        The document.
    """
    block = {
        "sync_every": sync_every,
        "warmup": "unpruned",
        "warmup_steps": 50,
        "ramp_steps": 50,
        "step_time_budget_s": 0.2,
        "slow_momentum": 0.1,
    }
    config = load_block({BLOCK: block}, total_steps=steps)
    network = Ranks(ranks, "all_gather")
    log = folder / "log.jsonl"
    island = [
        Rank(config, channel, numel, str(log) if channel.rank == 0 else None)
        for channel in network.channels
    ]
    began_s, grown, first_bytes, differing = time.perf_counter(), [], 0, 0
    densities: set[float] = set()
    for step in range(1, steps + 1):
        for rank in island:
            rank.train()
        if island[0].loop.is_due:
            _exchange(island, RATES_BYTES_PER_S[step // STEPS_PER_RATE % len(RATES_BYTES_PER_S)])
            densities.add(island[0].loop.decision.density)
        for rank in island:
            rank.loop.end_step()
        if step == steps // 10:
            first_bytes = resident_bytes()
        if step % LOOK_EVERY == 0 or step == steps:
            differing += len({rank.islands.weights.crc() for rank in island}) > 1
            if first_bytes:
                grown.append(resident_bytes() / first_bytes - 1.0)
    for rank in island:
        rank.close()
    network.close()
    return {
        "steps": steps,
        "ranks": ranks,
        "numel": numel,
        "sync_every": sync_every,
        "seconds": round(time.perf_counter() - began_s, 1),
        "resident_bytes": resident_bytes(),
        "memory_growth": round(grown[-1], 5),
        "memory_growth_max": round(max(grown), 5),
        "looks_that_differed": differing,
        "densities": len(densities),
        "log_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "log_files": len(list(folder.iterdir())),
        "log_bound_bytes": MAX_BYTES * (1 + KEPT_FILES),
    }


def _exchange(island: list[Rank], rate_bytes_per_s: float) -> None:
    """A start on the loopback leaves a copy, so one thread can start for all and then wait."""
    for rank in island:
        rank.begin()
    for rank in island:
        rank.begin_dense()
    for rank in island:
        rank.land(rate_bytes_per_s)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m labs.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--numel", type=int, default=20_000)
    parser.add_argument("--sync-every", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a page of results")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        document = soak(flags.steps, flags.ranks, flags.numel, flags.sync_every, Path(folder))
    if flags.out is not None:
        flags.out.write_text(_page(document))
    print(json.dumps(document))
    return int(
        document["memory_growth_max"] > MAX_GROWTH
        or document["looks_that_differed"] > 0
        or document["log_bytes"] > document["log_bound_bytes"]
    )


def _page(document: dict[str, Any]) -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
    command = " ".join(
        f"--{name.replace('_', '-')} {document[name]}"
        for name in ("steps", "ranks", "numel", "sync_every")
    )
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in document.items())
    where = f"Commit {commit(ROOT)}; {now} UTC; {machine()['cpu']}; torch {torch.__version__}"
    return (
        f"# A long run on a tiny model\n\n`python -m labs.soak {command}`.\n{where}, one thread.\n"
        "Other programs were running. All ranks live in one process, and time is virtual. Growth "
        "of memory\ncounts from the first tenth of the run. The ranks' shared weights are compared "
        f"every {LOOK_EVERY}\nsteps, bit by bit.\n\n| figure | value |\n| --- | ---: |\n{rows}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
