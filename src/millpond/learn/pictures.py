"""Pictures of a run, drawn without a screen: training curves, confusion, calibration, accuracy by length."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from millpond.learn.calibrate import Scaling
from millpond.learn.evaluate import CalibrationBin, Evaluation, wilson
from millpond.learn.mllog import RunLog
from millpond.learn.progress import Epoch

TRAINING, VALIDATION = "#0e6870", "#c8553d"
COLOURS = (TRAINING, VALIDATION, "#8a6fb0", "#c9a227", "#4f7942", "#566a6d")
NAMED_LABELS = 20
"""Labels whose names and numbers fit into a matrix."""
TICK_CHARACTERS = 18
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters: small, sharp, and in the page's own fonts
    "svg.hashsalt": "millpond",
    "font.family": ["sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9fb0b2",
    "axes.labelcolor": "#566a6d",
    "axes.titlecolor": "#132325",
    "xtick.color": "#566a6d",
    "ytick.color": "#566a6d",
    "grid.color": "#d5dfdf",
    "legend.frameon": False,
}


@matplotlib.rc_context(STYLE)
def training_figure(epochs: Sequence[Epoch], best: int = 0) -> Figure:
    """Return loss, accuracy and learning rate over the epochs, the best epoch marked."""
    figure = _figure(9, 2.9)
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=[1, 1, 0.7])
    numbers = [epoch.epoch for epoch in epochs]
    held = [epoch for epoch in epochs if epoch.validation_loss is not None]
    at = [epoch.epoch for epoch in held]
    marker = "o-" if len(numbers) <= 40 else "-"
    loss.plot(numbers, [epoch.loss for epoch in epochs], marker, color=TRAINING, label="training")
    accuracy.plot(numbers, [epoch.accuracy for epoch in epochs], marker, color=TRAINING, label="training")
    rate.plot(numbers, [epoch.learning_rate for epoch in epochs], marker, color="#566a6d")
    if held:
        losses = [epoch.validation_loss or 0.0 for epoch in held]
        shares = [epoch.validation_accuracy or 0.0 for epoch in held]
        loss.plot(at, losses, marker, color=VALIDATION, label="validation")
        accuracy.plot(at, shares, marker, color=VALIDATION, label="validation")
    for axes, name in ((loss, "Loss (nats)"), (accuracy, "Accuracy"), (rate, "Learning rate")):
        axes.set(xlabel="epoch", title=name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.grid(alpha=0.6)
        if best and held:
            axes.axvline(best, color=VALIDATION, linewidth=1, linestyle=":", label=f"best: epoch {best}")
    loss.legend(fontsize="small")
    loss.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


@matplotlib.rc_context(STYLE)
def confusion_figure(evaluation: Evaluation) -> Figure:
    """Return which label was answered with which."""
    few = len(evaluation.labels) <= 4
    figure = _figure(*((4.4, 3.4) if few else (6.5, 5.5)))
    _draw_confusion(figure.subplots(), evaluation)
    return figure


@matplotlib.rc_context(STYLE)
def calibration_figure(evaluation: Evaluation, scaling: Scaling | None = None) -> Figure:
    """Return how often answers of each confidence were right; after temperature scaling too, if there is one."""
    figure = _figure(4.4, 3.4)
    axes = figure.subplots()
    _draw_calibration(axes, evaluation, "as exported")
    if scaling is not None:
        _plot_bins(axes, scaling.calibration, VALIDATION, f"temperature {scaling.temperature:.2f}")
    axes.legend(fontsize="small", loc="lower right")
    return figure


@matplotlib.rc_context(STYLE)
def length_figure(evaluation: Evaluation) -> Figure:
    """Return the accuracy on texts of each length, with the range that chance allows (Wilson, 95 %)."""
    figure = _figure(9, 2.6)
    axes = figure.subplots()
    bins = evaluation.by_length
    places = range(len(bins))
    ranges = [wilson(b.accuracy, b.rows) for b in bins]
    below = [max(0.0, b.accuracy - low) for b, (low, _) in zip(bins, ranges, strict=True)]
    above = [max(0.0, high - b.accuracy) for b, (_, high) in zip(bins, ranges, strict=True)]
    axes.errorbar(places, [b.accuracy for b in bins], (below, above), fmt="o", color=TRAINING, capsize=3)
    axes.axhline(evaluation.accuracy, color=VALIDATION, linewidth=1, linestyle=":")
    axes.annotate(
        " all texts",
        (1, evaluation.accuracy),
        xycoords=("axes fraction", "data"),
        va="center",
        color=VALIDATION,
        fontsize=8.5,
    )
    axes.set_xticks(places, [f"{b.shortest:,}–{b.longest:,}\n{b.rows:,} texts" for b in bins], fontsize=8)
    axes.set(xlabel="length in characters", title="Accuracy by length", xlim=(-0.5, len(bins) - 0.5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", alpha=0.6)
    return figure


@matplotlib.rc_context(STYLE)
def target_figure(runs: Mapping[str, Sequence[RunLog]], target: float) -> Figure:
    """Return the accuracy of each run over the time since its start, by what was run, and the target."""
    figure = _figure(9, 3.6)
    axes = figure.subplots()
    for colour, (name, logs) in zip(cycle(COLOURS), runs.items(), strict=False):
        for log in logs:
            at, shares = [epoch.at_s for epoch in log.epochs], [epoch.accuracy for epoch in log.epochs]
            axes.plot(at, shares, "o-", color=colour, markersize=4, linewidth=1, alpha=0.8)
        axes.plot([], [], "o-", color=colour, markersize=4, label=f"{name} ({len(logs)} runs)")
    axes.axhline(target, color="#132325", linewidth=1, linestyle=":", label=f"target {target:.1%}")
    axes.set(xlabel="seconds since the start of the run", title="Accuracy on the test split after each epoch")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.6)
    axes.margins(y=0.12)
    axes.legend(fontsize="small", loc="best")
    return figure


def draw_training(epochs: Sequence[Epoch], to: Path, best: int = 0) -> None:
    """Draw loss, accuracy and learning rate over the epochs into a PNG file."""
    save(training_figure(epochs, best), to)


@matplotlib.rc_context(STYLE)
def draw_evaluation(evaluation: Evaluation, to: Path) -> None:
    """Draw confusion and calibration into a PNG file."""
    figure = _figure(9, 4.2)
    confusion, calibration = figure.subplots(1, 2)
    _draw_confusion(confusion, evaluation)
    _draw_calibration(calibration, evaluation, "")
    save(figure, to)


def save(figure: Figure, to: Path) -> None:
    """Write a figure as PNG."""
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(STYLE):
        figure.savefig(to, dpi=120)


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element to stand in a page."""
    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _draw_confusion(axes: Axes, evaluation: Evaluation) -> None:
    counts = evaluation.confusion
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    draw_matrix(axes, shares, evaluation.labels, [[f"{count:,}" for count in row] for row in counts])
    axes.set(title="Confusion", xlabel="answered", ylabel="truth")


