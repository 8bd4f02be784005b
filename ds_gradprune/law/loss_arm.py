"""When the loss asks for less pruning, by how much, and for how long. Pure.

P(t) is noise around 0 on any plateau, so at the end of every training. Therefore:

- P misses its target only where it lies below it by more than its noise (`performance.noise`, which
  scales with the window): 4 standard deviations once, or 3 in two evaluations in a row, one
  every M / 8 losses.
- A miss doubles the density. That is worth its time only if it helps, so the hold is bounded: after
  M / 2 losses at the new density they are judged alone. P holds among them: back to the budget. P
  misses still: double again, three times at most. Then the density is not what is wrong: back to
  the budget, and rest for 4 M losses, in which only twice the deviation counts.

A loss that leaps (above the median of 64 by 6 robust standard deviations) enters the window as that
bound: one bad batch is no trend, and many of them still are. It and a step with a gradient that is
not finite set a guard of 8 steps, in which nothing but a change of the network prunes more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ds_gradprune import performance
from ds_gradprune.performance import Form, PerformanceState

STRONG, WEAK, HELD = 4.0, 3.0, 1.0
"""Standard deviations of P below the target: missed at once, missed if twice, held again."""

MOST_RAISES = 3
"""Each doubles the density."""

GUARD_STEPS = 8
_REST_WINDOWS = 4
_SPIKE, _SPIKE_NUMEL, _SPIKE_LEAST = 6.0, 64, 16
_NORMAL = 1.4826  # standard deviation over median absolute deviation of a normal number

Event = Literal["raise", "held", "given_up"]


class ArmState(NamedTuple):
    """Everything the arm remembers.

    Attributes:
        wait: losses until the next evaluation.
        is_below: the last evaluation lay below the weak bound.
        raises: doublings in force.
        since: losses since the last doubling.
        rest: losses for which the arm still rests.
        guard: steps for which pruning may not be increased without a change of the network.
    """

    wait: int = 0
    is_below: bool = False
    raises: int = 0
    since: int = 0
    rest: int = 0
    guard: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        return {
            "wait": self.wait,
            "is_below": self.is_below,
            "raises": self.raises,
            "since": self.since,
            "rest": self.rest,
            "guard": self.guard,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArmState:
        """The state that `to_json` wrote; KeyError, TypeError or ValueError if it is none."""
        return cls(
            wait=int(data["wait"]),
            is_below=bool(data["is_below"]),
            raises=int(data["raises"]),
            since=int(data["since"]),
            rest=int(data["rest"]),
            guard=int(data["guard"]),
        )


class Verdict(NamedTuple):
    """What the arm found in one step.

    Attributes:
        event: the doublings changed, and why; None: they did not.
        text: the numbers behind it, or what is known of P.
    """

    event: Event | None
    text: str


def clipped(losses: tuple[float, ...], loss: float) -> tuple[float, bool]:
    """A loss as it enters the window, and whether it leapt.

    Args:
        losses: those before it.
        loss: the newest one.

    Returns:
        The loss, or the bound that it leapt over, and which it is. Nan is returned as it is.
    """
    before = losses[-_SPIKE_NUMEL:]
    if len(before) < _SPIKE_LEAST or not loss > max(before):
        return loss, False
    middle = sorted(before)[len(before) // 2]
    spread = sorted([abs(x - middle) for x in before])[len(before) // 2]
    bound = middle + _SPIKE * _NORMAL * max(spread, 1e-6 * abs(middle))
    # A loss that rises steadily in small steps leaves its median behind, and is no spike.
    bound = max(bound, max(before))
    return (bound, True) if loss > bound else (loss, False)


def judge(
    arm: ArmState,
    window: PerformanceState,
    p: float | None,
    *,
    is_known: bool,
    is_spike: bool,
    is_nonfinite: bool,
    target: float,
    window_size: int,
    form: Form,
) -> tuple[ArmState, Verdict]:
    """Take in one step's loss.

    Args:
        arm: what is known so far.
        window: the losses, the newest included.
        p: P(t) over the whole window; None while unknown.
        is_known: the newest loss is known and entered the window.
        is_spike: it leapt, see `clipped`.
        is_nonfinite: some gradient or loss of the step is not finite.
        target: what P must reach.
        window_size: M.
        form: which formula.

    Returns:
        The new state, and what was found.
    """
    text = _known(p, target, len(window.losses), window_size)
    if is_nonfinite:
        return arm._replace(guard=GUARD_STEPS), Verdict(None, text)
    guard = max(0, arm.guard - 1)
    if not is_known:
        return arm if guard == arm.guard else arm._replace(guard=guard), Verdict(None, text)
    if is_spike:
        guard = GUARD_STEPS
    arm = ArmState(
        wait=max(0, arm.wait - 1),
        is_below=arm.is_below,
        raises=arm.raises,
        since=arm.since + 1 if arm.raises else 0,
        rest=max(0, arm.rest - 1),
        guard=guard,
    )
    if arm.wait:
        return arm, Verdict(None, text)
    if arm.raises:
        return _follow_up(arm, window, target, window_size, form, text)
    return _evaluate(arm, p, target, window_size, form, text)


def _evaluate(
    arm: ArmState, p: float | None, target: float, window_size: int, form: Form, text: str
) -> tuple[ArmState, Verdict]:
    """Is P missed? Every M / 8 losses."""
    arm = arm._replace(wait=max(1, window_size // 8))
    if p is None:
        return arm._replace(is_below=False), Verdict(None, text)
    noise = performance.noise(window_size, form)
    bound = target - STRONG * noise * (2.0 if arm.rest else 1.0)
    is_below = not arm.rest and p < target - WEAK * noise
    if not (p < bound or (is_below and arm.is_below)):
        return arm._replace(is_below=is_below), Verdict(None, text)
    text = f"P {p:.2f} misses its target {target:g} by more than its noise of {noise:.2f}"
    return _raised(arm, window_size), Verdict("raise", text)


def _follow_up(
    arm: ArmState, window: PerformanceState, target: float, window_size: int, form: Form, text: str
) -> tuple[ArmState, Verdict]:
    """Did it help? Judged by the losses since, once there are M / 2 of them."""
    numel = min(arm.since, window_size + 1, len(window.losses))
    if arm.since < _half(window_size) or numel < 5:
        return arm, Verdict(None, f"{text}; {arm.since} losses since the density was doubled")
    p = performance.recent(window, numel, form=form)
    assert p is not None  # so many losses are there
    noise = performance.noise(numel - 1, form)
    if p >= target - HELD * noise:
        arm = arm._replace(raises=0, since=0, is_below=False, wait=_half(window_size))
        return arm, Verdict("held", f"P {p:.2f} over the last {numel} losses holds again")
    if arm.raises < MOST_RAISES:
        text = f"P {p:.2f} over the last {numel} losses still misses its target {target:g}"
        return _raised(arm, window_size), Verdict("raise", text)
    rest = _REST_WINDOWS * window_size
    text = f"{arm.raises} doublings did not help P ({p:.2f}), so no more for {rest} losses"
    return ArmState(rest=rest, guard=arm.guard), Verdict("given_up", text)


def _raised(arm: ArmState, window_size: int) -> ArmState:
    return arm._replace(raises=arm.raises + 1, since=0, wait=_half(window_size), is_below=False)


def _half(window_size: int) -> int:
    return max(5, window_size // 2)


def _known(p: float | None, target: float, numel: int, window_size: int) -> str:
    if p is None:
        return f"P not known yet ({numel} of {window_size + 1})"
    return f"P {p:.2f}, target {target:g}"
