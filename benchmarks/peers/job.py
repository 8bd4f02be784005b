"""What one rank is told at its start: plain data, passed on its command line as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train; the same for all methods.

    Attributes:
        model: size name of textgen.
        micro_batch: sequences per rank and step.
        lr: learning rate after its warm-up.
        beta2: of AdamW.
        weight_decay: of AdamW.
        clip_norm: gradients are clipped to this norm.
        lr_warmup_steps: linear rise of the learning rate; constant afterwards.
        dense_steps: methods that begin dense do so for this many steps.
        steps: of the run that the validation loss is reported for; scales ours' ramp and window.
        zero_stage: of DeepSpeed.
        budget_s: step time budget of ours; None: its default.
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

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        return self.lr * min(1.0, step / max(1, self.lr_warmup_steps))


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
