"""Pictures of runs. Matplotlib is loaded when the first one is drawn.

Longer than 300 lines: one figure, drawn panel after panel from top to bottom.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.commands.decided import decisions
from ds_gradprune.commands.runlog import Run, means, sums
from ds_gradprune.errors import DataError, MissingDependencyError

COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#555555")
"""Of runs; more than these repeat."""

PARTS = (
    ("compute_s", "computation", "#9ecae1"),
    ("codec_s", "codec", "#fdae6b"),
    ("wire_s", "wire, exposed", "#e6550d"),
    ("whole_s", "undivided: DeepSpeed alone", "#bdbdbd"),
    ("hidden_s", "wire, hidden", "#fdd0a2"),
)
"""Where the time goes: field, name, color. What is hidden is no part of the whole."""

CAUSES = {
    "over_budget": ("v", "#d62728", "sends less: time"),
    "budget_room": ("^", "#2ca02c", "sends more: room"),
    "network_changed": ("D", "#9467bd", "exchanges got faster or slower"),
    "performance_missed": ("^", "#1f77b4", "sends more: P"),
    "dense_cheaper": ("s", "#7f7f7f", "dense is faster"),
}
"""How decisions are marked."""

CROWDED = 30
"""Where a run has more marks than that, they are drawn small."""

POINTS, GROUPS = 400, 120
"""Points of a line and groups of a stack at most."""

DPI = 120


def png(runs: Sequence[Run]) -> bytes:
    """The picture of one or several runs, as a PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = draw(runs)
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=DPI)
    return memory.getvalue()


def save(runs: Sequence[Run], path: Path) -> None:
    """Write the picture of one or several runs.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    data = png(runs)
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise DataError(f"--out must be writable, got {path}: {exc.strerror}.") from exc


def draw(runs: Sequence[Run]) -> Any:
    """A figure of six panels: losses, density and link, where the time goes."""
    figure = _figure_class()(figsize=(13, 11), layout="constrained")
    (by_step, by_time), (density, link), (time, totals) = figure.subplots(3, 2)
    single = runs[0] if len(runs) == 1 else None
    colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]
    for run, color in zip(runs, colors, strict=True):
        label = run.name if single is None else None
        _loss(by_step, run, color, label, against_time=False)
        _loss(by_time, run, color, None, against_time=True)
        _density(density, run, color, label)
        _link(link, run, color)
        if single is None:
            _step_times(time, run, color)
    if single is not None:
        _stack(time, single)
    else:
        time.set_ylim(bottom=0)
    _totals(totals, runs)
    _dress_losses(by_step, by_time, runs)
    _dress_density(density, runs)
    _dress_link(link, runs)
    time.set_xlabel("step")
    time.set_ylabel("seconds a step")
    time.set_title("where the time goes" if single else "time of a step")
    for axis in (by_step, by_time, density, link, time):
        axis.grid(alpha=0.25)
    if link.lines:
        link.set_xlim(density.get_xlim())
    if single is None:
        handles, labels = by_step.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)))
    else:
        figure.suptitle(single.name)
    return figure


# ---- losses --------------------------------------------------------------------------------------


def _loss(axis: Any, run: Run, color: str, label: str | None, *, against_time: bool) -> None:
    known = [e for e in run.entries if e.loss is not None]
    if known:
        xs = means([e.seconds if against_time else e.step for e in known], POINTS)
        raw = [e.loss for e in known if e.loss is not None]
        axis.plot(xs, means(raw, POINTS), color=color, alpha=0.3, linewidth=0.8)
        smooth = _smoothed(raw, max(1, len(raw) // 40))
        axis.plot(xs, means(smooth, POINTS), color=color, linewidth=1.6, label=label)
    if run.validation:
        xs = [run.seconds_at(s) if against_time else s for s, _ in run.validation]
        ys = [loss for _, loss in run.validation]
        axis.plot(xs, ys, "o--", color=color, markersize=5, linewidth=1.0, markeredgecolor="white")


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean over so many values on both sides, fewer at the ends."""
    total, sums_to = 0.0, [0.0]
    for value in values:
        total += value
        sums_to.append(total)
    result = []
    for i in range(len(values)):
        reach = min(width, i, len(values) - 1 - i)
        low, high = i - reach, i + reach + 1
        result.append((sums_to[high] - sums_to[low]) / (high - low))
    return result


def _dress_losses(by_step: Any, by_time: Any, runs: Sequence[Run]) -> None:
    names = sorted({run.loss_name for run in runs})
    title = " / ".join(names)
    if any(run.validation for run in runs):
        title += "; points: shared validation loss"
    by_step.set_title(title)
    by_time.set_title("the same against time")
    by_step.set_xlabel("step")
    by_time.set_xlabel("seconds of training")
    for axis in (by_step, by_time):
        axis.set_ylabel("loss")


# ---- density and link ----------------------------------------------------------------------------


def _density(axis: Any, run: Run, color: str, label: str | None) -> None:
    known = [e for e in run.entries if e.density is not None]
    if not known:
        return
    xs, ys = [e.step for e in known], [100 * (e.density or 0.0) for e in known]
    axis.step(xs, ys, where="pre", color=color, linewidth=1.4, label=label)
    moves = [e for e in map(run.entries.__getitem__, decisions(run)) if e.is_move]
    size, edge = (7, "white") if len(moves) <= CROWDED else (4, "none")
    for entry in moves:
        if entry.next_cause in CAUSES:
            shape, shade, _ = CAUSES[entry.next_cause]
            y = 100 * (entry.next_density or 0.0)
            axis.plot([entry.step], [y], shape, color=shade, markersize=size, markeredgecolor=edge)


