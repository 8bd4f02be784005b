"""Update mode in DeepSpeed's step loop: every island steps alone, and rounds end in an exchange.

Beyond what `Handle` hooks:

- `buffered_allreduce_fallback`, `allreduce_bucket` (stage 0): dense in the warm-up, inside the
  island after it;
- `step`: after an optimizer step the islands exchange what their fp32 weights have gained;
- the model's forward and `state_dict`, at stage 3 `_zero3_consolidated_16bit_state_dict`: which
  weights it holds (`island_weights`).

An island's checkpoint holds, beside DeepSpeed's files with the shared weights (island 0 writes
them), its own weights, its optimizer's state, its schedule and its buffers.

Longer than 300 lines: all that is hooked in this mode, with a checkpoint's two ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.deepspeed import checkpoint, newcomers
from ds_gradprune.deepspeed.clock import Clock
from ds_gradprune.deepspeed.consensus import InsideIsland
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.handle import Handle
from ds_gradprune.deepspeed.island_state import IslandState
from ds_gradprune.deepspeed.island_weights import IslandWeights
from ds_gradprune.deepspeed.monitor import StepLog
from ds_gradprune.deepspeed.rounds import Rounds
from ds_gradprune.deepspeed.survivors import Roll, Survivors
from ds_gradprune.deepspeed.waits import bounded, told
from ds_gradprune.deepspeed.warmup import Warmup
from ds_gradprune.errors import TransportError, UnsupportedError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.piece import Shards
from ds_gradprune.train.scale import sparse_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.channel import Channel
from ds_gradprune.wire.torchdist import TorchDistTransport
from ds_gradprune.wire.transport import Transport

_DIVIDED = 3
"""The ZeRO stage that divides the model's own weights."""


