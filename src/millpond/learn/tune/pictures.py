"""Pictures of a search: the best so far, what mattered, each parameter's values, and where ASHA stopped trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from millpond.learn.pictures import STYLE, TRAINING, VALIDATION, save
from millpond.learn.tune.outcome import Outcome, best_so_far
from millpond.learn.tune.record import Trial

if TYPE_CHECKING:
    from millpond.learn.tune.space import Range
    from millpond.learn.tune.tuning import Tuning

STOPPED, FAINT = "#9fb0b2", "#d5dfdf"
COLUMNS = 4
"""Parameters in a row of their picture."""
SPREAD = 4.0
"""Worst trials go out of the picture where they lie so many times further from the best than the median does."""


def figures(tuning: Tuning) -> dict[str, Figure]:
    """Return the pictures of a search by name; without `importance` where too few trials tell."""
    outcome = tuning.outcome
    found = {"history": history_figure(outcome), "curves": curves_figure(outcome, tuning.epochs)}
    if outcome.importance:
        found["importance"] = importance_figure(outcome)
    assert tuning.recipe.tune is not None
    found["parameters"] = parameters_figure(outcome, tuning.recipe.tune.space)
    return found


def draw(tuning: Tuning, directory: Path) -> None:
    """Draw all of them into PNG files, `history.png` and so on."""
    for name, figure in figures(tuning).items():
        save(figure, directory / f"{name}.png")


@matplotlib.rc_context(STYLE)
def history_figure(outcome: Outcome) -> Figure:
    """Return what each trial came to, by how many epochs all had done, and the best so far."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    lines = best_so_far(outcome.trials, outcome.metric)
    at = {moment: count for count, moment, _ in lines}
    for state, colour, label in (("stopped", STOPPED, "stopped early"), ("finished", TRAINING, "all epochs")):
        trials = [trial for trial in outcome.ranked if (trial.state == "finished") == (state == "finished")]
        if trials:
            places = [at[trial.epochs[-1].at_s] for trial in trials]
            axes.plot(places, _objectives(trials, outcome.metric), "o", color=colour, markersize=4, label=label)
    axes.step(
        [count for count, _, _ in lines],
        [lowest for _, _, lowest in lines],
        where="post",
        color=VALIDATION,
        label="best so far",
    )
    axes.set(xlabel="epochs of all trials", title=f"Best {_name(outcome.metric)} so far")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    _of_objective(axes, outcome)
    axes.legend(fontsize="small")
    return figure


@matplotlib.rc_context(STYLE)
def curves_figure(outcome: Outcome, epochs: int) -> Figure:
    """Return the validation of each trial over its epochs; a cross marks where it was stopped or broke."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    winner = outcome.winner
    shown = [trial for trial in outcome.trials if trial.epochs]
    for trial in sorted(shown, key=lambda trial: trial is winner):
        values = [epoch.loss if outcome.metric == "loss" else 1 - epoch.accuracy for epoch in trial.epochs]
        is_winner, is_whole = trial is winner, trial.state == "finished"
        colour = VALIDATION if is_winner else TRAINING if is_whole else STOPPED
        label = f"trial {trial.number}, the best" if is_winner else None
        width, alpha = (2.2, 1.0) if is_winner else (1.1, 0.75)
        numbers = range(1, len(values) + 1)
        axes.plot(numbers, values, "-", color=colour, linewidth=width, alpha=alpha, label=label)
        axes.plot(len(values), values[-1], "o" if is_whole else "x", color=colour, markersize=5)
    axes.plot([], [], "-o", color=TRAINING, linewidth=1.1, markersize=5, label="all epochs")
    axes.plot([], [], "-x", color=STOPPED, linewidth=1.1, markersize=5, label="stopped early")
    axes.set(xlabel="epoch", title=f"Trials: {_name(outcome.metric)} by epoch", xlim=(0.8, epochs + 0.2))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    _of_objective(axes, outcome)
    axes.legend(fontsize="small")
    return figure


@matplotlib.rc_context(STYLE)
def importance_figure(outcome: Outcome) -> Figure:
    """Return the share of each parameter in what made good trials good."""
    names = list(outcome.importance)
    figure = Figure(figsize=(9, 0.9 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    shares = list(outcome.importance.values())
    bars = axes.barh(range(len(names)), shares, 0.65, color=TRAINING)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3, fontsize=8.5, color="#566a6d")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title="What mattered", xlim=(0, max(shares) * 1.12 or 1))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return figure


@matplotlib.rc_context(STYLE)
def parameters_figure(outcome: Outcome, space: dict[str, Range]) -> Figure:
    """Return for each parameter the values that were tried and what came of them; later trials are darker."""
    names = list(outcome.importance) or list(space)
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9, 0.3 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    trials, winner = outcome.ranked, outcome.winner
    objectives = _objectives(trials, outcome.metric)
    order = [trial.number for trial in trials]
    for axes, name in zip(grid.flat, names, strict=False):
        values: list[Any] = [trial.parameters[name] for trial in trials]
        choices = space[name].choices
        if choices is not None:
            values = [choices.index(value) for value in values]
            axes.set_xticks(range(len(choices)), [str(choice)[:12] for choice in choices], fontsize=8)
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif space[name].log:
            low, high = float(space[name].low or 0), float(space[name].high or 0)
            axes.set_xscale("log")
            axes.set(xlim=(low / 1.15, high * 1.15))
            ticks = [low, (low * high) ** 0.5, high]
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], fontsize=8)
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.scatter(values, objectives, c=order, cmap="GnBu", vmin=-max(order) / 2, s=16)
        if winner is not None:
            at = trials.index(winner)
            ring: dict[str, Any] = {"markersize": 7, "fillstyle": "none", "markeredgewidth": 2}
            axes.plot(values[at], objectives[at], "o", color=VALIDATION, **ring)
        axes.set_title(name)
        _of_objective(axes, outcome)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(_name(outcome.metric))
    return figure


def _objectives(trials: Sequence[Trial], metric: str) -> list[float]:
    return [trial.objective(metric) or 0.0 for trial in trials]


def _of_objective(axes: Axes, outcome: Outcome) -> None:
    """Let the axis show what tells trials apart, not the far-off ones."""
    values = sorted(_objectives(outcome.ranked, outcome.metric))
    if values:
        middle = values[len(values) // 2]
        top = min(values[-1], values[0] + SPREAD * max(middle - values[0], 0.02 * abs(values[0]), 1e-9))
        room = 0.08 * (top - values[0]) or 0.05 * abs(values[0]) or 0.01
        axes.set_ylim(values[0] - room, top + room)
    if outcome.metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.grid(alpha=0.6)
    axes.set_axisbelow(True)


def _name(metric: str) -> str:
    return "validation loss" if metric == "loss" else "share of wrong answers"