def _dress_density(axis: Any, runs: Sequence[Run]) -> None:
    axis.set_title("density of an exchange")
    axis.set_xlabel("step")
    axis.set_ylabel("% of the elements, sent")
    if not any(e.density is not None for run in runs for e in run.entries):
        _say_nothing(axis, "no run here prunes")
        return
    _use_log(axis)
    seen = {
        run.entries[n].next_cause for run in runs for n in decisions(run) if run.entries[n].is_move
    }
    marks = [CAUSES[cause] for cause in CAUSES if cause in seen]
    handles = [
        axis.plot([], [], shape, color=shade, linestyle="none", label=text)[0]
        for shape, shade, text in marks
    ]
    if any(e.interval > 1 for run in runs for e in run.entries):
        _interval(axis, runs)
    if handles:
        axis.legend(handles=handles, fontsize=8, loc="best")


def _interval(axis: Any, runs: Sequence[Run]) -> None:
    """Steps per exchange, on an axis of their own."""
    beside = axis.twinx()
    for number, run in enumerate(runs):
        if run.mode == "dense":
            continue
        xs, ys = [e.step for e in run.entries], [e.interval for e in run.entries]
        color = COLORS[number % len(COLORS)] if len(runs) > 1 else "#888888"
        beside.step(xs, ys, where="pre", color=color, linewidth=1.0, linestyle=":")
    beside.set_ylabel("steps per exchange (dotted)")
    beside.set_ylim(0, 1.6 * max(e.interval for run in runs for e in run.entries))


def _link(axis: Any, run: Run, color: str) -> None:
    known = [e for e in run.entries if e.link_mbit is not None]
    axis.plot([e.step for e in known], [e.link_mbit for e in known], color=color, linewidth=1.2)
    shade = CAUSES["network_changed"][1]
    changes = [e.step for e in run.entries if e.has_changed]
    if len(changes) > CROWDED:  # lines would hide the rate
        below = axis.get_xaxis_transform()
        axis.plot(changes, [0.03] * len(changes), "|", color=shade, alpha=0.6, transform=below)
        return
    for step in changes:
        axis.axvline(step, color=shade, linewidth=0.8, linestyle=":")


def _dress_link(axis: Any, runs: Sequence[Run]) -> None:
    axis.set_title("link rate as the exchanges show it")
    axis.set_xlabel("step")
    axis.set_ylabel("Mbit/s")
    rates = [e.link_mbit for run in runs for e in run.entries if e.link_mbit is not None]
    if not rates:
        _say_nothing(axis, "no rate was measured")
        return
    if max(rates) > 20 * min(rates):
        _use_log(axis)
    else:
        axis.set_ylim(bottom=0)
    if any(e.has_changed for run in runs for e in run.entries):
        shade = CAUSES["network_changed"][1]
        line = axis.plot([], [], ":", color=shade, label="the law noticed a change")
        axis.legend(handles=line, fontsize=8, loc="best")


def _use_log(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _say_nothing(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="#777777")
    axis.set_xticks([])
    axis.set_yticks([])


# ---- time ----------------------------------------------------------------------------------------


def _stack(axis: Any, run: Run) -> None:
    xs = means([float(e.step) for e in run.entries], GROUPS)
    parts = _parts([run])
    layers = [
        means([getattr(e, field) or 0.0 for e in run.entries], GROUPS) for field, _, _ in parts
    ]
    axis.stackplot(
        xs,
        layers,
        labels=[name for _, name, _ in parts],
        colors=[color for _, _, color in parts],
    )
    highest = max(sum(values) for values in zip(*layers, strict=True))
    axis.set_ylim(0, 1.25 * highest or 1.0)  # room for the legend
    axis.legend(fontsize=8, loc="upper center", ncols=len(parts))


def _step_times(axis: Any, run: Run, color: str) -> None:
    xs = means([float(e.step) for e in run.entries], GROUPS)
    axis.plot(xs, means([e.step_s for e in run.entries], GROUPS), color=color, linewidth=1.3)


def _totals(axis: Any, runs: Sequence[Run]) -> None:
    """One bar per run: seconds of the whole training, and what they were for."""
    longest = 0.0
    for row, run in enumerate(runs):
        total, left = sums(run), 0.0
        for field, _, color in PARTS:
            width = getattr(total, field)
            axis.barh(row, width, left=left, color=color, height=0.6)
            share = width / total.seconds if total.seconds else 0.0
            if share >= 0.08:
                middle = left + width / 2
                axis.text(middle, row, f"{100 * share:.0f} %", ha="center", va="center", fontsize=8)
            left += width
        longest = max(longest, left)
    axis.set_yticks(range(len(runs)), [_short(run.name) for run in runs])
    axis.set_ylim(len(runs) - 0.4, -0.6 - 0.25 * len(runs))  # room for the legend above
    axis.set_xlim(0, 1.05 * longest or 1.0)
    axis.set_xlabel("seconds of training")
    axis.set_title("totals")
    handles = [axis.barh(0, 0, color=color, label=name) for _, name, color in _parts(runs)]
    axis.legend(handles=handles, fontsize=8, loc="upper center", ncols=3)


def _parts(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Those of PARTS that some run has."""
    totals = [sums(run) for run in runs]
    return [part for part in PARTS if any(getattr(total, part[0]) for total in totals)]


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"


def _figure_class() -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as exc:
        if exc.name is None or not exc.name.startswith("matplotlib"):
            raise
        raise MissingDependencyError(
            "Pictures need matplotlib, which is not installed. Run: pip install "
            '"ds_gradprune[plot]"'
        ) from exc
