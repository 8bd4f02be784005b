"""What one rank is told at its start: plain data, passed on its command line as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from labs.race.methods import Method
from textgen.model import SIZES

FREEZE_SHARE = 0.15
"""Of the run, 1-bit Adam is dense: "15-25 %" in DeepSpeed's tutorial; 23,000 of 152,000 steps for
the paper's BERT-Large."""

VAR_FREEZE_SHARE = 12_500 / 152_000
LOCAL_STEP_SHARE = 32_678 / 152_000
"""0/1 Adam's steps for BERT-Large (its paper, section 6; the second is DeepSpeed's default), as
shares of that run."""

SMOLLM2_SEQ_LEN = 128
"""Of the real model, whose own 8,192 tokens a CPU does not train."""

VAR_UPDATE_SCALER = 16
"""DeepSpeed's default, which counts updates and is no share of a run."""


@dataclass(frozen=True, slots=True)
class Policy:
    """When 0/1 Adam does what; names and meaning as in DeepSpeed.

    Attributes:
        var_freeze_step: last step that may update the second moment.
        var_update_scaler: after so many updates of it, the interval between them doubles.
        local_step_scaler: after so many later steps, the interval between exchanges doubles.
        local_step_clipper: it does not grow beyond this.
    """

    var_freeze_step: int
    var_update_scaler: int
    local_step_scaler: int
    local_step_clipper: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train; the same for all methods.

    Attributes:
        model: size name of textgen, or smollm2.
        micro_batch: sequences per rank and step.
        lr: learning rate after its warm-up.
        beta2: of AdamW.
        weight_decay: of AdamW.
        clip_norm: gradients are clipped to this norm.
        lr_warmup_steps: linear rise of the learning rate; constant afterwards.
        dense_steps: methods that begin dense do so for this many steps, or longer: see
            `opening_steps`.
        steps: of the run that the validation loss is reported for; scales ours' ramp and window,
            and the schedules of 1-bit and 0/1 Adam.
        zero_stage: of DeepSpeed.
        budget_s: step time budget of ours; None: its default.
        eval_sequences: of a validation, over all ranks; None: textgen's own number.
        ranks_per_host: so many ranks form an island.
        block: more keys of gradient_pruning for ours and islands, as JSON; None: none.
        zero: more keys of zero_optimization, as JSON; None: none.
        times_waits: each of DeepSpeed's own collectives is waited for, so that its time is known.
    """

    model: str
    micro_batch: int
    lr: float
    beta2: float
    weight_decay: float
    clip_norm: float
    lr_warmup_steps: int
    dense_steps: int
    steps: int
    zero_stage: int
    budget_s: float | None
    eval_sequences: int | None
    ranks_per_host: int = 1
    block: str | None = None
    zero: str | None = None
    times_waits: bool = True

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""
        return int(SIZES[self.model]["n_positions"]) if self.model in SIZES else SMOLLM2_SEQ_LEN

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        return self.lr * min(1.0, step / max(1, self.lr_warmup_steps))

    def opening_steps(self, method: Method) -> int:
        """How many steps of a method come before those that its figures are about."""
        if method.name == "onebit_adam":
            return self.freeze_step
        if method.interval is not None:
            return self.policy(method.interval).var_freeze_step
        return self.dense_steps if method.begins_dense else 0

    def timing_steps(self, method: Method, asked: int) -> int:
        """How many steps give a method's times: with two exchanges at least, however rare."""
        return asked if method.interval is None else max(asked, 2 * method.interval)

    @property
    def freeze_step(self) -> int:
        """The last dense step of 1-bit Adam."""
        return max(self.dense_steps, round(FREEZE_SHARE * self.steps))

    def policy(self, interval: int) -> Policy:
        """The schedule of 0/1 Adam with at most `interval` steps from one exchange to the next.

        Its second moment is frozen when the learning rate has risen, as its authors advise. Their
        exchanges grow rarer only as the learning rate falls, which it does not do here: so 1 is
        their rule. A larger one (16 is DeepSpeed's default) begins at 1 and is doubled after the
        share of the run after which their learning rate had halved; see LOG.md for what it costs.
        """
        return Policy(
            var_freeze_step=max(self.dense_steps, round(VAR_FREEZE_SHARE * self.steps)),
            var_update_scaler=VAR_UPDATE_SCALER,
            local_step_scaler=max(1, round(LOCAL_STEP_SHARE * self.steps)),
            local_step_clipper=interval,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One rank's place and task.

    Attributes:
        method: name.
        recipe: how to train.
        data: folder of the tokens.
        store: file through which the ranks find each other.
        seed: of weights and order of the data.
        rank: of this process.
        world_size: number of processes.
    """

    method: str
    recipe: Recipe
    data: str
    store: str
    seed: int
    rank: int
    world_size: int

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        data = json.loads(text)
        return cls(**(data | {"recipe": Recipe(**data["recipe"])}))
