"""What doctor concludes from its measurements. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_gradprune.commands import forecast, loss_gap
from ds_gradprune.commands.forecast import Cost, Job, Link, Setting

DENSITIES = (0.001, 0.01, 0.05)
INTERVALS = (1, 5, 10)

TYPICAL_SHARE = 0.93
"""Of a link's rate that gloo's collectives get (results/doctor_202611.md)."""

SOFTWARE_SHARE = 0.7
"""With a smaller share the link is not what limits them."""


@dataclass(frozen=True, slots=True)
class Column:
    """A link of the table.

    Attributes:
        label: for a user.
        rate_mbit: of payload.
        link: what else is known of it.
        is_measured: it is there; else it is assumed.
    """

    label: str
    rate_mbit: float
    link: Link
    is_measured: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one exchange of a density costs on the slowest host.

    Attributes:
        codec_s: select, encode, decode, apply.
        wire_bytes: that one host sends.
        delay_steps: steps of computation that it may hide behind.
    """

    codec_s: float
    wire_bytes: float
    delay_steps: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """One link: what a step takes on it.

    Attributes:
        column: the link.
        dense: cost of a dense step.
        pruned: cost by setting.
        recommended: what to begin with; None: stay dense.
    """

    column: Column
    dense: Cost
    pruned: Mapping[Setting, Cost]
    recommended: Setting | None

    @property
    def dense_s(self) -> float:
        """Seconds of a dense step."""
        return self.dense.step_s(self.column.rate_mbit)

    def pruned_s(self, setting: Setting) -> float:
        """Seconds of a pruned step."""
        return self.pruned[setting].step_s(self.column.rate_mbit)

    def break_even_mbit(self, setting: Setting) -> float | None:
        """Payload rate below which a setting is faster; None: at every rate."""
        return forecast.break_even_mbit(self.dense, self.pruned[setting])

    @property
    def best(self) -> Setting:
        """The recommended setting, or else the fastest one."""
        return self.recommended or min(self.pruned, key=self.pruned_s)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The whole conclusion.

    Attributes:
        job: what is trained.
        outlooks: one per link; what is measured comes first.
        latency_s: of the slowest pair; of the emulated link on one host.
    """

    job: Job
    outlooks: Sequence[Outlook]
    latency_s: float

    @property
    def pays(self) -> bool:
        """On the measured link; where none was measured, on one of those asked for."""
        measured = [o for o in self.outlooks if o.column.is_measured]
        return any(o.recommended is not None for o in measured or self.outlooks)

    @property
    def main(self) -> Outlook:
        """What the verdict is about: the measured link, or else the first one on which it pays."""
        measured = [o for o in self.outlooks if o.column.is_measured]
        paying = [o for o in self.outlooks if o.recommended is not None]
        return (measured or paying or list(self.outlooks))[0]

    def gap(self, setting: Setting) -> loss_gap.Gap:
        """The loss that a setting is expected to cost."""
        return loss_gap.expected(setting, self.job.islands, self.job.numel, self.job.tokens)

    def block(self, warmup_steps: int) -> dict[str, Any]:
        """The block to paste.

        Args:
            warmup_steps: of the user's own block.
        """
        setting = self.main.recommended
        if setting is None:
            return {"gradient_pruning": {"enabled": False}}
        block: dict[str, Any] = {"density": {"initial": setting.density}}
        if setting.interval > 1:
            block = {"sync_every": setting.interval} | block
        if warmup_steps != 200:
            block = {"warmup_steps": warmup_steps} | block
        return {"gradient_pruning": block}

    def as_json(self) -> dict[str, Any]:
        """For scripts; seconds by setting name."""
        main = self.main
        return {
            "link_mbit": main.column.rate_mbit,
            "link_is_measured": main.column.is_measured,
            "latency_ms": 1e3 * self.latency_s,
            "dense_step_s": main.dense_s,
            "pruned_step_s": {s.name: main.pruned_s(s) for s in main.pruned},
            "break_even_mbit": main.break_even_mbit(main.best),
            "recommended": None if main.recommended is None else main.recommended.name,
            "pays": self.pays,
            "islands": self.job.islands,
            "parameters": self.job.numel,
            "compute_s": self.job.compute_s,
            "watch_s": self.job.watch_s,
            "wait_s": self.job.wait_s,
            "local_s": {s.name: cost.local_s for s, cost in main.pruned.items()},
            "links": [
                {
                    "link": o.column.label,
                    "link_mbit": o.column.rate_mbit,
                    "dense_step_s": o.dense_s,
                    "pruned_step_s": {s.name: o.pruned_s(s) for s in o.pruned},
                    "break_even_mbit": {s.name: o.break_even_mbit(s) for s in o.pruned},
                    "recommended": None if o.recommended is None else o.recommended.name,
                }
                for o in self.outlooks
            ],
            "loss_gap_percent": {
                s.name: [gap.percent, gap.low, gap.high]
                for s in main.pruned
                for gap in [self.gap(s)]
            },
        }


def diagnose(
    job: Job,
    columns: Sequence[Column],
    exchanges: Mapping[Setting, Exchange],
    latency_s: float,
) -> Diagnosis:
    """Put measured costs together.

    Args:
        job: what is trained.
        columns: links; at least one.
        exchanges: cost of an exchange by setting.
        latency_s: see `Diagnosis`.
    """
    outlooks = []
    for column in columns:
        dense = forecast.dense_cost(job, column.link)
        pruned = {
            setting: forecast.pruned_cost(
                job,
                column.link,
                setting.interval,
                codec_s=exchange.codec_s,
                wire_bytes=exchange.wire_bytes,
                delay_steps=exchange.delay_steps,
            )
            for setting, exchange in exchanges.items()
        }
        recommended = forecast.recommend(dense, pruned, column.rate_mbit)
        outlooks.append(Outlook(column, dense, pruned, recommended))
    return Diagnosis(job, outlooks, latency_s)


def emulated(rates: Sequence[float], latency_s: float, islands: int) -> list[Column]:
    """Links of these nominal rates, which do what they promise."""
    link = Link.ideal(latency_s, islands)
    return [Column(f"{rate:g} Mbit/s", forecast.payload_mbit(rate), link) for rate in rates]


def assumed(rates: Sequence[float], measured: Link, rate_mbit: float) -> list[Column]:
    """Links of these nominal rates, behind which the same hosts sit.

    Collectives get `TYPICAL_SHARE` of a rate. Where they got less than `SOFTWARE_SHARE` of the
    measured one, it was the software that was slow: then they get no more bytes anywhere.

    Args:
        rates: Mbit/s, as on the labels.
        measured: the link that is there.
        rate_mbit: its payload rate.
    """
    columns = []
    for nominal in rates:
        rate = forecast.payload_mbit(nominal)
        link = replace(
            measured,
            gather_share=_share(measured.gather_share, rate_mbit / rate),
            reduce_share=_share(measured.reduce_share, rate_mbit / rate),
        )
        columns.append(Column(f"{nominal:g} Mbit/s", rate, link))
    return columns


def _share(measured: float, factor: float) -> float:
    return TYPICAL_SHARE if measured >= SOFTWARE_SHARE else min(TYPICAL_SHARE, measured * factor)