def draw_matrix(
    axes: Axes, shares: Sequence[Sequence[float]], labels: Sequence[str], numbers: Sequence[Sequence[str]]
) -> None:
    """Draw shares of rows (0 to 1) of label by label, with names and numbers where they fit."""
    axes.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
    if len(labels) <= NAMED_LABELS:
        places, names = range(len(labels)), [tick(label) for label in labels]
        axes.set_xticks(places, names, rotation=45 if len(labels) > 4 else 0)
        axes.set_yticks(places, names)
        for i in places:
            for j in places:
                colour = "white" if shares[i][j] > 0.6 else "#132325"
                axes.text(j, i, numbers[i][j], ha="center", va="center", color=colour)


def tick(label: str) -> str:
    """Return a label that fits beside a picture, whatever is in it: a dollar sign would begin a formula."""
    cut = label if len(label) <= TICK_CHARACTERS else f"{label[: TICK_CHARACTERS - 1]}…"
    return re.sub(r"[^\w\s.,:;!?'\"()&/+*#@%$…-]", "·", cut).replace("$", r"\$")


def _draw_calibration(axes: Axes, evaluation: Evaluation, label: str) -> None:
    axes.plot([0, 1], [0, 1], "--", color="#9fb0b2", linewidth=1)
    _plot_bins(axes, evaluation.calibration, TRAINING, label)
    title = "Calibration" if label else f"Calibration (expected error {evaluation.calibration_error:.3f})"
    low = 1 / len(evaluation.labels)
    axes.set(title=title, xlabel="confidence", ylabel="right", xlim=(low, 1.01), ylim=(0, 1.02))
    axes.grid(alpha=0.6)


def _plot_bins(axes: Axes, bins: Sequence[CalibrationBin], colour: str, label: str) -> None:
    axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o-", color=colour, label=label, markersize=4)
