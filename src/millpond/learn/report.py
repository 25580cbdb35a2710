"""The report of a run: one HTML file that needs nothing else, for people who were not there."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import millpond
from millpond.learn.evaluate import wilson
from millpond.learn.page import render
from millpond.learn.pictures import calibration_figure, confusion_figure, length_figure, svg, training_figure

if TYPE_CHECKING:
    from pathlib import Path

    from millpond.learn.progress import Epoch
    from millpond.learn.run import Run

SHOWN_CLASSES = 50
SHOWN_EPOCHS = 30
LIBRARIES = ("torch", "tokenizers", "numpy", "onnxruntime")

ENDINGS = {
    "finished": "all epochs were done",
    "early": "validation did not get better any more",
    "interrupted": "interrupted by Ctrl-C",
    "diverged": "the loss was no number any more",
}


def write_report(run: Run, to: Path) -> None:
    """Write the report of a run that is finished."""
    render("report.html", to, **_facts(run))


def _facts(run: Run) -> dict[str, Any]:
    """Return what the template shows."""
    evaluation, training, dataset = run.evaluation, run.trained.training, run.dataset
    epochs = training.epochs
    steps_s = sum(epoch.seconds for epoch in epochs)
    figures = {
        "confusion": svg(confusion_figure(evaluation)),
        "calibration": svg(calibration_figure(evaluation, run.scaling)),
        "length": svg(length_figure(evaluation)),
    }
    if epochs:
        figures["training"] = svg(training_figure(epochs, training.best))
    best = next((epoch for epoch in epochs if epoch.epoch == training.best), None)
    return {
        "name": run.name,
        "architecture": run.recipe.model.architecture,
        "dataset": dataset,
        "evaluation": evaluation,
        "classes": evaluation.classes[:SHOWN_CLASSES],
        "sources": [(source, *wilson(source.accuracy, source.rows)) for source in evaluation.by_source],
        "scaling": run.scaling,
        "epochs": _shown(epochs, training.best),
        "best": best,
        "training": training,
        "ending": ENDINGS[training.ended],
        "figures": figures,
        "splits": _splits(run),
        "speed": {
            "texts_per_s": run.trained.train_rows * len(epochs) / steps_s if steps_s else 0.0,
            "padding": sum(epoch.padding for epoch in epochs) / len(epochs) if epochs else 0.0,
            "stages": run.watch.seconds,
            "total": sum(run.watch.seconds.values()),
        },
        "lineage": _lineage(run),
        "options": list(run.options().items()),
        "files": [
            (str(path.relative_to(run.directory)), _size(path.stat().st_size))
            for path in sorted(run.directory.rglob("*"))
            if path.is_file() and path.suffix != ".html" and "checkpoints" not in path.parts
        ],
    }


def _shown(epochs: list[Epoch], best: int) -> list[Epoch]:
    """Return the epochs of the table: of many every so-manyth, the best, and the last."""
    every = -(-len(epochs) // SHOWN_EPOCHS)
    return [epoch for epoch in epochs if epoch.epoch % every == 0 or epoch.epoch in {1, best, epochs[-1].epoch}]


def _splits(run: Run) -> list[tuple[str, int, float, str]]:
    """Return (split, rows, accuracy, what it is) for each split that was measured."""
    training, trained = run.trained.training, run.trained
    found = []
    best = next((epoch for epoch in training.epochs if epoch.epoch == training.best), None)
    if best is not None:
        while_learning = "measured while it learned from them: not comparable"
        found.append(("training", trained.train_rows, best.accuracy, while_learning))
        if best.validation_accuracy is not None and trained.held is not None:
            held = "never learned from; the best epoch was chosen on it"
            found.append(("validation", len(trained.held), best.validation_accuracy, held))
    kind = "the corpus's official test split" if run.dataset.official_test else "set aside before training"
    found.append(("test", run.evaluation.rows, run.evaluation.accuracy, f"{kind}; read once"))
    return found


def _lineage(run: Run) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    resumed = run.trained.training.resumed
    workers = f", {run.workers} workers" if run.workers > 1 else ""
    return [
        ("data", f"{run.dataset.name}, from {run.dataset.source}"),
        ("data digest", run.dataset.digest),
        (
            "rows",
            f"{run.trained.train_rows:,} learned from; bad and not used: {run.dataset.bad_rows.count:,}",
        ),
        ("seed", str(run.recipe.seed)),
        ("trained by", run.trained.training.trained_by),
        ("device", f"{run.trained.device}{workers} ({platform.machine()}, {platform.system()})"),
        ("software", f"millpond {millpond.__version__}, Python {platform.python_version()}, {versions}"),
        ("started", f"{run.started:%Y-%m-%d %H:%M:%S} UTC"),
        ("resumed", f"from a checkpoint in epoch {resumed[0]}, after step {resumed[1]}" if resumed else "no"),
    ]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
