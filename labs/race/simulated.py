"""1-bit Adam and 0/1 Adam at work on one rank; their collectives block and are timed."""

from __future__ import annotations

import time

import torch

from labs.race.engine import StepTimes
from labs.race.job import Recipe
from labs.race.methods import Method
from labs.race.onebit import GlooWire
from labs.race.onebit_adam import OneBitAdam, Rules, ZeroOneAdam


class OneBitEngine:
    """1-bit Adam or 0/1 Adam, simulated."""

    def __init__(self, method: Method, model: torch.nn.Module, recipe: Recipe) -> None:
        self.module, self._recipe, self._wire = model, recipe, GlooWire()
        rules = Rules(0.9, recipe.beta2, 1e-8, recipe.weight_decay, recipe.clip_norm)
        self._optimizer: OneBitAdam | ZeroOneAdam
        if method.interval is None:
            self._optimizer = OneBitAdam(model.parameters(), self._wire, rules, recipe.freeze_step)
        else:
            policy = recipe.policy(method.interval)
            self._optimizer = ZeroOneAdam(model.parameters(), self._wire, rules, policy)

    def calibrate(self, tokens: torch.Tensor) -> None:
        """Nothing: every step's times are measured."""

    def step(self, tokens: torch.Tensor, number: int) -> StepTimes:
        """See `Engine`. Collective."""
        codec_s, waited_s = self._optimizer.codec_s, self._wire.waited_s
        sent_bytes = self._wire.sent_bytes
        start_s = time.perf_counter()
        loss = self.module(input_ids=tokens, labels=tokens).loss
        loss.backward()
        kind = self._optimizer.step(self._recipe.lr_at(number))
        self.module.zero_grad()
        wall_s = time.perf_counter() - start_s
        codec_s = self._optimizer.codec_s - codec_s
        comm_s = self._wire.waited_s - waited_s
        return StepTimes(
            loss=float(loss.detach()),
            wall_s=wall_s,
            compute_s=wall_s - codec_s - comm_s,
            codec_s=codec_s,
            comm_s=comm_s,
            payload_bytes=round(self._wire.sent_bytes - sent_bytes),
            kind=kind,
        )
