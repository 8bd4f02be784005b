"""The grid file: which methods are compared, on which model, with which hyper-parameters.

A grid is JSON; `Grid` is its schema. An unknown key, a value out of range and a key that its method
does not use are errors that name the field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from ds_gradprune.errors import ConfigError

Share = Annotated[float, pydantic.Field(gt=0.0, le=1.0)]
Fraction = Annotated[float, pydantic.Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, pydantic.Field(gt=0.0)]
Count = Annotated[int, pydantic.Field(ge=1)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Model(_Strict):
    """A GPT shape; the vocabulary is the bytes that occur in the text.

    Attributes:
        matmul: "bf16" rounds the factors of matrix products, which is faster on CPUs that have it.
    """

    n_layer: Count = 3
    n_head: Count = 4
    n_embd: Count = 128
    context: Count = 64
    matmul: Literal["fp32", "bf16"] = "fp32"


class Train(_Strict):
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


class _Method(_Strict):
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

    def label(self) -> str:
        """Kind, for records; "dense" is what others are measured against."""
        kind: str = getattr(self, "kind", "")
        return kind if self.accumulate == 1 else f"{kind}, accumulated"


class Dense(_Method):
    """AdamW on the mean gradient: what every other method is measured against."""

    kind: Literal["dense"]


class DenseSlow(_Method):
    """Dense with a slow momentum after warm-up: is it better pruning, or a better optimizer?

    Attributes:
        slow: as `Update.slow`, of AdamW's own moves.
        slow_decay: as `Update.slow_decay`.
    """

    kind: Literal["dense_slow"]
    slow: Positive = 1.0
    slow_decay: Fraction = 0.99


class Sent(_Method):
    """What the pruned methods share: how much of a vector is sent, and how.

    Attributes:
        density: kept / all elements at each exchange.
        density_end: density reached at the last step, geometrically; None: constant.
        density_late: density of the last `late_part` of the run; None: as before.
        late_part: see `density_late`.
        ramp_steps: steps after warm-up in which density falls from `ramp_from` to `density`,
            geometrically.
        ramp_from: see `ramp_steps`.
        pick: "top_k": the largest of every chunk of 4096, each worker its own; "rotate": the same
            run of consecutive elements on all workers, moving on from exchange to exchange, so that
            no index is sent; "random": as "rotate", but elements strewn over the whole vector.
        value_bits: 16 and 32 are the codec's; 1, 2 and 4 see `values`.
        prune_vectors: 1-D tensors are pruned as the matrices are, instead of sent whole.
        exchange: "all_gather": everyone gets everyone's payload; "owner_reduce": every element has
            an owner that adds the workers' messages, prunes and rounds the mean once more, with a
            residual of its own, and sends that to all: 2 (N - 1) / N payloads instead of N - 1.
    """

    density: Share = 0.01
    density_end: Share | None = None
    density_late: Share | None = None
    late_part: Share = 0.1
    ramp_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    ramp_from: Share = 1.0
    pick: Literal["top_k", "rotate", "random"] = "top_k"
    value_bits: Literal[1, 2, 4, 16, 32] = 4
    prune_vectors: bool = False
    exchange: Literal["all_gather", "owner_reduce"] = "all_gather"


class Gradient(Sent):
    """Pruned gradients with error feedback into one AdamW.

    Attributes:
        second_moment: "plain"; "tau": a spike's square is divided by the steps since the element
            was last received, elements not received only decay; "frozen": kept after warm-up;
            "floor": 1 - beta2 is at most a tenth of the union density.
        score: what is compared in a chunk: the magnitude, or the magnitude over sqrt(v).
        local_momentum: workers send momentum; AdamW then has beta1 = 0.
    """

    kind: Literal["gradient"]
    second_moment: Literal["plain", "tau", "frozen", "floor"] = "plain"
    score: Literal["magnitude", "over_sqrt_v"] = "magnitude"
    local_momentum: bool = False


class Update(Sent):
    """Islands: every worker steps its own AdamW; what it did not send stays in its weights.

    Attributes:
        sync_every: steps between exchanges.
        scale: factor of every move: a number, "sqrt" of the number of workers, "sum": that number,
            or "measured": the ratio of a worker's move to the mean move (2-norms, pick must
            be "rotate" or "random").
        scale_at: "local": the worker's own steps are scaled, so it sees its progress at full size;
            "shared": only the mean is.
        momentum: outer momentum mu on the shared move.
        nesterov: Nesterov's form instead of the heavy ball's.
        outer_lr: factor of the outer step; with momentum mu a steady move becomes
            outer_lr / (1 - mu) times as large.
        slow: share of an average of the shared moves, over the last 1 / (1 - slow_decay), that is
            added to each of them, as AdEMAMix does (Pagliardini et al. 2024): what has
            moved the same way for long moves 1 + slow times as far, noise hardly further.
        slow_decay: of that average, per exchange.
        slow_by: "fixed": the share is `slow`; "predicted": `slow` times how much of the next move
            the average has foretold, in [0, 1] (see `drift.Drift`); "own": the same, of the mean of
            the workers' own moves, sent or not. What has just been sent is not soon sent again, so
            the shared moves themselves swing back.
        slow_owed: what the average adds is taken off what the workers owe: it then comes sooner,
            not besides, and what was foretold wrongly is owed the other way.
        deliver: "sent": the shared weights move by what was sent; "whole": by the workers' whole
            moves, as if nothing were pruned, while each sees besides what it would not have sent.
            So what is lost is lost by where gradients are taken (a bound, not a method).
        own: how much of the unsent progress a worker sees in its weights.
        keep: share of the unsent progress that is kept per step. Below 1 it forgets noise; what was
            signal comes again, because a worker's gradient is that of the weights it sees.
        score: what is compared in a chunk: "magnitude"; "over_row": the magnitude over the root
            mean square of its row of the weight matrix; "second_moment": the magnitude times the
            workers' mean second moment to the power `score_power` / 2. With 1 that is the magnitude
            before AdamW has divided it: what the element is worth to the loss, to first order.
        score_power: see `score`.
        local_lr: factor of the learning rate on the islands: a number, or "root" for one over the
            root of the number of workers.
        local_lr_from: "start": in the dense warm-up too; "pruning": after it.
        relay: share of what a worker sent that it keeps seeing until the others' share arrives.
        relay_decay: by which that share shrinks per step.
        warmup: what the dense warm-up exchanges: "update", so that every second moment is that of
            a worker's own gradients from the start; or "gradient", dense's own steps.
        frozen: second moments stay as they are at the end of warm-up.
        second_moment: "own": of a worker's own gradients; "mean": of the workers' mean gradient, as
            dense has it and nobody knows (its bytes are not counted: a bound, not a method);
            "corrected": own, the part of it that is noise divided by the number of workers. With
            the last two a step has dense's length, so scale is 1.
        momentum_at: "islands": each worker's optimizer has its own; "shared": after the
            warm-up workers send the learning rate times gradient / sqrt(v), and AdamW's first
            moment is that of the exchanged means, so that it smooths what pruning and rounding
            have added. Weights then decay on the shared side.
    """

    kind: Literal["update"]
    sync_every: Count = 1
    scale: Literal["sqrt", "sum", "measured"] | Positive = "sqrt"
    scale_at: Literal["local", "shared"] = "local"
    momentum: Fraction = 0.0
    nesterov: bool = True
    outer_lr: Positive = 1.0
    slow: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
    slow_decay: Fraction = 0.99
    slow_by: Literal["fixed", "predicted", "own"] = "fixed"
    slow_owed: bool = False
    deliver: Literal["sent", "whole"] = "sent"
    own: Annotated[float, pydantic.Field(ge=0.0, le=1.0)] = 1.0
    keep: Share = 1.0
    score: Literal["magnitude", "over_row", "second_moment"] = "magnitude"
    score_power: Positive = 1.0
    local_lr: Literal["root"] | Positive = 1.0
    local_lr_from: Literal["start", "pruning"] = "start"
    relay: Annotated[float, pydantic.Field(ge=0.0, le=1.0)] = 0.0
    relay_decay: Fraction = 0.99
    warmup: Literal["update", "gradient"] = "update"
    frozen: bool = False
    second_moment: Literal["own", "mean", "corrected"] = "own"
    momentum_at: Literal["islands", "shared"] = "islands"

    @pydantic.model_validator(mode="after")
    def _measured_needs_equal_places(self) -> Update:
        if self.scale == "measured" and self.pick == "top_k":
            raise ValueError(
                'scale must be a number or "sqrt" with pick "top_k", got "measured": workers send '
                "different elements, so their moves cannot be compared."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_momentum_after_the_exchange(self) -> Update:
        if self.momentum_at == "shared" and self.momentum:
            raise ValueError(
                f'momentum must be 0 with momentum_at "shared", got {self.momentum:g}: the shared '
                "move has AdamW's own first moment already."
            )
        return self


class OneBitAdam(_Method):
    """Tang et al. 2021: signs of the momentum, second moment frozen after warm-up."""

    kind: Literal["onebit_adam"]


class PowerSgd(_Method):
    """Vogels et al. 2019: gradients as products of two thin matrices."""

    kind: Literal["powersgd"]
    rank: Count = 4


Method = Annotated[
    Dense | DenseSlow | Gradient | Update | OneBitAdam | PowerSgd,
    pydantic.Field(discriminator="kind"),
]


class Grid(_Strict):
    """A whole grid file.

    Attributes:
        question: what the grid is to answer, one sentence.
        model: the shape.
        train: hyper-parameters.
        methods: what is compared; dense runs that a comparison needs are added by themselves.
        give_up_pct: a run whose validation loss is so far behind dense's at the half or at three
            quarters is ended; None: never.
    """

    question: str
    model: Model = Model()
    train: Train = Train()
    methods: tuple[Method, ...]
    give_up_pct: Positive | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Grid:
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"methods[].name must be unique, got {twice} twice.")
        for method in self.methods:
            self.train_of(method)
        return self

    def train_of(self, method: _Method) -> Train:
        """Hyper-parameters of one method: the grid's with its own changes."""
        return Train.model_validate({**self.train.model_dump(), **method.train})

    def with_dense(self) -> list[Any]:
        """All methods, dense ones first, with the dense runs that are missing."""
        have = {self.train_of(m).of_dense() for m in self.methods if m.label() == "dense"}
        dense: list[Any] = [m for m in self.methods if m.label() == "dense"]
        for method in self.methods:
            settings = self.train_of(method).of_dense()
            if settings not in have:
                have.add(settings)
                changed = {k: v for k, v in method.train.items() if k != "warmup_steps"}
                changes = " ".join(f"{k}={v:g}" for k, v in sorted(changed.items()))
                name = f"dense {changes}".strip()
                dense.append(Dense(kind="dense", name=name, train=changed))
        return dense + [m for m in self.methods if m.label() != "dense"]


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
