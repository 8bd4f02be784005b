"""The grid file: which methods are compared, on which model, with which hyper-parameters.

A grid is JSON; `Grid` is its schema. An unknown key, a value out of range and a key that its method
does not use are errors that name the field. Keys that the product has too bear the product's names.

Longer than 300 lines: one schema, whose attributes are all told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from ds_gradprune.config import BLOCK, GradientPruningConfig, load_block
from ds_gradprune.errors import ConfigError

Share = Annotated[float, pydantic.Field(gt=0.0, le=1.0)]
Fraction = Annotated[float, pydantic.Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, pydantic.Field(gt=0.0)]
Count = Annotated[int, pydantic.Field(ge=1)]


class Strict(pydantic.BaseModel):
    """JSON in which an unknown key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Model(Strict):
    """A GPT shape; the vocabulary is the bytes that occur in the text.

    Attributes:
        matmul: "bf16" rounds the factors of matrix products.
    """

    n_layer: Count = 3
    n_head: Count = 4
    n_embd: Count = 128
    context: Count = 64
    matmul: Literal["fp32", "bf16"] = "fp32"


class Train(Strict):
    """Hyper-parameters of AdamW and of the data; the same for every method unless it says so.

    Attributes:
        batch: sequences per worker and step.
        lr: peak; linear warm-up, then a cosine down to `lr_end` of it.
        lr_warmup_steps: length of that warm-up.
        lr_end: last learning rate as part of the peak.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: AdamW's.
        weight_decay: of matrices; vectors have none.
        clip: largest 2-norm of the gradient that enters AdamW.
        warmup_steps: first steps, dense; their bits are not counted.
    """

    batch: Count = 6
    lr: Positive = 4e-3
    lr_warmup_steps: Count = 50
    lr_end: Share = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-8
    weight_decay: Annotated[float, pydantic.Field(ge=0.0)] = 0.1
    clip: Positive = 1.0
    warmup_steps: Count = 80

    def of_dense(self) -> Train:
        """What a dense run depends on: it has no warm-up, so all warm-ups share one."""
        return self.model_copy(update={"warmup_steps": 0})


class Method(Strict):
    """What all methods have.

    Attributes:
        name: in tables.
        train: hyper-parameters that differ from the grid's.
        accumulate: steps whose sequences make one step of the method, as gradient accumulation
            does: what everyone can do to send less. The learning rate is that of the last of them.
    """

    name: str
    train: dict[str, float] = {}
    accumulate: Count = 1

    @property
    def label(self) -> str:
        """Kind, for records; "dense" is what others are measured against."""
        kind: str = getattr(self, "kind", "")
        return kind if self.accumulate == 1 else f"{kind}, accumulated"

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, for keys of runs: without defaults, so that they may grow."""
        return self.model_dump(exclude={"name", "train"}, exclude_defaults=True)


class Dense(Method):
    """AdamW on the mean gradient: what every other method is measured against."""

    kind: Literal["dense"]


class Pruned(Method):
    """What the product does; the keys are the product's.

    Attributes:
        density: kept / all elements at each exchange, pinned.
        value_bits: bits of a value on the wire.
        exchange: who sends what to whom.
        ramp_steps: steps after warm-up in which density falls from `ramp_from` to `density`.
        ramp_from: see `ramp_steps`.
    """

    density: Share = 0.01
    value_bits: Literal[2, 4, 16, 32] = 4
    exchange: Literal["all_gather", "owner_reduce"] = "all_gather"
    ramp_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    ramp_from: Share = 0.25

    def config(self, warmup_steps: int) -> GradientPruningConfig:
        """The product's block that asks for this method; raises ConfigError."""
        return load_block({BLOCK: self._block(warmup_steps)})

    def _block(self, warmup_steps: int) -> dict[str, Any]:
        most = max(self.ramp_from, self.density)
        return {
            "warmup_steps": warmup_steps,
            "ramp_steps": self.ramp_steps,
            "density": {"min": self.density, "initial": self.density, "max": most},
            "value_bits": self.value_bits,
            "exchange": self.exchange,
        }


class Gradient(Pruned):
    """Pruned gradients with error feedback into one AdamW: `"prune": "gradient"`."""

    kind: Literal["gradient"]

    def _block(self, warmup_steps: int) -> dict[str, Any]:
        return super()._block(warmup_steps) | {"prune": "gradient"}


class Steering(Strict):
    """A simulated link that changes, and the product's law on it: `steered.SteeredSimulation`.

    Attributes:
        rates_mbit: of the link, in turn.
        hold_steps: how long each holds.
        density_min: how far the law may go down; None: to `density`, and at `density_max` None as
            well the density stays, whatever the link does.
        density_max: how far up.
        budget_s: see the product's `step_time_budget_s`.
        moves_interval: the law chooses the interval as well.
    """

    rates_mbit: Annotated[tuple[Positive, ...], pydantic.Field(min_length=1)]
    hold_steps: Count
    density_min: Share | None = None
    density_max: Share | None = None
    budget_s: Positive | None = None
    moves_interval: bool = False


