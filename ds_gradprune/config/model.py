"""The keys of the `gradient_pruning` block. Every field's description is its row in the README.

The models mirror DeepSpeed's habits (unknown keys are errors, "auto" means the default) on pydantic
itself, because importing this package must not import deepspeed.

Longer than 300 lines: one schema, whose keys are all described.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ds_gradprune.config.fields import (
    FIRST_INTERVAL,
    LEAST_LOSSES,
    Budget,
    Density,
    Megabit,
    Pause,
    Share,
    Step,
    Steps,
    SyncEvery,
    Target,
    Timeout,
    accepted_types,
    has_auto,
    words_of,
)
from ds_gradprune.config.wording import name_of

BLOCK = "gradient_pruning"
"""Name of our top-level key in ds_config.json."""

UNPRUNED_BITS = 2
"""Of a value where all are sent. Its rounding error stays in the residual, and 4 bits lose as much
(LOG.md, 2026-11-28)."""

ALL_GATHER_ISLANDS = 8
"""Up to so many islands `exchange: "auto"` is all_gather: beyond, its bytes grow with their number,
while those of owner_reduce stay."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_auto(cls, data: Any) -> Any:
        """As in DeepSpeed's blocks, "auto" stands for the default, unless it is a value itself."""
        if not isinstance(data, Mapping):
            return data
        named = {name_of(key): item for key, item in data.items()}
        fields = cls.model_fields
        left_out = {
            key
            for key, item in named.items()
            if isinstance(item, str) and item == "auto"
            if key in fields and not has_auto(fields[key].annotation)
        }
        return {key: item for key, item in named.items() if key not in left_out}

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Refuse types that pydantic would convert: true -> 1, "3" -> 3."""
        accepted = accepted_types(cls.model_fields[info.field_name or ""].annotation)
        converted = isinstance(value, (bool, str)) or bool in accepted
        if accepted and converted and type(value) not in accepted:
            raise PydanticCustomError("wrong_type", "{words}", {"words": words_of(accepted)})
        return value


class DensityConfig(_Block):
    """Kept / all elements: where the controller starts and how far it may go."""

    initial: Density = Field(
        default=0.05, description="Share of the elements that is sent after warm-up and ramp."
    )
    min: Density = Field(default=0.001, description="The controller never prunes harder than this.")
    max: Density = Field(
        default=0.25,
        description="The ramp begins here, and pruned exchanges never send more. The controller "
        "still goes dense where dense fits the budget or is faster, unless min = max.",
    )


class IslandConfig(_Block):
    """Which ranks form an island."""

    ranks: Annotated[int, Field(ge=1, le=2**20)] | None = Field(
        default=None,
        description="So many consecutive ranks form an island. With null, the ranks of a host do, "
        "and on a single host each rank alone.",
    )


class LinkPoint(_Block):
    """One point of an emulated link's schedule; holds from `step` on."""

    step: Step = Field(default=0, description="This point holds from this optimizer step on.")
    rate_mbit: Megabit = Field(
        ...,
        description="Rate of each rank's link in each direction, in megabit (10^6 bit) per second.",
    )
    latency_s: Pause = Field(
        default=0.0, description="Seconds that the link adds to every collective."
    )
    outage_s: Pause = Field(
        default=0.0, description="Seconds for which the link is dead when this point begins."
    )


class TargetPoint(_Block):
    """One point of a schedule for the performance target; holds from `step` on."""

    step: Step = Field(default=0, description="This point holds from this optimizer step on.")
    target: Target = Field(..., description="Where P(t) is below it, less is pruned.")


class ThrottleConfig(_Block):
    """Emulates a slow link on one machine, for laptops and tests."""

    schedule: list[LinkPoint] = Field(
        ...,
        min_length=1,
        max_length=10_000,
        description="What the link is like, as points in order of step.",
    )


