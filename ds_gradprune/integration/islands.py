"""Pruned updates: every rank is an island that steps alone (ZeRO stage 0, fp32 and bf16).

Beyond what `Handle` hooks, and again all given back by `detach`:

- `buffered_allreduce_fallback`: dense in the warm-up, nothing after it;
- `step`: after an optimizer step the islands exchange what their fp32 weights have gained;
- the model's forward and `state_dict`: which weights it holds. A forward in evaluation mode without
  gradients, and `state_dict`, see the shared weights; every other forward the island's own.

An island's checkpoint holds, beside DeepSpeed's files with the shared weights (island 0 writes
them), its own weights, its optimizer's state, its schedule and its buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import CheckpointError, UnsupportedError
from ds_gradprune.integration.handle import Clock, Handle
from ds_gradprune.integration.masters import Masters
from ds_gradprune.integration.mpu import IslandGroups
from ds_gradprune.islands import IslandSession
from ds_gradprune.shared import SharedWeights
from ds_gradprune.transport.base import Transport


class IslandHandle(Handle):
    """`engine.gradprune` of an engine that prunes updates."""

    _is_shared = False
    """The model holds the shared weights, and `session.weights` the own ones."""
    _held = 0
    """How many `shared_weights` contexts are open."""

    @staticmethod
    def group_of(engine: Any) -> Any:
        """All islands.

        Raises:
            UnsupportedError: the engine's ranks are not islands.
        """
        if isinstance(engine.mpu, IslandGroups):
            return engine.mpu.everyone
        if dist.get_world_size() == 1:
            return engine.seq_data_parallel_group
        raise UnsupportedError(
            'gradient_pruning.prune = "update", the default, needs an engine in which every rank '
            "is a data-parallel group of its own, and this one was made without. Make it with "
            "ds_gradprune.initialize, or call ds_gradprune.register() before "
            'deepspeed.initialize, or set prune to "gradient".'
        )

    @property
    def session(self) -> IslandSession:
        """The session, for tests and tools.

        Raises:
            UnsupportedError: idle, so there is none.
        """
        session = super().session
        assert isinstance(session, IslandSession)
        return session

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """The model holds the weights that all islands agree on. Training must wait. Local."""
        self._hold_shared(True)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._hold_shared(False)

    def parameters_crc(self) -> int:
        """crc32c over what must be equal on all islands. Local."""
        return super().parameters_crc() if self._agrees else self.session.weights.crc()

    def detach(self) -> None:
        """Give everything back; the model keeps the shared weights, unsent progress ends. Local."""
        if self._session is not None:
            self._hold_shared(True)
            for hook in self._module_hooks:
                hook.remove()
        super().detach()

    # ---- hooks ---------------------------------------------------------------------------------

    def _hook(self, clock: Clock) -> None:
        self._masters = Masters(self.engine)
        self._equalize()
        super()._hook(clock)
        ours = self.engine.module

        # Plain functions that look at their module: a deep copy of the model takes them along.
        def before_forward(module: torch.nn.Module, _inputs: Any) -> None:
            if module is ours:
                self._choose_weights()

        def before_state_dict(module: torch.nn.Module, *_: Any) -> None:
            if module is ours:
                self._hold_shared(True)

        self._module_hooks = [
            ours.register_forward_pre_hook(before_forward),
            ours.register_state_dict_pre_hook(before_state_dict),
        ]

    def _open_session(self, transport: Transport, clock: Clock) -> IslandSession:
        weights = SharedWeights(self._masters.tensors)
        return IslandSession(self.config, transport, weights, clock.now_s)

    @torch.no_grad()
    def _equalize(self) -> None:
        """Weights and buffers of island 0 for all: DeepSpeed did so within the island only."""
        module = self.engine.module
        tensors = [*module.parameters(), *module.buffers(), *self._masters.tensors()]
        for tensor in {id(tensor): tensor for tensor in tensors if tensor.numel()}.values():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole.view(-1).view(torch.uint8), src=0, group=self._group)
            tensor.copy_(whole)

    @property
    def _agrees(self) -> bool:
        """The island's own weights are the shared ones: nothing has been stepped alone yet."""
        return self._session is None or self.session.is_warmup

    def _choose_weights(self) -> None:
        evaluates = not self.engine.module.training and not torch.is_grad_enabled()
        if evaluates or not self._held:
            self._hold_shared(evaluates)

    def _hold_shared(self, shared: bool) -> None:
        """Put the shared weights, or the island's own, into the model."""
        if self._agrees or shared == self._is_shared:
            return
        self.session.weights.swap()
        self._masters.publish()
        self._is_shared = shared

    def _hold_own(self) -> None:
        if self._held:
            raise UnsupportedError(
                "engine.gradprune.shared_weights() must be left before training goes on: training "
                "needs the island's own weights. Move backward and step out of the with block."
            )
        self._hold_shared(False)

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._hold_own()
        return super()._backward(original, *args, **kwargs)

    def _reduce_gradients(
        self,
        original: Callable[..., Any],
        grads: list[torch.Tensor] | None = None,
        elements_per_buffer: int = 500_000_000,
    ) -> Any:
        if self.session.is_warmup:
            return super()._reduce_gradients(original, grads, elements_per_buffer)
        self.engine._get_gradients_for_reduction()  # as DeepSpeed: where there is none, zeros
        return None

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.session.is_warmup:
            result = super()._step(original, *args, **kwargs)
            if not self.session.is_warmup:
                self.session.weights.capture()
            return result
        self._hold_own()
        before = self.engine.global_steps
        with self.engine.mpu.in_force():
            result = original(*args, **kwargs)
        if self.engine.global_steps != before:
            self._finish_step()
        return result

    def _finish_step(self) -> None:
        if not self.session.is_due:
            self.session.finish_step()
            return
        steps = self.session.steps_since_exchange + 1
        loss = None if self._loss is None else float(self._loss) / steps
        self._loss = None
        self.session.exchange(loss)
        self._masters.publish()
        self._end_step(steps)

    # ---- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.shared_weights():
            return super()._save_checkpoint(original, *args, **kwargs)

    def _load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._hold_own()
        return super()._load_checkpoint(original, *args, **kwargs)

    def _state(self) -> dict[str, Any]:
        scheduler, weights = self.engine.lr_scheduler, self.session.weights
        was_shared = self._is_shared
        self._hold_shared(False)
        state = super()._state() | {
            "island": {
                "own": [weights.own(bucket) for bucket in range(len(weights.shapes))],
                "loss": None if self._loss is None else float(self._loss),
                "optimizer": self._masters.state_dict(),
                "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
                "skipped_steps": self.engine.skipped_steps,
                "buffers": dict(_persistent_buffers(self.engine.module)),
            }
        }
        self._hold_shared(was_shared)
        return state

    def _take_over(self, state: dict[str, Any] | None) -> None:
        """DeepSpeed has put the shared weights into every island."""
        self.session.weights.capture()
        if self.session.slow is not None:
            self.session.slow.reset()
        if state is not None:
            self._restore(state["pruning"]["island"])
        super()._take_over(state)

    @torch.no_grad()
    def _restore(self, island: dict[str, Any]) -> None:
        buffers = dict(_persistent_buffers(self.engine.module))
        if buffers.keys() != island["buffers"].keys():
            raise CheckpointError(
                f"the checkpoint's buffers must be the model's, got {sorted(island['buffers'])} "
                f"for {sorted(buffers)}. Resume with the model that saved it."
            )
        for name, buffer in buffers.items():
            buffer.copy_(island["buffers"][name])
        self._masters.load_state_dict(island["optimizer"])
        self.session.weights.set_own(island["own"])
        self._masters.publish()
        if self.engine.lr_scheduler is not None:
            self.engine.lr_scheduler.load_state_dict(island["lr_scheduler"])
        self.engine.skipped_steps = island["skipped_steps"]
        if island["loss"] is not None:
            self._loss = torch.tensor(island["loss"], device=self.engine.device)


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a state_dict holds."""
    for prefix, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
