"""Pictures of a run, drawn without a screen: the training curves; confusion and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from millpond.learn.evaluate import Evaluation
from millpond.learn.state import Epoch

TRAINING, VALIDATION = "#3b6ea8", "#c8553d"
NAMED_LABELS = 20
"""Labels whose names and counts fit into the picture of the confusion."""


def draw_training(epochs: Sequence[Epoch], to: Path) -> None:
    """Draw loss and accuracy over the epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in epochs]
    loss.plot(numbers, [epoch.loss for epoch in epochs], "o-", color=TRAINING, label="training")
    accuracy.plot(numbers, [epoch.accuracy for epoch in epochs], "o-", color=TRAINING, label="training")
    held = [epoch for epoch in epochs if epoch.validation_loss is not None]
    if held:
        at = [epoch.epoch for epoch in held]
        loss.plot(at, [epoch.validation_loss or 0.0 for epoch in held], "o-", color=VALIDATION, label="validation")
        shares = [epoch.validation_accuracy or 0.0 for epoch in held]
        accuracy.plot(at, shares, "o-", color=VALIDATION, label="validation")
    for axes, name in ((loss, "loss (nats)"), (accuracy, "accuracy")):
        axes.set(xlabel="epoch", title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylim(bottom=0)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    _save(figure, to)


def draw_evaluation(evaluation: Evaluation, to: Path) -> None:
    """Draw which label was answered with which, and how often answers of each confidence were right."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    confusion, calibration = figure.subplots(1, 2)
    counts, labels = evaluation.confusion, evaluation.labels
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    confusion.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    confusion.set(title="confusion", xlabel="answered", ylabel="truth")
    if len(labels) <= NAMED_LABELS:
        places = range(len(labels))
        confusion.set_xticks(places, labels, rotation=45 if len(labels) > 4 else 0)
        confusion.set_yticks(places, labels)
        for i in places:
            for j in places:
                colour = "white" if shares[i][j] > 0.5 else "black"
                confusion.text(j, i, f"{counts[i][j]:,}", ha="center", va="center", color=colour)
    calibration.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    bins = evaluation.calibration
    calibration.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o-", color=TRAINING)
    title = f"calibration (expected error {evaluation.calibration_error:.3f})"
    calibration.set(title=title, xlabel="confidence", ylabel="right", xlim=(1 / len(labels), 1.01), ylim=(0, 1.02))
    calibration.grid(alpha=0.3)
    _save(figure, to)


def _save(figure: Figure, to: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(to, dpi=120)
