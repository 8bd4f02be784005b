"""One island alone goes on with a run of several: it exchanges nothing, and keeps what the run was.

The law and its step count, the slow momentum and, with pruned gradients, the mean residual wait in
this run's checkpoints until there are several islands again. What the old islands had learned and
not sent goes into the weights.

A run that was never pruned, and loads no state of ours, is left alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.deepspeed import checkpoint, resize
from ds_gradprune.deepspeed.agree import gather_texts
from ds_gradprune.deepspeed.archives import latest_file
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.hooks import Hooks
from ds_gradprune.deepspeed.shards import make_shards
from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.outer import update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.transport import Transport


class Alone:
    """The groups of an island of one rank that has no others."""

    island, num_islands, shard, num_shards = 0, 1, 0, 1
    inner = None


class Carried:
    """What an idle engine keeps of a run of several islands.

    Args:
        engine: the DeepSpeed engine.
        config: the validated block.
        transport: over all ranks, which are one island.
    """

    def __init__(self, engine: Any, config: GradientPruningConfig, transport: Transport) -> None:
        self._engine = engine
        self._config = config
        self._groups = engine.mpu if isinstance(engine.mpu, Groups) else cast(Groups, Alone())
        size = transport.world_size
        self._seat = checkpoint.Seat(transport, 0, 1, transport.rank, size)
        self._state: dict[str, Any] | None = None
        self._since = 0
        self._hooks = Hooks(engine)
        self._hooks.replace("save_checkpoint", self._save)
        self._hooks.replace("load_checkpoint", self._load)

    def close(self) -> None:
        """Give DeepSpeed back what was hooked. Local."""
        self._hooks.check()
        self._hooks.remove()

    def _save(
        self,
        original: Callable[..., Any],
        save_dir: str,
        tag: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tag = str(tag) if tag is not None else f"global_step{self._engine.global_steps}"
        if save_dir and self._state is not None:
            loop = dict(self._state["loop"])
            loop["step"] += self._engine.global_steps - self._since
            loop["last_exchange"] = loop["reported"] = loop["step"]
            state = self._state | {"loop": loop}
            checkpoint.save(save_dir, tag, self._seat, state, loop["step"])
        return original(save_dir, tag, *args, **kwargs)

    def _load(
        self,
        original: Callable[..., Any],
        load_dir: str,
        tag: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tag = checkpoint.agree_tag(load_dir, tag, self._seat, latest_file(self._engine))
        saved = None
        if tag is not None and _resumes(*args, **kwargs) and self._has_state(load_dir, tag):
            saved = checkpoint.load(load_dir, tag, self._seat)
        if saved is not None:
            self._check(saved.state)
        result = original(load_dir, tag, *args, **kwargs)
        if result[0] is None or saved is None:
            self._state = None
            return result
        if saved.handed is not None:
            self._deliver(saved.state.get("island", {}), saved.handed)
        self._state = _without_own(saved.state, saved.handed)
        self._since = self._engine.global_steps
        return result

    def _has_state(self, load_dir: str, tag: str) -> bool:
        """Some rank sees a file of ours. Collective."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(os.path.join(load_dir, tag))
        mine = any(checkpoint.FILE_NAME.fullmatch(name) for name in names)
        return "yes" in gather_texts(self._seat.transport, "yes" if mine else "no")

    def _check(self, state: Mapping[str, Any]) -> None:
        mode = state["loop"]["prune"]
        if mode != self._config.prune:
            raise CheckpointError(
                f"the pruning state's prune must be {self._config.prune!r}, got {mode!r}. Resume "
                "with the release and the configuration that saved it."
            )

    def _deliver(self, island: Mapping[str, Any], handed: resize.Handed) -> None:
        """What was not sent goes into the weights."""
        if not handed.own:
            return
        config = self._config
        shards = make_shards(self._engine, self._groups, config.min_numel)
        factor = update_scale(handed.num_islands, config.update_scale) / handed.num_islands
        weights = SharedWeights(shards)
        resize.deliver(weights, island["own"], handed, factor, config.residual_decay)
        shards.publish()
        shards.close()


def _without_own(state: Mapping[str, Any], handed: resize.Handed | None) -> dict[str, Any]:
    """What is carried on: DeepSpeed's files hold weights, moments and the schedule from here on."""
    carried = {name: value for name, value in state.items() if name != "losses"}
    if "island" in state:
        carried["island"] = dict(state["island"]) | {"own": {}, "kept": None, "optimizer": None}
        carried["losses"] = []
    if "residuals" in state and handed is not None:
        carried["residuals"] = handed.mean_residuals()
    carried["channel"] = {}
    return carried


def _resumes(
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
) -> bool:
    """Whether a call of `load_checkpoint` takes more than weights."""
    return load_optimizer_states and not load_module_only
