"""`engine.gradprune`: the tie between a DeepSpeed engine and the step loop, for both modes.

What is hooked (deepspeed 0.19.8, runtime/engine.py), all on the instance, all given back by
`detach`:

- forward, through module hooks: the step's clock starts, the model's own loss is noted;
- `backward`: the loss is noted, still on its device;
- `step`, `save_checkpoint`, `load_checkpoint`: what a mode needs there.

`gradient_handle` and `island_handle` say what is exchanged, and when.

Longer than 300 lines: all that both modes hook alike, with a checkpoint's two ways.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.deepspeed import checkpoint, disks, monitor
from ds_gradprune.deepspeed.agree import Facts, check_ranks, check_weights
from ds_gradprune.deepspeed.archives import check_loadable, latest_file
from ds_gradprune.deepspeed.clock import Clock, after_device
from ds_gradprune.deepspeed.facts import tell_changes
from ds_gradprune.deepspeed.hooks import Hooks
from ds_gradprune.deepspeed.idle import module_crc
from ds_gradprune.deepspeed.losses import StepLosses
from ds_gradprune.deepspeed.waits import bounded
from ds_gradprune.errors import CheckpointError
from ds_gradprune.law.schedule import target_at
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.law.times_line import TimesLine
from ds_gradprune.law.verdict import FirstVerdict
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.report import StepReport, Totals
from ds_gradprune.wire.channel import Announcement, Channel
from ds_gradprune.wire.everyone import Everyone


class Handle:
    """The tie of an engine that exchanges something.

    Args:
        engine: the DeepSpeed engine.
        config: the validated block.
        channel: to the peers.
        clock: where time comes from.
        seat: this rank's place, for its checkpoint file.

    Attributes:
        engine: see there.
        config: see there.
        channel: see there.
        clock: see there.
        seat: see there.
        loop: counts, measures, decides.
        losses: of the step under way.
        facts: what this run was started with; compared when it is resumed.
        idle: false.
        asks_stop: set it to tell all ranks, in the next exchange, that the run should end.
        stops: some rank has said so in the last exchange; equal on all ranks.
        lets_in: some rank has seen one that asks to take part; equal on all ranks.
        crew: which ranks are left, where some may be lost; None: none may.
    """

    idle = False
    asks_stop = False
    stops = False
    lets_in = False
    crew: Everyone | None = None

    def __init__(
        self,
        engine: Any,
        config: GradientPruningConfig,
        channel: Channel,
        clock: Clock,
        seat: checkpoint.Seat,
    ) -> None:
        self.engine = engine
        self.config = config
        self.channel = channel
        self.clock = clock
        self.loop = Loop(config, after_device(clock.now_s, engine.device))
        self.losses = StepLosses()
        self.facts: Mapping[str, str] = {}
        self.seat = seat
        self._is_first = seat.is_first
        self._log = monitor.StepLog(config.log_path if self._is_first else None)
        self._decisions = monitor.DecisionLog(config)
        self._verdict = FirstVerdict()
        self._times = TimesLine()
        self.hooks = Hooks(engine)
        self.hooks.keep(engine.register_forward_pre_hook(self._before_forward))
        self.hooks.keep(engine.register_forward_hook(self._after_forward))
        self._replace("backward", "training", self._backward)
        self._replace("step", "training", self._step)
        self._replace("save_checkpoint", "saving a checkpoint", self._save_checkpoint)
        self._replace("load_checkpoint", "loading a checkpoint", self._load_checkpoint)

    @property
    def session(self) -> Loop:
        """The loop, under its former name."""
        return self.loop

    @property
    def held_bytes(self) -> int:
        """Memory that we hold beside DeepSpeed's: residuals, shared weights."""
        raise NotImplementedError

    def residual_norm(self) -> float:
        """2-norm of what this rank has not sent yet; reads all of it. Local."""
        raise NotImplementedError

    @property
    def report(self) -> StepReport | None:
        """The last finished exchange; None before the first."""
        return self.loop.report

    @property
    def totals(self) -> Totals:
        """Sums over the run."""
        return self.loop.totals

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """The model holds what all ranks agree on; with pruned gradients it always does. Local."""
        yield

    def weight_sets(self) -> Iterator[None]:
        """One turn for every set of weights: `for _ in handle.weight_sets(): change them`. Local.

        With pruned gradients there is one set.
        """
        yield

    def parameters_crc(self) -> int:
        """crc32c over the bits of what must be equal on all ranks. Local."""
        return module_crc(self.engine.module)

    def check_alike(self, values: Mapping[str, Any]) -> None:
        """Do all ranks have the same of what a script knows, and an engine does not?

        For example::

            engine.gradprune.check_alike({"seed": seed, "steps": steps, "data": sha256})

        Args:
            values: name to what is compared as text.

        Raises:
            RankMismatchError: names what differs, on which ranks and hosts; on all ranks alike.

        Collective: all ranks.
        """
        given = {f"given {name}": str(value) for name, value in values.items()}
        check_ranks(self.seat.transport, Facts(given))

    def detach(self) -> None:
        """Give DeepSpeed back everything that was hooked; a second call does nothing. Local.

        Raises:
            UnsupportedError: somebody has hooked the engine after us; nothing is given back.
        """
        if self.engine.gradprune is not self:
            return
        self.hooks.check()
        self._before_detach()
        self.hooks.remove()
        self._log.close()
        self.channel.close()
        self._after_detach()
        self.engine.gradprune = None

    # ---- what a mode does ----------------------------------------------------------------------

    def _before_detach(self) -> None:
        """Give back what the mode has hooked."""

    def _after_detach(self) -> None:
        """Close the mode's process groups."""
        raise NotImplementedError

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Shadow `engine.step`."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """What this rank's file holds of the run."""
        raise NotImplementedError

    def _read(self, state: checkpoint.Loaded) -> Callable[[], None]:
        """Check a state, change nothing; returns what puts it into force and cannot fail."""
        raise NotImplementedError

    def _restart(self, *, has_states: bool) -> None:
        """A checkpoint without our state was loaded: the run begins anew from its weights.

        Args:
            has_states: the optimizer's state and the schedule were loaded as well.
        """
        raise NotImplementedError

    # ---- hooks ---------------------------------------------------------------------------------

    def _replace(self, name: str, doing: str, hook: Callable[..., Any]) -> None:
        """Shadow a method of the engine; what DeepSpeed waits for inside has our deadline."""

        def within_limits(*args: Any, **kwargs: Any) -> Any:
            with bounded(doing, self.config.timeout_s):
                return hook(*args, **kwargs)

        self.hooks.replace(name, within_limits)

    def _trains(self) -> bool:
        return bool(self.engine.module.training) and torch.is_grad_enabled()

    def _before_forward(self, _module: Any, _inputs: Any) -> None:
        if self._trains():
            self.loop.begin_step()

    def _after_forward(self, _module: Any, _inputs: Any, output: Any) -> None:
        if self._trains():
            self.losses.forward(output)

    def _backward(
        self,
        original: Callable[..., Any],
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
    ) -> Any:
        engine = self.engine
        self.loop.begin_step()
        self.losses.backward(
            loss,
            is_managed=engine.managed_gradient_accumulation(),
            is_scaled_by_us=scale_wrt_gas,
        )
        result = original(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        if engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt:
            self.losses.close_group()
        return result

    # ---- an exchange ---------------------------------------------------------------------------

    @property
    def k(self) -> int:
        """Kept elements per chunk in the exchange that is next or under way."""
        return kept_per_chunk(self.loop.decision.density)

    def flagged(self, signals: RankSignals) -> RankSignals:
        """What is announced: signals with what this rank asks. Local."""
        return dataclasses.replace(signals, stops=self.asks_stop)

    def announce(self, signals: RankSignals, sizes: Sequence[int] = ()) -> Announcement:
        """Tell all ranks what this one is about to send. Collective.

        Args:
            signals: what this rank, or its island, measured.
            sizes: bytes of the payloads that follow; empty: not compared.
        """
        header = codec.encode_signals(
            step=self.loop.exchange_step,
            rank=self.channel.rank,
            k=self.k,
            signals=self.flagged(signals),
        )
        return self.channel.announce(header, sizes)

    def finish(self, ranks: Sequence[RankSignals], *, wire_bytes: int, dense_bytes: int) -> None:
        """The exchange that was begun is over: decide, compare and write down.

        Args:
            ranks: what all ranks, or islands, said.
            wire_bytes: what this rank, or its island, has sent.
            dense_bytes: what it would have sent without pruning.
        """
        before = self.loop.totals.steps
        report = self.loop.finish_exchange(
            ranks,
            wire_bytes=wire_bytes,
            dense_bytes=dense_bytes,
            senders=self.channel.world_size,
        )
        self.stops = any(rank.stops for rank in ranks)
        self.lets_in = self.lets_in or any(rank.asks for rank in ranks)
        every = self.config.verify_every_steps
        if every is not None and report.step // every > before // every:
            self.loop.note_weights(self.parameters_crc())
        self._log.write(report)
        if self._is_first:
            target = target_at(self.config, report.step)
            owed = self.residual_norm() if self.engine.monitor.enabled else None
            monitor.write_events(self.engine, report, target=target, residual_norm=owed)
            self._decisions.tell(report)
            if (verdict := self._verdict.see(report)) is not None:
                monitor.say_verdict(verdict)
            if (line := self._times.see(report)) is not None:
                monitor.show(line)

    # ---- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(
        self,
        original: Callable[..., Any],
        save_dir: str,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tag = str(tag) if tag is not None else f"global_step{self.engine.global_steps}"
        if not save_dir:
            return original(save_dir, tag, client_state or {}, save_latest, *args, **kwargs)
        seat, rank = self.seat, self.engine.global_rank
        # DeepSpeed's rank 0 names a save before the others' files are whole, and not in one piece.
        names = save_latest and (rank > 0 or not self.engine.checkpoint_engine.is_decoupled())
        given = (save_dir, tag, client_state or {}, save_latest and not names, *args)
        check_weights(seat.transport, seat.shard, self.parameters_crc(), self.loop.step)
        state = self._state() | {"facts": dict(self.facts)}
        checkpoint.save(save_dir, tag, seat, state, self.loop.step)
        first = disks.first_island(os.path.join(save_dir, tag), seat)
        with self._writing(first == seat.island), disks.told(save_dir, tag):
            result = original(*given, **kwargs)
        fault: CheckpointError | None = None
        if first == seat.island and seat.shard == 0:
            try:
                disks.name_latest(save_dir, tag, names=names, marks=rank > 0)
            except CheckpointError as exc:
                fault = exc
        checkpoint.agree_on(fault, seat)
        return result

    @contextmanager
    def _writing(self, writes: bool) -> Iterator[None]:
        """The first rank of an island may have to write DeepSpeed's files; so its disk has them."""
        before = self.engine.save_non_zero_checkpoint
        if self.seat.island:
            self.engine.save_non_zero_checkpoint = writes and self.seat.shard == 0
        try:
            yield
        finally:
            self.engine.save_non_zero_checkpoint = before

    def _load_checkpoint(
        self,
        original: Callable[..., Any],
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        tag = checkpoint.agree_tag(load_dir, tag, self.seat, latest_file(self.engine))
        resumes = load_optimizer_states and not load_module_only and tag is not None
        if tag is not None:
            check_loadable(self.engine, load_dir, str(tag), self.seat.transport, resumes=resumes)
        # Ours is read, checked and agreed on first: what cannot be resumed changes nothing.
        saved = checkpoint.load(load_dir, str(tag), self.seat) if resumes else None
        take, fault = None, None
        if saved is not None:
            try:
                take = self._read(saved)
            except CheckpointError as exc:
                fault = exc
            checkpoint.agree_on(fault, self.seat)
        result = original(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        self.losses.reset()
        if result[0] is None:
            return result
        if take is None:
            self._restart(has_states=resumes and load_lr_scheduler_states)
            self._verdict = FirstVerdict()
        else:
            take()
            self._log.rewind(self.loop.step)
            if self._is_first and saved is not None:
                tell_changes(saved.state.get("facts"), self.facts)
        return result
