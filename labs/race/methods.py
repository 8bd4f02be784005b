"""The names of the methods, and what they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ds_gradprune.errors import ConfigError

DENSE = "dense_fp32"
"""The method that all others are compared with."""

DEFAULT = (
    DENSE,
    "dense_bf16",
    "ddp_fp32",
    "fp16_hook",
    "bf16_hook",
    "powersgd_1",
    "powersgd_4",
    "powersgd_16",
    "topk_0.05",
    "topk_0.01",
    "onebit_adam",
    "zeroone_adam",
    "islands_0.01",
    "rounds_5",
    "ours",
    "ours_update",
)

ROUND_DENSITY = 0.03125
"""Of rounds: 128 elements of a chunk, see LOG.md, 2026-11-27."""

KNOWN = (
    f"{DENSE}, dense_bf16, ddp_fp32, fp16_hook, bf16_hook, powersgd_RANK (1, 4, 16, ...), "
    "topk_DENSITY (0.05, ...), onebit_adam, zeroone_adam, "
    "zeroone_adam_INTERVAL (1, 2, 4, ...), islands_DENSITY (0.01, ...), rounds_INTERVAL (5, ...), "
    "rounds_INTERVAL_DENSITY, ours, ours_update, ours_update_hidden, ours_update_auto, "
    "ours_update_auto_hidden"
)


@dataclass(frozen=True, slots=True)
class Method:
    """One way to exchange gradients, or updates.

    Attributes:
        name: as on the command line.
        side: "deepspeed", "ddp" for torch's DistributedDataParallel, which overlaps its exchange
            with the backward pass, or "simulated" for what DeepSpeed once had and no CPU runs.
        wire_dtype: of dense exchanges.
        rank: of PowerSGD's matrices; None: no PowerSGD.
        density: fixed share of elements that our reducer sends; None: it prunes nothing, or the
            density is adaptive.
        interval: of 0/1 Adam, most steps from one exchange to the next; 1 unless asked for.
        sync_every: of islands that exchange in rounds; None: as the block says. With a number
            they begin unpruned, hide their exchange, and send values of 2 bits.
        adaptive: our controller chooses the density, so the loss depends on the link.
        hides: the exchange travels behind the next steps, whatever the block says.
        prune: what our reducer prunes; "update": every rank is an island.
    """

    name: str
    side: Literal["deepspeed", "ddp", "simulated"]
    wire_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    rank: int | None = None
    density: float | None = None
    interval: int | None = None
    sync_every: int | Literal["auto"] | None = None
    adaptive: bool = False
    hides: bool = False
    prune: Literal["gradient", "update"] = "gradient"

    @property
    def prunes(self) -> bool:
        """Our reducer is at work."""
        return self.adaptive or self.density is not None

    @property
    def runs_at_rates(self) -> bool:
        """It is run in full at each rate: its loss, or its first steps, depend on the link."""
        return self.adaptive or self.sync_every is not None

    @property
    def begins_dense(self) -> bool:
        """The first steps are exchanged uncompressed, all of them or most."""
        return self.prunes or self.rank is not None or self.side == "simulated"

    @property
    def label(self) -> str:
        """The name for readers."""
        return f"{self.name} (simulated)" if self.side == "simulated" else self.name


_FIXED = {
    DENSE: Method(DENSE, "deepspeed"),
    "dense_bf16": Method("dense_bf16", "deepspeed", "bf16"),
    "ddp_fp32": Method("ddp_fp32", "ddp"),
    "fp16_hook": Method("fp16_hook", "ddp", "fp16"),
    "bf16_hook": Method("bf16_hook", "ddp", "bf16"),
    "onebit_adam": Method("onebit_adam", "simulated"),
    "zeroone_adam": Method("zeroone_adam", "simulated", interval=1),
    "ours": Method("ours", "deepspeed", adaptive=True),
    **{
        name: Method(
            name, "deepspeed", sync_every=every, adaptive=True, hides=hides, prune="update"
        )
        for name, every, hides in (
            ("ours_update", None, False),
            ("ours_update_hidden", None, True),
            ("ours_update_auto", "auto", False),
            ("ours_update_auto_hidden", "auto", True),
        )
    },
}


def parse_method(name: str) -> Method:
    """A method from its name. Pure.

    Raises:
        ConfigError: no such method, or a parameter out of range.
    """
    if name in _FIXED:
        return _FIXED[name]
    if name.startswith("rounds_"):
        return _rounds(name)
    match = re.fullmatch(r"(powersgd|topk|islands|zeroone_adam)_(\d+(?:\.\d+)?)", name)
    if match is not None:
        kind, number = match[1], float(match[2])
        if kind == "topk" and 0.0 < number < 1.0:
            return Method(name, "deepspeed", density=number)
        if kind == "islands" and 0.0 < number < 1.0:
            return Method(name, "deepspeed", density=number, prune="update")
        if kind == "powersgd" and number >= 1 and number == int(number):
            return Method(name, "ddp", rank=int(number))
        if kind == "zeroone_adam" and number >= 1 and number == int(number):
            return Method(name, "simulated", interval=int(number))
    raise ConfigError(f"--methods must name some of {KNOWN}; got {name!r}.")


def _rounds(name: str) -> Method:
    match = re.fullmatch(r"rounds_([1-9]\d*)(?:_(0\.\d+))?", name)
    density = float(match[2] or ROUND_DENSITY) if match is not None else 0.0
    if match is None or density == 0.0:
        raise ConfigError(f"--methods must name some of {KNOWN}; got {name!r}.")
    return Method(name, "deepspeed", density=density, sync_every=int(match[1]), prune="update")


def parse_methods(text: str) -> list[Method]:
    """Methods from a list with commas. Pure.

    Raises:
        ConfigError: as `parse_method`, or one is there twice.
    """
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names):
        raise ConfigError(f"--methods must name each method once, got {text!r}.")
    return [parse_method(name) for name in names]