class GradientPruningConfig(_Block):
    """The whole block."""

    enabled: bool = Field(default=True, description="False leaves DeepSpeed untouched.")
    prune: Literal["gradient", "update"] = Field(
        default="update",
        description="What is pruned and exchanged: each step's gradient, or what every island's "
        "optimizer has changed.",
    )
    island: IslandConfig = Field(
        default_factory=IslandConfig,
        description="Which ranks step together, or sum gradients before they send, see below.",
    )
    sync_every: SyncEvery = Field(
        default=1,
        description="With update: optimizer steps from one exchange to the next, after the "
        "warm-up. With auto the control law chooses 1, 2, 4, 8, 16 or 32.",
    )
    residual: Literal["used", "reset"] | None = Field(
        default=None,
        description="With update: progress that was not sent is used in the island's own weights "
        "at once, or kept aside until it is sent. Null means used if sync_every is 1, else reset.",
    )
    residual_decay: Share = Field(
        default=0.95,
        description="With residual = reset: the residual is multiplied by this at every exchange.",
    )
    update_scale: Annotated[float, Field(gt=0.0, le=1000.0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="With update: factor on the islands' mean update. Null means the square root "
        "of their number. With residual = reset it then follows the density, see modes.md.",
    )
    slow_momentum: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = Field(
        default=0.0,
        description="With update: share of the last 100 steps' average move that every exchange "
        "adds to the shared weights. 0 turns it off.",
    )
    warmup: Literal["auto", "dense", "unpruned"] = Field(
        default="auto",
        description="With update: in the warm-up all ranks average their gradients as DeepSpeed "
        "does, or islands exchange their whole updates. Auto tries the link first, and is "
        "unpruned where dense exchanges take longer than the computation.",
    )
    warmup_steps: Step = Field(
        default=200, description="Nothing is pruned in the first so many optimizer steps."
    )
    ramp_steps: Step = Field(
        default=100,
        description="In so many steps after the warm-up, density falls geometrically from max to "
        "initial.",
    )
    window_size: Annotated[int, Field(ge=4, le=10**6)] = Field(
        default=128, description="M, the steps from whose losses P(t) is computed."
    )
    performance_target: Target = Field(
        default=0.0, description="Where P(t) is below it, less is pruned."
    )
    performance_target_schedule: (
        Annotated[list[TargetPoint], Field(min_length=1, max_length=10_000)] | None
    ) = Field(
        default=None,
        description="Targets of later steps, as points in order of step. Before the first point, "
        "and with null, performance_target holds.",
    )
    performance_form: Literal["edge", "literal"] = Field(
        default="edge",
        description="Formula of P(t): edge compares the means of the window's two ends, literal "
        "its first and last loss.",
    )
    step_time_budget_s: Budget | None = Field(
        default=None,
        description="Seconds that a step may take. With null, the controller finds the step time "
        "at which most is learned per second.",
    )
    controller: Literal["predictive", "stepwise"] = Field(
        default="predictive",
        description="Control law: predictive goes to the right density at once, stepwise moves by "
        "fixed factors.",
    )
    density: DensityConfig = Field(
        default_factory=DensityConfig, description="Share of the elements that is sent, see below."
    )
    value_bits: Literal[2, 4, 16, 32] = Field(
        default=4,
        description="Bits of a value on the wire. 32 is fp32, 16 is bf16, and 4 and 2 are levels "
        "whose rounding error stays in the residual. Unpruned exchanges have 2 in place of 4.",
    )
    error_feedback: bool = Field(
        default=True, description="What is not sent is added to the next exchange."
    )
    clip_to_median: Annotated[float, Field(gt=0.0, le=1000.0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="No sender counts for more than so many times the median norm of all messages "
        "in a pruned exchange. With two senders the smaller norm is the median. Null means off.",
    )
    min_numel: Annotated[int, Field(ge=1, le=2**40)] = Field(
        default=4096, description="Tensors with fewer elements, and 1-D ones, are sent whole."
    )
    exchange: Literal["auto", "all_gather", "owner_reduce"] = Field(
        default="auto",
        description="Every island sends to all others, or each part has an owner that adds it up. "
        "Auto means all_gather up to 8 islands, owner_reduce above.",
    )
    overlap: Literal["auto", False] = Field(
        default=False,
        description="Auto lets the computation go on while a pruned exchange travels, and true "
        "says the same. With gradient, buckets leave during backward. False waits for it.",
    )
    shared_device: Literal["auto", "device", "cpu"] = Field(
        default="auto",
        description="With update: where the shared weights lie, beside the model or in the host's "
        "memory. Auto takes the device while it has room.",
    )
    transport: Literal["torch", "mpi"] = Field(
        default="torch",
        description="What moves the bytes: torch.distributed, or the MPI that started the "
        "processes. Dense steps stay with torch.distributed.",
    )
    timeout_s: Timeout = Field(
        default=600.0,
        description="A rank that does not answer for so many seconds ends the run with an error.",
    )
    min_islands: Annotated[int, Field(ge=1, le=2**16 - 1)] | None = Field(
        default=None,
        description="With update: an island that has lost a rank is left out while so many are "
        "left, and the others train on. Null means that a lost rank ends the run.",
    )
    verify_every_steps: Steps | None = Field(
        default=100,
        description="A hash of all parameters is compared across ranks so often. Null means never.",
    )
    log_path: Annotated[str, Field(min_length=1, max_length=4096, pattern="^[^\\x00]*$")] | None = (
        Field(
            default=None,
            description="Rank 0 writes every step's signals and decision here, as JSON lines.",
        )
    )
    throttle: ThrottleConfig | None = Field(
        default=None, description="Emulates a slow link, for laptops and tests, see below."
    )

    @pydantic.field_validator("overlap", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        """Accelerate refuses "auto" in a block that it does not know: true stands for it."""
        return "auto" if value is True else value

    @property
    def first_interval(self) -> int:
        """`sync_every`, "auto" resolved for a run's start."""
        return FIRST_INTERVAL if self.sync_every == "auto" else self.sync_every

    @property
    def residual_form(self) -> Literal["used", "reset"]:
        """`residual`, null resolved."""
        return self.residual or ("used" if self.sync_every == 1 else "reset")

    @property
    def warmup_form(self) -> Literal["auto", "dense", "unpruned"]:
        """`warmup`; "auto" is dense where nothing decides."""
        decides = self.prune == "update" and self.controller == "predictive"
        return "dense" if self.warmup == "auto" and not decides else self.warmup

    @property
    def delay_steps(self) -> int:
        """Optimizer steps from an exchange to its commit; 0: it is waited for."""
        return self.delay_of(self.first_interval)

    def delay_of(self, interval: int, *, unpruned: bool = False) -> int:
        """The same where exchanges come every `interval` steps.

        Args:
            interval: optimizer steps from one exchange to the next.
            unpruned: it sends everything, in an unpruned warm-up.
        """
        hides = self.overlap == "auto" and self.prune == "update"
        return max(1, interval // (2 if unpruned else 4)) if hides else 0

    @property
    def unpruned_bits(self) -> int:
        """Bits of a value where all are sent, in an unpruned warm-up: 2, or 16 and 32 as given."""
        return UNPRUNED_BITS if self.value_bits <= 4 else self.value_bits

    def window_losses(self, interval: int) -> int:
        """`window_size` in losses, where one is told in so many steps."""
        losses = -(-self.window_size // interval)
        return losses if losses >= LEAST_LOSSES else min(self.window_size, LEAST_LOSSES)

    def exchange_of(self, num_islands: int) -> Literal["all_gather", "owner_reduce"]:
        """`exchange`, "auto" resolved for so many islands."""
        if self.exchange != "auto":
            return self.exchange
        return "all_gather" if num_islands <= ALL_GATHER_ISLANDS else "owner_reduce"
