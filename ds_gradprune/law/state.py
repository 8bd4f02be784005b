"""What the law "predictive" remembers from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ds_gradprune.controller.base import kept_per_chunk
from ds_gradprune.controller.loss_arm import ArmState
from ds_gradprune.errors import CheckpointError
from ds_gradprune.link import LinkState
from ds_gradprune.meter import MeterState, Samples
from ds_gradprune.performance import PerformanceState
from ds_gradprune.records import CHUNK_NUMEL

LAW = "predictive"
"""Its name in the configuration."""

UP_STEPS = 12
"""Exchanges at a density before it rises without a change of the network."""


class CodecTimes(NamedTuple):
    """What the codec takes.

    Attributes:
        k: kept elements per chunk that `times_s` are about; 0: none yet.
        times_s: the last codec times of pruned steps at about that k, oldest first.
        other: (k, seconds) at another k before that, a far one if there was; or None.
        dense_s: the last times of dense steps, which have little to do, but something.
    """

    k: int = 0
    times_s: tuple[float, ...] = ()
    other: tuple[int, float] | None = None
    dense_s: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        other = None if self.other is None else list(self.other)
        return {
            "k": self.k,
            "times_s": list(self.times_s),
            "other": other,
            "dense_s": list(self.dense_s),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CodecTimes:
        """The state that `to_json` wrote; KeyError, TypeError or ValueError if it is none."""
        other = data["other"]
        return cls(
            k=int(data["k"]),
            times_s=tuple(float(time_s) for time_s in data["times_s"]),
            other=None if other is None else (int(other[0]), float(other[1])),
            dense_s=tuple(float(time_s) for time_s in data["dense_s"]),
        )


class NetworkState(NamedTuple):
    """What is known of the exchanges.

    Attributes:
        link: the alarm; its samples are all dense or all pruned.
        meter: what an exchange costs; likewise.
        is_dense: which they are.
        former: exchanges from before the network became slower, while it may still turn out that
            it did not.
        former_steps: exchanges since.
        as_before: the newest exchange was as the former ones.
        codec: what the codec takes.
        sizes: (k, bytes) of the newest pruned exchange, then of one with another k; at most two.
        dense_bytes: of a dense exchange; 0: unknown.
        dense_cost: seconds per byte of a dense exchange, on the network as it is now, or None.
        pruned_cost: the same of a pruned one.
        dense_factor: dense_cost / pruned_cost, when both were last known.
    """

    link: LinkState = LinkState()
    meter: MeterState = MeterState()
    is_dense: bool = True
    former: Samples = ()
    former_steps: int = 0
    as_before: bool = False
    codec: CodecTimes = CodecTimes()
    sizes: tuple[tuple[int, int], ...] = ()
    dense_bytes: int = 0
    dense_cost: float | None = None
    pruned_cost: float | None = None
    dense_factor: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        return self._asdict() | {
            "link": self.link.to_json(),
            "meter": self.meter.to_json(),
            "former": [list(sample) for sample in self.former],
            "codec": self.codec.to_json(),
            "sizes": [list(size) for size in self.sizes],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetworkState:
        """The state that `to_json` wrote; KeyError, TypeError or ValueError if it is none."""
        costs = (data["dense_cost"], data["pruned_cost"])
        dense_cost, pruned_cost = (None if cost is None else float(cost) for cost in costs)
        return cls(
            link=LinkState.from_json(data["link"]),
            meter=MeterState.from_json(data["meter"]),
            is_dense=bool(data["is_dense"]),
            former=tuple((int(size), float(time_s)) for size, time_s in data["former"]),
            former_steps=int(data["former_steps"]),
            as_before=bool(data["as_before"]),
            codec=CodecTimes.from_json(data["codec"]),
            sizes=tuple((int(k), int(size)) for k, size in data["sizes"]),
            dense_bytes=int(data["dense_bytes"]),
            dense_cost=dense_cost,
            pruned_cost=pruned_cost,
            dense_factor=float(data["dense_factor"]),
        )


class PredictiveState(NamedTuple):
    """Everything the law remembers. The position in warm-up and ramp is the step number itself.

    Attributes:
        density: of the step that is next or under way.
        plan_k: kept elements per chunk that the budget affords; CHUNK_NUMEL: dense.
        steps_here: steps since the plan moved.
        performance: the window of losses.
        arm: what the losses ask for.
        compute_times_s: the last compute times, oldest first.
        network: what is known of the exchanges.
    """

    density: float
    plan_k: int
    steps_here: int = UP_STEPS
    performance: PerformanceState = PerformanceState()
    arm: ArmState = ArmState()
    compute_times_s: tuple[float, ...] = ()
    network: NetworkState = NetworkState()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        return {
            "law": LAW,
            "density": self.density,
            "plan_k": self.plan_k,
            "steps_here": self.steps_here,
            "performance": self.performance.to_json(),
            "arm": self.arm.to_json(),
            "compute_times_s": list(self.compute_times_s),
            "network": self.network.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PredictiveState:
        """The state that `to_json` wrote.

        Raises:
            CheckpointError: the data is not such a state.
        """
        try:
            density, plan_k = float(data["density"]), int(data["plan_k"])
            kept_per_chunk(density)
            kept_per_chunk(plan_k / CHUNK_NUMEL)
            return cls(
                density=density,
                plan_k=plan_k,
                steps_here=int(data["steps_here"]),
                performance=PerformanceState.from_json(data["performance"]),
                arm=ArmState.from_json(data["arm"]),
                compute_times_s=tuple(float(time_s) for time_s in data["compute_times_s"]),
                network=NetworkState.from_json(data["network"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(
                f"controller must be a saved controller state, got {data!r}: {exc}"
            ) from exc
