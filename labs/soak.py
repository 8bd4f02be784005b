"""A very long run on a tiny model: does memory stay, do the ranks stay equal, is the log bounded?

All ranks live in one process, over the loopback transport, and train a noisy quadratic. Loop, law,
codecs, channel, algorithms and log are the product's own. Time is virtual: the rate of the link
changes every 5,000 steps, so that the law never comes to rest.

    python -m labs.soak --steps 100000 [--prune gradient] [--sync-every 4] [--out PAGE.md]

The last line of stdout is one JSON document. The exit code is 1 if memory grew by more than 2 %
since the first tenth of the run, the ranks differ, or the log is larger than its bound.

Longer than 300 lines: both algorithms, watched by one loop.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import BLOCK, GradientPruningConfig, load_block
from ds_gradprune.deepspeed.monitor import KEPT_FILES, MAX_BYTES, StepLog
from ds_gradprune.train.gradients import Gradient, GradientPruning
from ds_gradprune.train.islands import Islands, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.channel import Announcement, Channel
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
FLAGS = ("steps", "prune", "ranks", "numel", "sync_every")


class Rank:
    """One rank: its weights, its loop, its log.

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
        self.row = torch.zeros(1, numel // 100 * 100)
        self.loss = 0.0
        self._noise = torch.Generator().manual_seed(channel.rank)
        self._log = StepLog(log, max_bytes=MAX_BYTES)

    def gradient(self) -> torch.Tensor:
        """The gradient of a step, on data of this rank's own."""
        self.loop.begin_step()
        self.now_s += COMPUTE_S
        away = self.row - 1.0
        self.loss = float(away.square().mean()) + 0.01
        return away.add_(torch.randn(self.row.shape, generator=self._noise), alpha=0.3)

    def announce(self, *, nonfinite: bool, sizes: Sequence[int] = ()) -> Announcement:
        """Tell all ranks what this one is about to send."""
        signals = self.loop.signals(self.loss, nonfinite=nonfinite)
        header = codec.encode_signals(
            step=self.loop.exchange_step,
            rank=self.channel.rank,
            k=kept_per_chunk(self.loop.decision.density),
            signals=signals,
        )
        return self.channel.announce(header, sizes)

    def finish(self, announcement: Announcement, dense_bytes: int, rate_bytes_per_s: float) -> None:
        """The exchange is over: decide, compare, write the log, as the product's handle does."""
        ranks = [header.signals for header in announcement.headers()]
        sent = self.channel.take_wire_bytes()
        with self.loop.stopwatch.phase("wire"):
            self.now_s += sent / rate_bytes_per_s
        before = self.loop.totals.steps
        report = self.loop.finish_exchange(ranks, wire_bytes=sent, dense_bytes=dense_bytes)
        every = self.config.verify_every_steps
        if every is not None and report.step // every > before // every:
            self.loop.note_weights(self.crc())
        self._log.write(report)

    def crc(self) -> int:
        """Of the weights that are equal on all ranks."""
        return int(google_crc32c.value(self.row.view(-1).view(torch.uint8).numpy()))

    def close(self) -> None:
        """Close the log."""
        self._log.close()


class GradientRank(Rank):
    """A rank of gradient mode; see `Rank`."""

    def __init__(self, config: GradientPruningConfig, channel: Channel, *args: Any) -> None:
        super().__init__(config, channel, *args)
        self._all = (Gradient("weights", self.row.numel(), True),)
        self._pruning = GradientPruning(
            channel, self.loop.stopwatch, value_bits=config.value_bits, error_feedback=True
        )

    def step(self, rate_bytes_per_s: float) -> None:
        """A whole step, in a thread of its own: it waits for the others."""
        vector, pruning, density = (
            self.gradient().view(-1),
            self._pruning,
            self.loop.decision.density,
        )
        announcement = self.announce(nonfinite=False)
        announcement.headers()
        pruning.begin()
        if density == 1.0:
            pruning.reduce_dense(vector, self._all, nonfinite=False)
        else:
            k, step = kept_per_chunk(density), self.loop.exchange_step
            signals = self.loop.signals(self.loss)
            pruning.reduce(vector, self._all, k, step=step, signals=signals)
        pruning.commit(applied=True)
        self.row.sub_(vector, alpha=LR / self.channel.world_size)
        self.loop.begin_exchange()
        self.finish(announcement, pruning.take_dense_bytes(), rate_bytes_per_s)
        self.loop.end_step()


class IslandRank(Rank):
    """A rank of update mode; see `Rank`."""

    def __init__(self, config: GradientPruningConfig, channel: Channel, *args: Any) -> None:
        super().__init__(config, channel, *args)
        kept = KeptResidual(config.residual_decay) if config.residual_form == "reset" else None
        self.islands = Islands(
            SharedWeights(RowShards([self.row.view(1, -1, 100)])),
            channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            scale=update_scale(channel.world_size, config.update_scale),
            rule=make_rule(config.slow_momentum, config.sync_every),
            kept=kept,
        )
        self.islands.weights.capture()
        self._begun: Any = None

    def begin(self) -> None:
        """Announce, select, encode, send."""
        loop, islands = self.loop, self.islands
        is_dense = loop.decision.density == 1.0
        signals = loop.signals(self.loss)
        k, step = kept_per_chunk(loop.decision.density), loop.exchange_step
        prepared = None if is_dense else islands.prepare(k, step=step, signals=signals)
        sick = is_dense and not islands.weights.is_finite()
        sizes = () if prepared is None else prepared.sizes
        announcement = self.announce(nonfinite=sick, sizes=sizes)
        loop.begin_exchange()
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
        """Take what has arrived."""
        announcement, prepared = self._begun
        refuse(prepared.deliver(), self.loop.last_exchange)
        prepared.commit()
        self.finish(announcement, self.islands.dense_bytes(), rate_bytes_per_s)

    def crc(self) -> int:
        """See `Rank.crc`: of the shared weights."""
        return self.islands.weights.crc()


def soak(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the run; returns the document. See the module."""
    block = {"prune": flags.prune, "warmup_steps": 50, "ramp_steps": 50, "step_time_budget_s": 0.2}
    if flags.prune == "update":
        block |= {"sync_every": flags.sync_every, "warmup": "unpruned", "slow_momentum": 0.1}
    config = load_block({BLOCK: block}, total_steps=flags.steps)
    network = Ranks(flags.ranks, "all_gather")
    make = IslandRank if flags.prune == "update" else GradientRank
    logs = [str(folder / "log.jsonl")] + [None] * (flags.ranks - 1)
    ranks: list[Any] = [
        make(config, channel, flags.numel, log)
        for channel, log in zip(network.channels, logs, strict=True)
    ]
    began_s, grown, first_bytes, differing = time.perf_counter(), [], 0, 0
    densities: set[float] = set()
    for step in range(1, flags.steps + 1):
        rate = RATES_BYTES_PER_S[step // STEPS_PER_RATE % len(RATES_BYTES_PER_S)]
        if flags.prune == "update":
            _step_islands(ranks, rate)
        else:
            network.at_once(functools.partial(_step_gradients, rate), ranks)
        densities.add(ranks[0].loop.decision.density)
        if step == flags.steps // 10:
            first_bytes = resident_bytes()
        if step % LOOK_EVERY == 0 or step == flags.steps:
            differing += len({rank.crc() for rank in ranks}) > 1
            if first_bytes:
                grown.append(resident_bytes() / first_bytes - 1.0)
    for rank in ranks:
        rank.close()
    network.close()
    return {name: getattr(flags, name) for name in FLAGS} | {
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


def _step_gradients(rate_bytes_per_s: float, rank: GradientRank) -> None:
    rank.step(rate_bytes_per_s)


def _step_islands(ranks: list[IslandRank], rate_bytes_per_s: float) -> None:
    """A start on the loopback leaves a copy, so one thread can start for all and then wait."""
    for rank in ranks:
        rank.row.sub_(rank.gradient(), alpha=LR)
    if ranks[0].loop.is_due:
        for rank in ranks:
            rank.begin()
        for rank in ranks:
            rank.begin_dense()
        for rank in ranks:
            rank.land(rate_bytes_per_s)
    for rank in ranks:
        rank.loop.end_step()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m labs.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--prune", choices=("update", "gradient"), default="update")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--numel", type=int, default=20_000)
    parser.add_argument("--sync-every", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a page of results")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        document = soak(flags, Path(folder))
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
    command = " ".join(f"--{name.replace('_', '-')} {document[name]}" for name in FLAGS)
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
