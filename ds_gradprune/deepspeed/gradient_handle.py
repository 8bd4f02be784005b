"""Gradient mode in DeepSpeed's step loop, where every rank reduces whole gradients in one go.

The ranks of an island sum their gradients first, and agree on what it tells the others.

That is ZeRO stage 0, and stage 1 with bf16 weights whose gradients are summed in fp32
(`BF16_Optimizer`). Beyond what `Handle` hooks:

- `buffered_allreduce_fallback`: all gradients are complete; the ranks announce what they send;
- `allreduce_bucket`: its one all-reduce is marked for our backend; DeepSpeed's averaging and
  data-type casts around it stay in force;
- `step`: after an optimizer step the residuals are committed, and the law decides.

With `overlap` gradients leave before: see `early`.

Longer than 300 lines: a step's reduction, and the checkpoint of what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import google_crc32c
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.deepspeed import backend as backends
from ds_gradprune.deepspeed import checkpoint
from ds_gradprune.deepspeed.clock import Clock
from ds_gradprune.deepspeed.consensus import InsideIsland
from ds_gradprune.deepspeed.early import EarlyBuckets
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.handle import Handle
from ds_gradprune.deepspeed.places import Places, places_of, whole_gradients
from ds_gradprune.deepspeed.poison import refuse_poison
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.buckets import bucket_numel_on
from ds_gradprune.train.gradients import GradientPruning
from ds_gradprune.train.inside import Gradient, Inside
from ds_gradprune.wire.channel import Announcement, Channel
from ds_gradprune.wire.torchdist import TorchDistTransport

UNREDUCED = (
    "step {step} ended without reducing any gradient; was engine.backward called, and outside "
    "engine.no_sync?"
)
OTHER_SIZE = (
    "DeepSpeed reduces more or less than the gradients it was given; this is not the DeepSpeed "
    "that gradient pruning was tested with"
)


class GradientHandle(Handle):
    """`engine.gradprune` of an engine that prunes gradients.

    Args:
        engine: the DeepSpeed engine.
        config: the validated block.
        channel: between the same-index ranks of all islands.
        clock: where time comes from.
        seat: this rank's place, for its checkpoint file.
        groups: the islands; closed with the handle.

    Attributes:
        groups: see there.
        inside: how the ranks of the island agree.
        pruning: the algorithm, with the residuals.
        backend: where DeepSpeed's own reductions are taken out.
    """

    def __init__(
        self,
        engine: Any,
        config: GradientPruningConfig,
        channel: Channel,
        clock: Clock,
        seat: checkpoint.Seat,
        groups: Groups,
    ) -> None:
        super().__init__(engine, config, channel, clock, seat)
        self.groups = groups
        self.inside = InsideIsland(
            None
            if groups.inner_cpu is None
            else TorchDistTransport(groups.inner_cpu, config.timeout_s),
            groups.num_islands,
        )
        self.pruning = GradientPruning(
            channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            bucket_numel=bucket_numel_on(engine.device),
            error_feedback=config.error_feedback,
            inside=self._inner(),
            clip=config.clip_to_median,
        )
        self.backend = backends.install()
        self._places = Places()
        self._names_crc = 0
        self._announcement: Announcement | None = None
        self._signals: RankSignals | None = None
        self._early: EarlyBuckets | None = None
        self._hook()

    @property
    def held_bytes(self) -> int:
        """See `Handle`: 4 bytes for every parameter that was ever pruned, by the island's ranks."""
        return self.pruning.residuals.nbytes

    @property
    def _whose(self) -> str:
        """What messages call one of those that announce."""
        return "rank" if self.groups.inner is None else "island"

    def residual_norm(self) -> float:
        """See `Handle`."""
        return self.pruning.residuals.norm()

    def _hook(self) -> None:
        """Put ourselves where gradients are reduced."""
        self.hooks.replace("buffered_allreduce_fallback", self._reduce_gradients)
        self.hooks.replace("allreduce_bucket", self._reduce_bucket)
        if self.config.overlap and not isinstance(self.engine.optimizer, BF16_Optimizer):
            self._early = EarlyBuckets(self)

    def _inner(self) -> Inside | None:
        """The ranks of the island, which sum buckets where those lie."""
        groups = self.groups
        if groups.inner is None:
            return None
        transport = TorchDistTransport(groups.inner, self.config.timeout_s)

        def together(error: Exception | None) -> None:
            self.inside.outcome(error=error)

        return Inside(transport, self.loop.stopwatch, together)

    def _before_detach(self) -> None:
        backends.uninstall(self.backend)

    def _after_detach(self) -> None:
        self.groups.close(is_mpu=False)

    # ---- the step ------------------------------------------------------------------------------

    def _reduce_gradients(
        self,
        original: Callable[..., Any],
        grads: list[torch.Tensor] | None = None,
        elements_per_buffer: int = 500_000_000,
    ) -> Any:
        stopwatch = self.loop.stopwatch
        with stopwatch.phase("codec"):
            if grads is None:
                grads = whole_gradients(self.engine)
            places = list(places_of(self.engine, self.config.min_numel))
            self._places = Places(places)
            loss, bad = self.losses.so_far(), not all_finite(grads)
            self._announcement = None
            if self._early is not None:
                self._announcement = self._early.finish(loss, nonfinite=bad)
            if self._announcement is None:
                self._note_names([place.gradient.key for place in places])
                self.channel.advance(self.loop.exchange_step)
                self.pruning.begin()
                self._announcement = self._announce(self.loop.signals(loss, nonfinite=bad))
        return original(grads=grads, elements_per_buffer=elements_per_buffer)

    def _reduce_bucket(
        self,
        original: Callable[..., Any],
        bucket: list[torch.Tensor],
        dp_group: Any,
        dp_world_size: int | None = None,
    ) -> Any:
        gradients = self._places.owners(bucket)
        if self._early is not None and self._early.loads(gradients) is None:
            self._early.note(gradients, lambda part: original(part, dp_group, dp_world_size))
        with self.backend.gradient_bucket(lambda flat: self._reduce(flat, gradients)):
            return original(bucket, dp_group, dp_world_size)

    def _reduce(self, vector: torch.Tensor, gradients: Sequence[Gradient]) -> None:
        """Replace one bucket by its sum over the ranks."""
        assert self._announcement is not None
        if sum(gradient.numel for gradient in gradients) != vector.numel():
            raise UnsupportedError(OTHER_SIZE)
        scale = self.loss_scale()
        with self.loop.stopwatch.phase("codec"):
            if self.loop.decision.density == 1.0:
                with self.inside.together():
                    bad = any(signals.nonfinite for signals in self._agreed())
                self.pruning.reduce_dense(vector, gradients, nonfinite=bad, scale=scale)
                return
            loads = None if self._early is None else self._early.loads(gradients)
            if loads is not None:
                self._agreed()
                self.pruning.land(vector, gradients, loads, scale)
                return
            assert self._signals is not None
            self.pruning.reduce(
                vector,
                gradients,
                self.k,
                step=self.loop.exchange_step,
                signals=self._signals,
                scale=scale,
                agreed=self._agreed,
            )

    def loss_scale(self) -> float:
        """By how much the gradients are too large. Local."""
        engine = self.engine
        scale = engine._get_optimizer_loss_scale() if engine.fp16_enabled() else None
        return 1.0 if scale is None else float(scale)

    def _announce(self, mine: RankSignals) -> Announcement:
        """Tell all islands what this one measured and is about to send. Collective: all ranks."""
        self._signals, _ = self.inside.agree(mine, 0, island=self.groups.island)
        return self.announce(self._signals)

    def _agreed(self) -> list[RankSignals]:
        """What all islands have announced; raises where they disagree."""
        assert self._announcement is not None
        with self.loop.stopwatch.phase("wire"):
            ranks = [header.signals for header in self._announcement.headers()]
        refuse_poison(self.engine, ranks, self.loop.exchange_step, self._whose)
        return ranks

    def _note_names(self, names: list[str]) -> None:
        """Ranks that train different parameters are found before their payloads travel."""
        crc = int(google_crc32c.value(repr(names).encode()))
        if crc != self._names_crc:
            self._names_crc = crc
            self.loop.note_weights(crc)

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._backward(*args, **kwargs)
        except BaseException:
            self._interrupt()
            raise

    def _interrupt(self) -> None:
        """A backward has failed; what was on its way in it is lost. Local."""
        if self._early is not None:
            self._early.interrupt()

    def _abort(self) -> None:
        """The step under way failed: nothing of it counts. Local."""
        if self._early is not None:
            self._early.give_up()
        self.pruning.abort()

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self.engine.global_steps
        try:
            result = original(*args, **kwargs)
        except BaseException:
            self._abort()
            raise
        if self.engine.global_steps == before:
            return result
        if self._announcement is None:
            raise UnsupportedError(UNREDUCED.format(step=self.loop.exchange_step))
        self.pruning.commit(applied=bool(self.engine._step_applied))
        ranks, self._announcement = self._ranks(), None
        if self._early is not None:
            self._early.settle()
        self.losses.reset()
        self.loop.begin_exchange()
        _, wire_bytes = self.inside.outcome(wire_bytes=self.channel.take_wire_bytes())
        self.finish(
            ranks,
            wire_bytes=wire_bytes,
            dense_bytes=self.pruning.take_dense_bytes(),
        )
        self.loop.end_step()
        return result

    def _ranks(self) -> list[RankSignals]:
        """What all islands have said of the step that has ended."""
        return self._agreed()

    # ---- checkpoints ---------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "loop": self.loop.state_dict(),
            "residuals": self.pruning.residuals.state_dict(),
            "channel": self.channel.state_dict(),
            "names_crc": self._names_crc,
        }

    def _read(self, state: checkpoint.Loaded) -> Callable[[], None]:
        mine = state.state
        loop = self.loop.read(mine["loop"])
        residuals = self.pruning.residuals.read(mine["residuals"])
        channel = {} if state.is_resized else mine["channel"]
        self.channel.check_state(channel)

        def take() -> None:
            self._forget()
            self.loop.take(loop)
            self._names_crc = int(mine["names_crc"])
            self.channel.load_state_dict(channel)
            # With another number of islands there is no telling whose residual is whose.
            self.pruning.residuals.take({} if state.is_resized else residuals)
            if not state.is_resized:
                checkpoint.set_random_state(state.random)

        return take

    def _restart(self, *, has_states: bool) -> None:
        self._forget()
        self.loop.restart()
        self.pruning.residuals.take({})
        self.channel.load_state_dict({})

    def _forget(self) -> None:
        self._abort()
        self._announcement = None


def all_finite(grads: list[torch.Tensor]) -> bool:
    """One read of the gradients, no copy: the largest magnitude is finite iff all are."""
    if not grads:
        return True
    return math.isfinite(float(torch.nn.utils.get_total_norm(grads, norm_type=math.inf)))
