"""The tie between an engine and a session: pruned gradients in DeepSpeed's step loop, ZeRO stage 0.

What is hooked (deepspeed 0.19.8, runtime/engine.py), all on the instance, all given back by
`detach`:

- forward, through a module hook: the step's clock starts;
- `backward`: the loss is noted, still on its device;
- `buffered_allreduce_fallback`: all gradients are complete; their finiteness is known before the
  first bucket travels;
- `allreduce_bucket`: its one all-reduce is marked for our backend; DeepSpeed's averaging and
  data-type casts around it stay in force;
- `step`: after an optimizer step the controller decides for the next one;
- `save_checkpoint`, `load_checkpoint`: each rank's state travels along.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import google_crc32c
import torch
import torch.distributed as dist

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.integration import backend as backends
from ds_gradprune.integration import checkpoint, monitor
from ds_gradprune.records import StepReport, Totals
from ds_gradprune.session import PruningSession
from ds_gradprune.transport.base import Transport
from ds_gradprune.transport.mpi import MpiTransport
from ds_gradprune.transport.throttle import RatePoint, ThrottledTransport
from ds_gradprune.transport.torchdist import TorchDistTransport

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from; tests put a virtual one in.

    Attributes:
        now_s: seconds, monotonic.
        sleep: waits so many seconds (only emulated links do).
    """

    now_s: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep


