"""How often islands exchange: the second actuator, with `"sync_every": "auto"`.

An index takes 5.7 bits at 5 % and 11.4 at 0.1 %. So few dense exchanges deliver more elements per
byte than many thin ones; but islands that do not hear of each other drift apart. The interval is 1,
2, 4, 8, 16 or 32 steps, and moves by one octave at a time:

- With a budget of the user's it is the shortest one, from 4 on, at which the budget affords 3 % of
  the elements. It doubles where less is affordable, and halves where the shorter one would afford a
  quarter more.
- Without a budget it is the one with which most is learned per second (`progress_model`), if that
  is at least a twentieth more.

What is priced is exposed time: an exchange hides behind the computation of the steps that it
travels through, and these grow with the interval. An interval never grows while P(t) misses its
target.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import FIRST_INTERVAL, INTERVALS, GradientPruningConfig
from ds_gradprune.law import plan
from ds_gradprune.law.decision import Cause, Choice, every, move, name
from ds_gradprune.law.loss_arm import Verdict
from ds_gradprune.law.network import Network
from ds_gradprune.law.plan import PlanState
from ds_gradprune.law.prices import Prices, ladder
from ds_gradprune.law.progress_model import best_k, steps_factor
from ds_gradprune.law.schedule import patience

EASIEST = FIRST_INTERVAL
"""The shortest interval that a budget leads to. Shorter ones lose more, whatever they send, because
the residual is used so much later than what the own optimizer has learned (`progress_model`)."""

FLOOR = 0.03
"""Density below which a longer interval is better. At 3 % an element's turn comes soon, and its
index is cheap."""

SHORTER_SHARE = 1.25
"""So many times the floor must be affordable at the shorter interval: the dead band."""

SHORTER_SHARE_CHANGED = 1.1
"""The same after a change of the network."""


class _Side(NamedTuple):
    """One interval as a place to be.

    Attributes:
        interval: optimizer steps from one exchange to the next.
        prices: what a step costs there.
        budget_s: what it may cost.
        room: kept elements per chunk that the budget affords, whatever the user allows.
        k: the same within density.min and max.
    """

    interval: int
    prices: Prices
    budget_s: float
    room: int
    k: int

    def learning_s(self, prune: str, step: int) -> float:
        """Seconds to learn what a dense step learns."""
        factor = steps_factor(prune, self.k, step, self.interval)
        return self.prices.step_s(self.k) * factor


def inside(config: GradientPruningConfig, interval: int) -> int:
    """The interval in force: the configuration's, or the nearest octave that is not longer.

    One from a checkpoint may be of a run with another `sync_every`.
    """
    if config.sync_every != "auto":
        return config.sync_every
    return max(i for i in INTERVALS if i <= max(1, interval))


def budget_at(
    config: GradientPruningConfig, prices: Prices, step: int, *, dense_share: float
) -> float:
    """What a step may take at the interval of these prices.

    Args:
        config: the validated block.
        prices: what a step costs.
        step: how long the run has lasted, steps.
        dense_share: see `progress_model.best_k`.

    Returns:
        The user's budget; else what a step takes at the density that learns most per second.
    """
    if config.step_time_budget_s is not None:
        return config.step_time_budget_s
    if config.sync_every == "auto" and prices.interval > EASIEST:
        dense_share = 0.0  # there is little room
    k = best_k(
        prices,
        config.prune,
        step,
        *_bounds(config),
        dense_share=dense_share,
        interval=prices.interval if config.sync_every == "auto" else None,
    )
    return prices.step_s(k) + prices.margin_s(k)


def choose(
    config: GradientPruningConfig,
    state: PlanState,
    network: Network,
    prices: Prices | None,
    budget_s: float | None,
    step: int,
    *,
    is_guarded: bool,
    is_missed: bool,
) -> Choice | None:
    """Whether the interval should change, and the density with it.

    Args:
        config: the validated block, with `"sync_every": "auto"`.
        state: where the plan stands.
        network: what is known of the exchanges.
        prices: what a step costs at the plan's interval; None while unknown.
        budget_s: what it may cost; None while unknown.
        step: how long the run has lasted, steps.
        is_guarded: nothing but a change of the network may prune more.
        is_missed: P(t) misses its target.

    Returns:
        None: the interval stays.
    """
    if state.k == CHUNK_NUMEL or prices is None or network.cost is None or budget_s is None:
        return None
    here = _side(config, prices, budget_s, state.interval)
    is_learning = config.step_time_budget_s is None
    shorter = _shorter(config, state, network, here, step, is_learning=is_learning)
    if shorter is not None or is_missed or (is_guarded and network.change is None):
        return shorter
    return _longer(config, state, network, here, step, is_learning=is_learning)


def _shorter(
    config: GradientPruningConfig,
    state: PlanState,
    network: Network,
    here: _Side,
    step: int,
    *,
    is_learning: bool,
) -> Choice | None:
    least = 1 if is_learning else EASIEST
    if here.interval <= least or not plan.may_rise(state, network, plan.evidence(state, network)):
        return None
    there = _at(config, here, step, here.interval // 2)
    if is_learning:
        return _faster_learning(config, here, there, step, Cause.BUDGET_ROOM)
    share = SHORTER_SHARE_CHANGED if network.change == "faster" else SHORTER_SHARE
    if there.room < share * _floor(config, there.interval):
        return None
    cause = Cause.BUDGET_ROOM if network.change is None else Cause.NETWORK_CHANGED
    text = f"density {name(there.room)} fits every {there.interval} steps"
    return Choice(there.k, cause, text, there.interval)


def _longer(
    config: GradientPruningConfig,
    state: PlanState,
    network: Network,
    here: _Side,
    step: int,
    *,
    is_learning: bool,
) -> Choice | None:
    floor = _floor(config, here.interval)
    if here.interval == INTERVALS[-1] or (here.room >= floor and not is_learning):
        return None
    # Two octaves short are no chance; and a step meets its budget at any interval on the way.
    is_plain = not is_learning and 2 * here.room < floor
    wanted = patience(plan.DOWN_STEPS, state.interval, plan.WRONG_STEPS)
    if network.change is None and not is_plain and plan.evidence(state, network) < wanted:
        return None
    there = _at(config, here, step, 2 * here.interval)
    if is_learning:
        return _faster_learning(config, here, there, step, Cause.OVER_BUDGET)
    cause = Cause.OVER_BUDGET if network.change is None else Cause.NETWORK_CHANGED
    text = f"density {name(here.room)} alone fits every {here.interval} steps"
    return Choice(there.k, cause, text, there.interval)


def _faster_learning(
    config: GradientPruningConfig, here: _Side, there: _Side, step: int, cause: Cause
) -> Choice | None:
    """The other interval, if more is learned there per second."""
    now_s, then_s = (side.learning_s(config.prune, step) for side in (here, there))
    if then_s >= plan.CHEAPER * now_s:
        return None
    text = f"every {there.interval} steps learns {100 * (now_s / then_s - 1.0):.0f} % faster"
    return Choice(there.k, cause, text, there.interval)


def doubled(config: GradientPruningConfig, k: int, times: int) -> int:
    """Kept elements per chunk, doubled so many times, on the ladder and at most density.max."""
    return max(k, min(kept_per_chunk(config.density.max), ladder(k << times)))


def raised(config: GradientPruningConfig, k: int, interval: int, times: int) -> tuple[int, int]:
    """Twice the bytes per step, so many times: shorter intervals first, then more elements.

    Returns:
        Kept elements per chunk, and the interval.
    """
    if k == CHUNK_NUMEL:
        return k, interval
    while times and interval > EASIEST:
        times, interval = times - 1, interval // 2
    return (doubled(config, k, times) if times else k), interval


def nearest(interval: int, used: int) -> int:
    """The interval that is wanted, or the one on the way to it from `used` that is next."""
    return max(used // 2, min(2 * used, interval))


def one_octave(config: GradientPruningConfig, k: int, interval: int, used: int) -> tuple[int, int]:
    """The interval, or the one on the way to it that is next; as many bytes per step.

    Args:
        config: the validated block.
        k: kept elements per chunk that are wanted.
        interval: the interval that is wanted.
        used: the one in force.
    """
    near = nearest(interval, used)
    if near == interval or k == CHUNK_NUMEL:
        return k, near
    k_min, k_max = _bounds(config)
    return max(k_min, min(k_max, ladder(max(1, k * near // interval)))), near


def turn(before: int, k: int, used: int, interval: int, verdict: Verdict, wanted: Choice) -> Choice:
    """Another interval, and the density that goes with it."""
    moves = f"{every(used, interval)}, {move(before, k)}"
    if verdict.event == "raise":
        return Choice(k, Cause.PERFORMANCE_MISSED, f"{verdict.text}: {moves}", interval)
    if wanted.cause is not Cause.HOLD:
        return Choice(k, wanted.cause, f"{wanted.text}: {moves}", interval)
    cause = Cause.OVER_BUDGET if interval > used else Cause.BUDGET_ROOM
    return Choice(k, cause, f"{verdict.text}: back to the plan, {moves}", interval)


def predicted_s(
    config: GradientPruningConfig, prices: Prices | None, k: int, interval: int
) -> float | None:
    """What a step will take with k kept elements per chunk at an interval; None: unknown."""
    if prices is None:
        return None
    if prices.interval != interval:
        prices = prices.at(interval, config.delay_of(interval))
    return prices.step_s(k)


def _at(config: GradientPruningConfig, here: _Side, step: int, interval: int) -> _Side:
    prices = here.prices.at(interval, config.delay_of(interval))
    budget_s = budget_at(config, prices, step, dense_share=0.0)
    return _side(config, prices, budget_s, interval)


def _side(config: GradientPruningConfig, prices: Prices, budget_s: float, interval: int) -> _Side:
    room = prices.affordable_k(budget_s, 1, CHUNK_NUMEL - 1)
    k_min, k_max = _bounds(config)
    return _Side(interval, prices, budget_s, room, max(k_min, min(k_max, room)))


def _floor(config: GradientPruningConfig, interval: int) -> int:
    """Kept elements per chunk that an exchange should have; CHUNK_NUMEL: it never has enough."""
    if interval < EASIEST:
        return CHUNK_NUMEL
    k_min, k_max = _bounds(config)
    return ladder(max(k_min, min(k_max, kept_per_chunk(FLOOR))))


def _bounds(config: GradientPruningConfig) -> tuple[int, int]:
    return kept_per_chunk(config.density.min), kept_per_chunk(config.density.max)