class Update(Pruned):
    """Islands, every one with its own AdamW: `"prune": "update"`.

    With `"residual": "reset"`, `"update_scale": 1` it is SparseLoCo as published.

    Attributes:
        sync_every: steps between exchanges.
        residual: "used" at once in the own weights, or "reset": kept aside until it is sent; None:
            the product's default.
        residual_decay: see the product.
        update_scale: factor on the mean update; None: the square root of the number of islands.
        slow_momentum: share of an average of the moves of 100 steps that every exchange adds.
        overlap: "auto": islands train on while an exchange travels, for as many steps as the
            product lets them; False: they wait.
        local_lr: factor of the learning rate on the islands, after warm-up. Not a key of the
            product: its user sets the learning rate.
        warmup: see the product.
        warmup_every: steps between exchanges in an unpruned warm-up, which the product's law
            chooses.
        warmup_doubles: the first intervals of an unpruned warm-up are 1, 2, 4 and so on.
        warmup_delay: steps from an unpruned exchange to its commit; None: the product's.
        warmup_bits: of a value in an unpruned warm-up; None: `value_bits`, as the product had it
            until 2026-11-28. Since then it has 2.
        warmup_dense: steps of an unpruned warm-up that are dense nevertheless, its first ones.
        steered: a simulated link, to which the law may answer.
    """

    kind: Literal["update"]
    sync_every: Count = 1
    residual: Literal["used", "reset"] | None = None
    residual_decay: Share = 0.95
    update_scale: Positive | None = None
    slow_momentum: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
    overlap: Literal["auto", False] = False
    local_lr: Positive = 1.0
    warmup: Literal["dense", "unpruned"] = "dense"
    warmup_every: Count = 1
    warmup_doubles: bool = False
    warmup_delay: Annotated[int, pydantic.Field(ge=0)] | None = None
    warmup_bits: Literal[2, 4] | None = None
    warmup_dense: Annotated[int, pydantic.Field(ge=0)] = 0
    steered: Steering | None = None

    def _block(self, warmup_steps: int) -> dict[str, Any]:
        own = self.model_dump(
            include={
                "sync_every", "residual", "residual_decay", "update_scale", "slow_momentum",
                "overlap", "warmup",
            }
        )  # fmt: skip
        return super()._block(warmup_steps) | {"prune": "update"} | own | self._steered_block()

    def _steered_block(self) -> dict[str, Any]:
        """What the law may move."""
        if self.steered is None:
            return {}
        least, most = self.steered.density_min, self.steered.density_max
        density = {
            "min": least or self.density,
            "initial": self.density,
            "max": most or self.density,
        }
        block: dict[str, Any] = {"density": density, "step_time_budget_s": self.steered.budget_s}
        return block | ({"sync_every": "auto"} if self.steered.moves_interval else {})


class DiLoCo(Method):
    """Everything is averaged after some steps, and Nesterov's momentum moves the shared weights.

    Douillard et al. 2023, arXiv 2311.08105; values of 4 bits and error feedback as in Streaming
    DiLoCo (Douillard et al. 2025, arXiv 2501.18512).

    Attributes:
        sync_every: steps between exchanges.
        value_bits: bits of a value on the wire.
        exchange: who sends what to whom.
        outer_lr: learning rate of the outer step.
        outer_momentum: Nesterov's.
        local_lr: factor of the learning rate on the islands, after warm-up.
    """

    kind: Literal["diloco"]
    sync_every: Count = 15
    value_bits: Literal[2, 4, 16, 32] = 4
    exchange: Literal["all_gather", "owner_reduce"] = "owner_reduce"
    outer_lr: Positive = 0.7
    outer_momentum: Fraction = 0.9
    local_lr: Positive = 1.0


class OneBitAdam(Method):
    """Tang et al. 2021: signs of the momentum, second moment frozen after warm-up."""

    kind: Literal["onebit_adam"]


class PowerSgd(Method):
    """Vogels et al. 2019: gradients as products of two thin matrices."""

    kind: Literal["powersgd"]
    rank: Count = 4


AnyMethod = Annotated[
    Dense | Gradient | Update | DiLoCo | OneBitAdam | PowerSgd,
    pydantic.Field(discriminator="kind"),
]


class Grid(Strict):
    """A whole grid file.

    Attributes:
        question: what the grid is to answer, one sentence.
        model: the shape.
        train: hyper-parameters.
        methods: what is compared; dense runs that a comparison needs are added by themselves.
    """

    question: str
    model: Model = Model()
    train: Train = Train()
    methods: tuple[AnyMethod, ...]

    @pydantic.model_validator(mode="after")
    def _check(self) -> Grid:
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"methods[].name must be unique, got {twice} twice.")
        for method in self.methods:
            train = self.train_of(method)
            if isinstance(method, Pruned):
                try:
                    method.config(train.warmup_steps)
                except ConfigError as exc:
                    raise ValueError(f"methods[].name {method.name!r}: {exc}") from exc
        return self

    def train_of(self, method: Method) -> Train:
        """Hyper-parameters of one method: the grid's with its own changes."""
        return Train.model_validate({**self.train.model_dump(), **method.train})

    def with_dense(self) -> list[Method]:
        """All methods, dense ones first, with the dense runs that are missing."""
        dense: list[Method] = [m for m in self.methods if m.label == "dense"]
        have = {self.train_of(m).of_dense() for m in dense}
        for method in self.methods:
            settings = self.train_of(method).of_dense()
            if settings not in have:
                have.add(settings)
                changed = {k: v for k, v in method.train.items() if k != "warmup_steps"}
                changes = " ".join(f"{k}={v:g}" for k, v in sorted(changed.items()))
                name = f"dense {changes}".strip()
                dense.append(Dense(kind="dense", name=name, train=changed))
        return dense + [m for m in self.methods if m.label != "dense"]


def read_grid(path: Path) -> Grid:
    """Read and check a grid file.

    Raises:
        ConfigError: it cannot be read or is not as `Grid` says; names every faulty field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} must be a readable JSON file: {exc}.") from exc
    try:
        return Grid.model_validate(data)
    except pydantic.ValidationError as exc:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or 'grid'}: {e['msg']}, got {e['input']!r}"
            for e in exc.errors()
        )
        raise ConfigError(f"{path} must be a grid: {faults}.") from exc
