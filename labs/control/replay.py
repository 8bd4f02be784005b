"""A run on the bed, made once more by the simulator: do the two agree?

What the law cannot change is taken from the record: the rate that the links were shaped to, the
computation and the training loss of every step. What it can is modelled, from the same record:

    payload(density)   between the payloads that were sent
    codec(density)     a straight line
    exchange           overhead + frames * payload * 8 / rate

so a density other than the recorded one has other times, and the law answers to those. An unshaped
stretch has the rate that its own exchanges show.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_gradprune import law
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import ConfigError
from ds_gradprune.law.consensus import aggregate
from ds_gradprune.law.signals import RankSignals
from tools.netbed import parse_rate

FRAMES = 1.0 + 66 / 1448
"""Bytes on an Ethernet link for a byte of TCP payload: headers of a full segment."""

ANSWER = 1.25
"""A density this much higher or lower answers a change; refinements are smaller."""


@dataclass(frozen=True, slots=True)
class Passed:
    """One step as it passed, recorded or simulated.

    Attributes:
        link: rate as asked for, "200mbit", or "unshaped".
        rate_bps: of the links.
        density: kept / all.
        payload_bytes: sent by a host.
        compute_s, codec_s, comm_s: parts of the step.
        loss: of the training batch.
    """

    link: str
    rate_bps: float
    density: float
    payload_bytes: float
    compute_s: float
    codec_s: float
    comm_s: float
    loss: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.codec_s + self.comm_s


@dataclass(frozen=True, slots=True)
class Recording:
    """Ours on the bed.

    Attributes:
        config: of the law.
        steps: in order, dense ones first.
    """

    config: GradientPruningConfig
    steps: list[Passed]

    @property
    def first_free(self) -> int:
        """Index of the first step whose density the law chose."""
        return self.config.warmup_steps + max(1, self.config.ramp_steps)


def read(path: Path) -> Recording:
    """What `python -m labs.control bed` wrote: the first run in it, which is ours.

    Raises:
        ConfigError: the file holds no such record.
    """
    # They load torch, which nothing else of the simulator does.
    from labs.race.engines import ds_config
    from labs.race.job import Recipe
    from labs.race.methods import parse_method

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        run = document["runs"][0]
        method, recipe = parse_method(run["method"]), Recipe(**document["setting"]["recipe"])
        config = GradientPruningConfig(**ds_config(method, recipe)["gradient_pruning"])
        steps = [_passed(step) for step in run["steps"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as exc:
        raise ConfigError(
            f'--replay must be a file that "python -m labs.control bed --out" wrote, got {path}: '
            f"{exc}"
        ) from exc
    recording = Recording(config, steps)
    if len(steps) <= recording.first_free + 1 or any(step.comm_s <= 0 for step in steps):
        raise ConfigError(f"--replay must hold pruned steps that were timed, got {path}.")
    return recording


def _passed(step: dict[str, Any]) -> Passed:
    sent, comm_s = float(step["payload_bytes"]), float(step["comm_s"])
    shaped = parse_rate(step["rate"])
    rate_bps = FRAMES * 8.0 * sent / comm_s if shaped is None else float(shaped)
    return Passed(
        link=step["rate"] or "unshaped",
        rate_bps=rate_bps,
        density=step["density"],
        payload_bytes=sent,
        compute_s=step["compute_s"],
        codec_s=step["codec_s"],
        comm_s=comm_s,
        loss=step["loss"],
    )


def measured_rates(recording: Recording) -> list[float]:
    """Bits sent over exposed time, one per step, bits per second."""
    return [8.0 * step.payload_bytes / step.comm_s for step in recording.steps]


class Model:
    """What a density costs, from a recording."""

    def __init__(self, recording: Recording) -> None:
        pruned = [step for step in recording.steps if step.density < 1.0]
        dense = [step for step in recording.steps if step.density == 1.0]
        sizes = dict(sorted((step.density, step.payload_bytes) for step in pruned))
        self._densities, self._sizes = list(sizes), list(sizes.values())
        self.dense_bytes = statistics.median(step.payload_bytes for step in dense)
        self._dense_codec_s = statistics.median(step.codec_s for step in dense)
        rows = np.array([[1.0, step.density] for step in pruned])
        line, *_ = np.linalg.lstsq(rows, np.array([step.codec_s for step in pruned]), rcond=None)
        self._codec = (float(line[0]), float(line[1]))
        waits = (step.comm_s - _wire_s(step.payload_bytes, step.rate_bps) for step in pruned)
        self.overhead_s = max(0.0, statistics.median(waits))

    def payload_bytes(self, density: float) -> float:
        """Sent by a host; outside the recorded densities in proportion."""
        if density == 1.0:
            return self.dense_bytes
        inside = min(max(density, self._densities[0]), self._densities[-1])
        return float(np.interp(inside, self._densities, self._sizes)) * density / inside

    def codec_s(self, density: float) -> float:
        """Select, encode, decode."""
        if density == 1.0:
            return self._dense_codec_s
        return max(0.0, self._codec[0] + self._codec[1] * density)

    def comm_s(self, density: float, rate_bps: float) -> float:
        """The exchange."""
        return self.overhead_s + _wire_s(self.payload_bytes(density), rate_bps)


def _wire_s(payload_bytes: float, rate_bps: float) -> float:
    return FRAMES * 8.0 * payload_bytes / rate_bps


def simulate(recording: Recording) -> list[Passed]:
    """The run once more, the law in charge. Pure."""
    model, passed = Model(recording), list[Passed]()
    state, decision = law.start(recording.config)
    for number, real in enumerate(recording.steps, start=1):
        density = decision.density
        now = Passed(
            real.link,
            real.rate_bps,
            density,
            model.payload_bytes(density),
            real.compute_s,
            model.codec_s(density),
            model.comm_s(density, real.rate_bps),
            real.loss,
        )
        # Times ride one step late, in the headers of the next exchange.
        last = passed[-1] if passed else None
        rank = RankSignals(
            loss=real.loss,
            nonfinite=not math.isfinite(real.loss),
            compute_time_s=None if last is None else last.compute_s,
            codec_time_s=0.0 if last is None else last.codec_s,
            comm_time_s=0.0 if last is None else last.comm_s,
            wire_bytes=0 if last is None else round(last.payload_bytes),
            agreement=0,
        )
        timed = None if last is None else last.density
        signals = aggregate(number, [rank], timed, round(model.dense_bytes))
        state, decision = law.update(recording.config, state, signals)
        passed.append(now)
    return passed


def compare(recording: Recording, simulated: Sequence[Passed]) -> dict[str, Any]:
    """How far the two are apart. Pure.

    Returns:
        stretches: for each rate in turn, `recorded` and `simulated`, each with the median density,
        the median seconds of a step, and `answered`: so many steps after the change the density
        was `ANSWER` times another (None: never, or it is the first stretch). density_ratio:
        geometric mean of the simulated over the recorded density. time_ratio: of all steps' time.
    """
    first, stretches = recording.first_free, []
    pairs = list(enumerate(zip(recording.steps, simulated, strict=True)))[first:]
    for link, group in itertools.groupby(pairs, key=lambda pair: pair[1][0].link):
        rows = list(group)
        begin, end = rows[0][0], rows[-1][0] + 1
        sides = {
            name: {
                "density": statistics.median(step.density for step in steps[begin:end]),
                "step_s": statistics.median(step.step_s for step in steps[begin:end]),
                "answered": None if begin == first else _answered(steps, begin, end),
            }
            for name, steps in (("recorded", recording.steps), ("simulated", simulated))
        }
        stretches.append({"link": link, "steps": end - begin, **sides})
    logs = [math.log(ours.density / real.density) for _, (real, ours) in pairs]
    real_s = math.fsum(real.step_s for _, (real, _) in pairs)
    ours_s = math.fsum(ours.step_s for _, (_, ours) in pairs)
    return {
        "stretches": stretches,
        "density_ratio": math.exp(statistics.fmean(logs)),
        "time_ratio": ours_s / real_s,
    }


def _answered(steps: Sequence[Passed], begin: int, end: int) -> int | None:
    """Steps from the change to the first one at a clearly other density."""
    before = steps[begin - 1].density
    return next(
        (
            at - begin
            for at in range(begin, end)
            if not 1.0 / ANSWER < steps[at].density / before < ANSWER
        ),
        None,
    )


def rows_of(agreement: dict[str, Any]) -> list[list[str]]:
    """A head and one row for each stretch."""
    rows = [["link", "steps", "density", "simulated", "step s", "simulated", "answered", "sim."]]
    for stretch in agreement["stretches"]:
        real, ours = stretch["recorded"], stretch["simulated"]
        answers = [
            "-" if side["answered"] is None else str(side["answered"]) for side in (real, ours)
        ]
        rows.append(
            [
                stretch["link"],
                str(stretch["steps"]),
                f"{real['density']:.4f}",
                f"{ours['density']:.4f}",
                f"{real['step_s']:.3f}",
                f"{ours['step_s']:.3f}",
                *answers,
            ]
        )
    return rows