class IslandHandle(Handle):
    """`engine.gradprune` of an engine that prunes updates.

    Args:
        engine: the DeepSpeed engine, made with `groups` as its mpu.
        config: the validated block.
        channel: between the same-index ranks of all islands.
        clock: where time comes from.
        seat: this rank's place, for its checkpoint file.
        groups: the islands.
        shards: the fp32 weights of this rank; equal on all islands.
        survivors: behind `channel` and `seat`, where islands may be lost; None: none may.

    Attributes:
        groups: see there.
        shards: see there.
        islands: the algorithm, with own and shared weights.
        inside: how the ranks of the island agree.
        rounds: begins and lands exchanges.
        weights: which weights the model holds.
        state_of: what a checkpoint holds of the island.
        tells: what a script tells an island that comes back: plain values, and tensors.
    """

    tells: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(
        self,
        engine: Any,
        config: GradientPruningConfig,
        channel: Channel,
        clock: Clock,
        seat: checkpoint.Seat,
        groups: Groups,
        shards: Shards,
        survivors: Survivors | None = None,
    ) -> None:
        super().__init__(engine, config, channel, clock, seat)
        self.crew = None if survivors is None else survivors.everyone
        self._roll = None if self.crew is None else Roll(self.crew, config.min_islands or 1)
        self.groups = groups
        self.shards = shards
        shared = SharedWeights(shards, on_cpu=_lies_on_cpu(config.shared_device, shards))
        self.islands = Islands(
            shared,
            channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            unpruned_bits=config.unpruned_bits,
            scale=update_scale(groups.num_islands, config.update_scale),
            scale_of=lambda islands: update_scale(islands, config.update_scale),
            sparse_scale=sparse_scale(config.update_scale, config.residual_form),
            rule=make_rule(config.slow_momentum, config.sync_every),
            kept=KeptResidual(config.residual_decay) if config.residual_form == "reset" else None,
            clip=config.clip_to_median,
        )
        inner: Transport | None = None
        if survivors is not None:
            inner = survivors.inside
        elif groups.inner_cpu is not None:
            inner = TorchDistTransport(groups.inner_cpu, config.timeout_s)
        self.inside = InsideIsland(inner, groups.num_islands)
        self.rounds = Rounds(self)
        self.weights = IslandWeights(engine, self.islands, shards, self.inside, self.rounds.land)
        if self.crew is not None:
            self.crew.before = self.weights.land
        self._warmup = Warmup(self)
        if int(engine.zero_optimization_stage()) == _DIVIDED:
            self.hooks.replace("_zero3_consolidated_16bit_state_dict", self._consolidate)
        self._begun_step = -1
        self.state_of = IslandState(engine, self.islands, shards)

    @property
    def held_bytes(self) -> int:
        """See `Handle`: 4 bytes per parameter; 4 more with an outer momentum or a kept residual."""
        islands = self.islands
        kept = 0 if islands.kept is None else islands.kept.nbytes
        return islands.weights.nbytes + islands.rule.nbytes + kept

    def residual_norm(self) -> float:
        """See `Handle`."""
        islands = self.islands
        if islands.kept is not None:
            return islands.kept.norm()
        return islands.weights.residual_norm() if islands.have_parted else 0.0

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """The model holds the weights that all islands agree on. Training must wait.

        Collective: all ranks of the island.
        """
        with self.weights.shared():
            yield

    def weight_sets(self) -> Iterator[None]:
        """One turn with the own weights in the model, one with the shared ones.

        For changes that are no plain assignment, a clamp for example, which all ranks make::

            for _ in engine.gradprune.weight_sets():
                weight.clamp_(-0.1, 0.1)

        Collective: all ranks of the island.
        """
        return self.weights.each()

    def parameters_crc(self) -> int:
        """crc32c over what must be equal on the same-index ranks of all islands. Local."""
        if self.islands.have_parted:
            return self.islands.weights.crc()
        if not int(self.engine.zero_optimization_stage()):
            return super().parameters_crc()
        return self.islands.weights.own_crc()

    def finish(self, ranks: Sequence[RankSignals], *, wire_bytes: int, dense_bytes: int) -> None:
        """See `Handle`; another one may have to write down from now on."""
        if self._roll is not None:
            was, self._is_first = self._is_first, self._roll.is_first(self.loop.last_exchange)
            if was != self._is_first:
                self._log.close()
                self._log = StepLog(self.config.log_path if self._is_first else None)
        super().finish(ranks, wire_bytes=wire_bytes, dense_bytes=dense_bytes)

    def asking(self, signals: RankSignals) -> RankSignals:
        """Signals with what this rank asks, or sees another one ask: the island agrees on them."""
        asks = self.crew is not None and self.crew.sees_one_ask
        return dataclasses.replace(signals, stops=self.asks_stop, asks=asks)

    def flagged(self, signals: RankSignals) -> RankSignals:
        """See `Handle`; they are the island's already."""
        return signals

    def _replace(self, name: str, doing: str, hook: Callable[..., Any]) -> None:
        """See `Handle`; where this island has lost a rank, nobody need wait for the others."""

        def told_to_all(*args: Any, **kwargs: Any) -> Any:
            try:
                with told(doing, self.config.timeout_s):
                    return hook(*args, **kwargs)
            except TransportError:
                if self.crew is not None:
                    self.crew.give_up()
                raise

        super()._replace(name, doing, told_to_all)

    def tell_beginning(self) -> None:
        """The link was tried, and the warm-up is unpruned from its first step on. Local."""
        if self._is_first:
            self._decisions.begin(self.loop.decision)

    def _before_detach(self) -> None:
        self.weights.leave_shared()
        if self.crew is not None:
            self.crew.leave()
        self._warmup.close()
        self.shards.close()

    def _after_detach(self) -> None:
        self.groups.close(is_mpu=True)

    # ---- islands that come back ----------------------------------------------------------------

    @property
    def is_newcomer(self) -> bool:
        """This process comes in the place of a lost island; `join` is the next thing to do."""
        return self.crew is not None and self.crew.place < 0

    def join(self) -> Any:
        """Take part in a run that goes on, from its next step on: `engine.global_steps` says which.

        Returns:
            What the script of the others tells, see `tells`.

        Raises:
            CheckpointError, TransportError, TransportTimeout: it cannot.
            UnsupportedError: this rank began with the others.

        Collective: all islands; the others do so in the forward of that step.
        """
        if not self.is_newcomer:
            raise UnsupportedError(
                "engine.gradprune.join() is for a rank that comes back, which "
                "engine.gradprune.is_newcomer tells. Leave it out where that is false."
            )
        with bounded("joining the other islands", self.config.timeout_s):
            return newcomers.join(self)

    def _before_forward(self, module: Any, inputs: Any) -> None:
        if self._trains() and self._begun_step != self.loop.step:  # its first micro-step
            self._begun_step = self.loop.step
            if self.lets_in:
                newcomers.let_in(self)
        super()._before_forward(module, inputs)

    # ---- the step ------------------------------------------------------------------------------

    @property
    def is_warmup(self) -> bool:
        """The step under way belongs to a dense warm-up.

        Never again once the islands have parted, whatever the configuration says: their own weights
        differ, and averaged gradients would not bring them together.
        """
        return (
            not self.loop.decision.unpruned
            and not self.islands.have_parted
            and self.loop.step < self.config.warmup_steps
        )

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.weights.hold_own()
        if not int(self.engine.zero_optimization_stage()):
            return super()._backward(original, *args, **kwargs)
        with self.groups.in_force():
            return super()._backward(original, *args, **kwargs)

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._warmup.before_step()
        if self.is_warmup:
            return self._warmup.step(original, *args, **kwargs)
        self.weights.hold_own()
        if not self.islands.have_parted:
            self.islands.weights.capture()
            self.islands.have_parted = True
        self.weights.notice_writes()
        before = self.engine.global_steps
        rates = self.engine.get_lr()
        with self.groups.in_force():
            result = original(*args, **kwargs)
        if self.engine.global_steps != before:
            self.losses.end_step()
            self.channel.advance(self.loop.exchange_step)
            self.rounds.end_step(rates)
        self.weights.note()
        return result

    # ---- checkpoints ---------------------------------------------------------------------------

    def _consolidate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `save_16bit_model` and Accelerate save at ZeRO stage 3, which asks no state_dict."""
        with self.weights.shared():
            state = original(*args, **kwargs)
            # On CPUs DeepSpeed's result may share the shard's memory, which leaving overwrites.
            return state and {name: value.clone() for name, value in state.items()}

    def _save_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.weights.land()
        with self.weights.shared():
            if self._roll is None:
                return super()._save_checkpoint(original, *args, **kwargs)

            def save(seat: checkpoint.Seat) -> Any:
                self.seat = seat
                return super(IslandHandle, self)._save_checkpoint(original, *args, **kwargs)

            return self._roll.save(self.seat, save)

    @contextmanager
    def _writing(self, writes: bool) -> Iterator[None]:
        with self.groups.writing(self.engine, writes), self._warmup.alone():
            yield

    def _load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.weights.hold_own()
        self.weights.land()

        def load(*args: Any, **kwargs: Any) -> Any:
            self.weights.give_up_own()  # what the checkpoint leaves out stays as it is shared
            return original(*args, **kwargs)

        with self.groups.reading(self.engine), self._warmup.alone():
            result = super()._load_checkpoint(load, *args, **kwargs)
        self.weights.note()
        return result

    def _state(self) -> dict[str, Any]:
        return {
            "loop": self.loop.state_dict(),
            "losses": self.losses.state_dict(),
            "rounds": self.rounds.state_dict(),
            "channel": self.channel.state_dict(),
            "island": self.state_of.save(),
        }

    def _read(self, state: checkpoint.Loaded) -> Callable[[], None]:
        loop = self.loop.read(state.state["loop"])
        channel = {} if state.is_resized else state.state["channel"]
        self.channel.check_state(channel)
        before = state.num_islands
        restore = self.state_of.read(
            state.state["island"],
            handed=state.handed,
            factor=update_scale(before, self.config.update_scale) / before,
        )

        def take() -> None:
            self.losses.load_state_dict([] if state.is_resized else state.state["losses"])
            self.loop.take(loop)
            self.channel.load_state_dict(channel)
            self.rounds.load_state_dict(state.state["rounds"])
            restore()
            if not state.is_resized:
                checkpoint.set_random_state(state.random)

        return take

    def _restart(self, *, has_states: bool) -> None:
        is_undivided = not int(self.engine.zero_optimization_stage())
        if not has_states and is_undivided and self.shards.has_masters:
            # At stage 0 DeepSpeed loads the model's copies only, and the next step undoes that.
            self.engine.optimizer.refresh_fp32_params()
        self.loop.restart()
        self.channel.load_state_dict({})
        self.state_of.restart(has_states=has_states)


def _lies_on_cpu(setting: str, shards: Shards) -> bool:
    """Whether the shared weights lie in the host's memory, whatever the weights' device."""
    if setting != "auto":
        return setting == "cpu"
    pieces = [piece.own for piece in shards.every_piece() if piece.own.is_cuda]
    if not pieces:
        return False
    free_bytes, _ = torch.cuda.mem_get_info(pieces[0].device)
    # Activations want room, too: the copy may take a quarter of what is free.
    return 4 * sum(own.numel() for own in pieces) > free_bytes // 4