class Handle:
    """The tie between a DeepSpeed engine and a pruning session; `engine.gradprune`.

    Attributes:
        engine: the DeepSpeed engine.
        config: the validated block.
        idle: nothing is pruned: the block is disabled, or there is only one rank.
    """

    def __init__(self, engine: Any, config: GradientPruningConfig, clock: Clock) -> None:
        self.engine = engine
        self.config = config
        self._group = self.group_of(engine) if config.enabled else None
        self._world_size = dist.get_world_size(self._group) if config.enabled else 1
        self.idle = self._world_size == 1
        self._session: PruningSession | None = None
        self._replaced: dict[str, tuple[Any, Any]] = {}
        self._loss: torch.Tensor | None = None
        if not self.idle:
            self._hook(clock)

    @staticmethod
    def group_of(engine: Any) -> Any:
        """The process group over which this engine's training is pruned. Local."""
        return engine.seq_data_parallel_group

    @property
    def report(self) -> StepReport | None:
        """The last finished step; None before the first and while idle."""
        return None if self._session is None else self._session.report

    @property
    def totals(self) -> Totals:
        """Sums over the run; zeros while idle."""
        return Totals() if self._session is None else self._session.totals

    @property
    def session(self) -> PruningSession:
        """The session, for tests and tools.

        Raises:
            UnsupportedError: idle, so there is none.
        """
        if self._session is None:
            raise UnsupportedError("gradient pruning is idle here: there is no session")
        return self._session

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """The model holds what all ranks agree on; with pruned gradients it always does. Local."""
        yield

    def parameters_crc(self) -> int:
        """crc32c over the bits of all parameters of this rank, in module order. Local."""
        crc = 0
        for parameter in self.engine.module.parameters():
            flat = parameter.detach().reshape(-1).contiguous().cpu()
            if flat.numel():
                crc = google_crc32c.extend(crc, flat.view(torch.uint8).numpy())
        return int(crc)

    def detach(self) -> None:
        """Give DeepSpeed back everything that was hooked; a second call does nothing. Local."""
        if self._session is None:
            self.engine.gradprune = None
            return
        for name, (ours, before) in self._replaced.items():
            if self.engine.__dict__.get(name) is not ours:
                raise UnsupportedError(
                    f"engine.{name} was replaced after attach; undo that first, then detach"
                )
            if before is None:
                del self.engine.__dict__[name]
            else:
                self.engine.__dict__[name] = before
        self._replaced = {}
        self._forward_hook.remove()
        backends.uninstall(self._backend)
        self._log.close()
        self._session.close()
        self._session = None
        self.engine.gradprune = None

    # ---- hooks ---------------------------------------------------------------------------------

    def _hook(self, clock: Clock) -> None:
        transport = _open_transport(self.config, self._group, clock)
        self._session = self._open_session(transport, clock)
        self._log = monitor.StepLog(self.config.log_path if transport.rank == 0 else None)
        self._rank = transport.rank
        self._backend = backends.install()
        self._forward_hook = self.engine.register_forward_pre_hook(self._on_forward)
        self._replace("backward", self._backward)
        self._replace("buffered_allreduce_fallback", self._reduce_gradients)
        self._replace("allreduce_bucket", self._reduce_bucket)
        self._replace("step", self._step)
        self._replace("save_checkpoint", self._save_checkpoint)
        self._replace("load_checkpoint", self._load_checkpoint)

    def _open_session(self, transport: Transport, clock: Clock) -> PruningSession:
        return PruningSession(self.config, transport, clock.now_s)

    def _replace(self, name: str, hook: Callable[..., Any]) -> None:
        """Shadow a method on the instance; `hook` gets the original first."""
        original = getattr(self.engine, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        self._replaced[name] = (replacement, self.engine.__dict__.get(name))
        self.engine.__dict__[name] = replacement

    def _on_forward(self, _module: Any, _inputs: Any) -> None:
        if self.engine.module.training and torch.is_grad_enabled():
            self.session.begin_step()

    def _backward(
        self,
        original: Callable[..., Any],
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
    ) -> Any:
        parts = self.engine.gradient_accumulation_steps() if scale_wrt_gas else 1
        part = loss.detach().float() / parts
        self._loss = part if self._loss is None else self._loss + part
        return original(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    def _reduce_gradients(
        self,
        original: Callable[..., Any],
        grads: list[torch.Tensor] | None = None,
        elements_per_buffer: int = 500_000_000,
    ) -> Any:
        if grads is None:
            grads, _ = self.engine._get_gradients_for_reduction()
        loss = None if self._loss is None else float(self._loss)
        self._loss = None
        self.session.begin_reduction(loss, not _all_finite(grads), _loss_scale(self.engine))
        result = original(grads=grads, elements_per_buffer=elements_per_buffer)
        self.session.end_reduction()
        return result

    def _reduce_bucket(
        self,
        original: Callable[..., Any],
        bucket: list[torch.Tensor],
        dp_group: Any,
        dp_world_size: int | None = None,
    ) -> Any:
        shapes = [tensor.shape for tensor in bucket]
        with self._backend.gradient_bucket(lambda flat: self.session.reduce_bucket(flat, shapes)):
            return original(bucket, dp_group, dp_world_size)

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self.engine.global_steps
        result = original(*args, **kwargs)
        if self.engine.global_steps != before:
            self._end_step()
        return result

    def _end_step(self, steps: int = 1) -> None:
        """Decide and write down; `steps` have been made since the last decision."""
        report = self.session.end_step()
        every = self.config.verify_every_steps
        if every is not None and report.step // every > (report.step - steps) // every:
            self.session.note_parameters(self.parameters_crc())
        self._log.write(report)
        if self._rank == 0:
            monitor.write_events(self.engine, report)
            monitor.log_decision(report)

    # ---- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(
        self,
        original: Callable[..., Any],
        save_dir: str,
        tag: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tag = str(tag) if tag is not None else f"global_step{self.engine.global_steps}"
        if save_dir:
            path = checkpoint.state_path(save_dir, tag, self._rank, self._world_size)
            checkpoint.save(path, self._state())
        return original(save_dir, tag, *args, **kwargs)

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
        if tag is None:
            tag = checkpoint.latest_tag(load_dir)
        resumes = load_optimizer_states and not load_module_only and tag is not None
        # Ours is read and agreed on first: a checkpoint that cannot be resumed changes nothing.
        state = (
            checkpoint.load(load_dir, str(tag), self._rank, self._world_size, self._group)
            if resumes
            else None
        )
        if state is not None:
            self.session.check_state(state["pruning"])
        result = original(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        self._loss = None
        if result[0] is not None:
            self._take_over(state)
        return result

    def _state(self) -> dict[str, Any]:
        """What this rank's file holds of the run."""
        return self.session.state_dict()

    def _take_over(self, state: dict[str, Any] | None) -> None:
        """DeepSpeed has loaded a checkpoint; `state` is our file beside it, None: there is none."""
        if state is not None:
            self.session.load_state_dict(state["pruning"])
            self._log.rewind(self.session.step)
            checkpoint.set_random_state(state["random"])


def _open_transport(config: GradientPruningConfig, group: Any, clock: Clock) -> Transport:
    transport: Transport = TorchDistTransport(group, config.timeout_s)
    if config.transport == "mpi":
        transport = MpiTransport(transport, config.timeout_s)
    if config.throttle is None:
        return transport
    schedule = [
        RatePoint(point.step, point.rate_mbit * 1e6 / 8, point.latency_s, point.outage_s)
        for point in config.throttle.schedule
    ]
    return ThrottledTransport(transport, schedule, config.timeout_s, clock.sleep)


def _all_finite(grads: list[torch.Tensor]) -> bool:
    """One read of the gradients, no copy: the largest magnitude is finite iff all are."""
    if not grads:
        return True
    return math.isfinite(float(torch.nn.utils.get_total_norm(grads, norm_type=math.inf)))


def _loss_scale(engine: Any) -> float:
    scale = engine._get_optimizer_loss_scale() if engine.fp16_enabled() else None
    return 1.0 if scale is None else float(scale)
