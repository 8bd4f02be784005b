"""When the loss asks for less pruning, by how much, and for how long.

P(t) is noise around 0 on any plateau, so at the end of every training. Therefore:

- P misses its target only where it lies below it by more than its noise (`learning.noise`, which
  scales with the window): 4 standard deviations once, or 3 in two evaluations in a row, one
  every M / 8 losses.
- A miss doubles the density. That is worth its time only if it helps, so the hold is bounded: after
  M / 2 losses at the new density they are judged alone. P holds among them: back to the budget. P
  misses still: double again, three times at most. Then the density is not what is wrong: back to
  the budget, and rest for 4 M losses, in which only twice the deviation counts.

A loss that leaps up (`outliers`) and a step with a gradient that is not finite set a guard of 8
steps, in which nothing but a change of the network prunes more.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from ds_gradprune.law import learning
from ds_gradprune.law.learning import Form, LossWindow
from ds_gradprune.law.stats import Count, Within

STRONG, WEAK, HELD = 4.0, 3.0, 1.0
"""Standard deviations of P below the target: missed at once, missed if twice, held again."""

MOST_RAISES = 3
"""Each doubles the density."""

GUARD_STEPS = 8
_REST_WINDOWS = 4

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

    wait: Count = 0
    is_below: bool = False
    raises: Annotated[int, Within(0, MOST_RAISES)] = 0
    since: Count = 0
    rest: Count = 0
    guard: Annotated[int, Within(0, GUARD_STEPS)] = 0


class Verdict(NamedTuple):
    """What the arm found in one step.

    Attributes:
        event: the doublings changed, and why; None: they did not.
        text: the numbers behind it, or what is known of P.
    """

    event: Event | None
    text: str


def judge(
    arm: ArmState,
    window: LossWindow,
    p: float | None,
    *,
    is_known: bool,
    is_spike: bool,
    is_nonfinite: bool,
    target: float,
    window_size: int,
    form: Form,
    steps: int = 1,
) -> tuple[ArmState, Verdict]:
    """Take in the loss of one exchange.

    Args:
        arm: what is known so far.
        window: the losses, the newest included.
        p: P(t) over the whole window; None while unknown.
        is_known: the newest loss is known and entered the window.
        is_spike: it leapt up, see `outliers`.
        is_nonfinite: some gradient or loss of the step is not finite.
        target: what P must reach.
        window_size: M, in losses.
        form: which formula.
        steps: optimizer steps that the loss is the mean of.

    Returns:
        The new state, and what was found.
    """
    text = _known(p, target, window, window_size)
    if is_nonfinite:
        return arm._replace(guard=GUARD_STEPS), Verdict(None, text)
    guard = arm.guard - steps if arm.guard > steps else 0
    if not is_known:
        return arm if guard == arm.guard else arm._replace(guard=guard), Verdict(None, text)
    if is_spike:
        guard = GUARD_STEPS
    since = arm.since + 1 if arm.raises else 0
    wait = arm.wait - 1 if arm.wait else 0
    rest = arm.rest - 1 if arm.rest else 0
    arm = ArmState(wait, arm.is_below, arm.raises, since, rest, guard)
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
    noise = learning.noise(window_size, form)
    bound = target - STRONG * noise * (2.0 if arm.rest else 1.0)
    is_below = not arm.rest and p < target - WEAK * noise
    if not (p < bound or (is_below and arm.is_below)):
        return arm._replace(is_below=is_below), Verdict(None, text)
    text = f"P {p:.2f} misses its target {target:g} by more than its noise of {noise:.2f}"
    return _raised(arm, window_size), Verdict("raise", text)


def _follow_up(
    arm: ArmState, window: LossWindow, target: float, window_size: int, form: Form, text: str
) -> tuple[ArmState, Verdict]:
    """Did it help? Judged by the losses since, once there are M / 2 of them."""
    numel = min(arm.since, window_size + 1, len(window.losses))
    if arm.since < _half(window_size) or numel < 5:
        return arm, Verdict(None, f"{text}; {arm.since} losses since the density was doubled")
    p = learning.recent(window, numel, form=form)
    assert p is not None  # so many losses are there
    noise = learning.noise(numel - 1, form)
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


def _known(p: float | None, target: float, window: LossWindow, window_size: int) -> str:
    if p is None:
        return f"P not known yet ({len(window.losses)} of {window_size + 1})"
    return f"P {p:.2f}, target {target:g}"
