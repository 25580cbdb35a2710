"""A run by hand: from a recipe to a directory with the model, its metrics, its worst mistakes and its report."""

from __future__ import annotations

import datetime
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from millpond import MillpondError
from millpond.learn.calibrate import Scaling, scaled
from millpond.learn.checkpoint import CheckpointError, Checkpoints, clear, dotted, is_checkpointed
from millpond.learn.datasets import DataError, Dataset, Split
from millpond.learn.evaluate import Evaluation, evaluate
from millpond.learn.export import read_model, write_model
from millpond.learn.fit import Report, Stopwatch, Trained, answer, fit, pick_device, place_of
from millpond.learn.options import TrainingError
from millpond.learn.paddle.place import Hire
from millpond.learn.recipes import Recipe, load_data, shown_recipe, used_rows
from millpond.learn.tracking import Tracker
from millpond.registry import DataSource, Lineage
from millpond.schema import JobProgress
from millpond.settings import LearnSettings

CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """What a run by hand came to; its files are in `directory`, the model in `directory`/model."""

    directory: Path
    name: str
    started: datetime.datetime
    recipe: Recipe
    dataset: Dataset
    trained: Trained
    evaluation: Evaluation
    scaling: Scaling | None
    """What temperature scaling would do to the test scores; None without validation rows."""
    watch: Stopwatch
    workers: int = 1
    """How many shared its steps."""

    def options(self) -> dict[str, Any]:
        """Return every option that the model depends on, by dotted name, with what was filled in."""
        table = msgspec.to_builtins(self.recipe)
        del table["data"], table["tune"]
        table["model"]["options"] = msgspec.to_builtins(self.trained.options)
        table["training"] = msgspec.to_builtins(self.trained.how)
        return dotted(table)

    def summary(self) -> dict[str, Any]:
        """Return the run in plain values, as metrics.json holds it."""
        training = self.trained.training
        return {
            "directory": str(self.directory),
            "data": {
                "name": self.dataset.name,
                "digest": self.dataset.digest,
                "source": self.dataset.source,
                "official_test": self.dataset.official_test,
                "bad_rows": self.dataset.bad_rows.count,
                "dropped_leaks": self.dataset.dropped_leaks,
                "train_rows": self.trained.train_rows,
                "test_rows": len(self.dataset.test),
            },
            "recipe": shown_recipe(self.recipe),
            "training": msgspec.to_builtins(self.trained.how),
            "device": str(self.trained.device),
            "trained_by": training.trained_by,
            "workers": self.workers,
            "epochs": [asdict(epoch) for epoch in training.epochs],
            "best_epoch": training.best,
            "ended": training.ended,
            "error": training.error,
            "resumed": training.resumed,
            "test": msgspec.to_builtins(self.evaluation) | {"worst": None},
            "scaling": msgspec.to_builtins(self.scaling),
            "seconds": self.watch.seconds,
        }


def run(
    recipe: Recipe,
    settings: LearnSettings,
    *,
    device: str,
    name: str,
    out: Path | None,
    report: Report,
    resume: bool = False,
    tracker: Tracker | None = None,
    workers: int = 1,
    elsewhere: Hire | None = None,
) -> Run:
    """Train by the recipe, read the test split once, write everything into `out`.

    With `resume` it goes on from the last checkpoint in `out`, or in the newest run that did not end. `workers` as for
    `fit`. `elsewhere` is where Paddle trains, if not on this machine.

    Raises:
        DataError: the data cannot be used, or `out` is there already.
        TrainingError: training cannot go on, or this machine has too few GPUs for the workers.
        CheckpointError: there is nothing to resume, or it is another training's, or the disk is full.
        ExportError: the exported graph does not answer as the model does.
    """
    started = datetime.datetime.now(datetime.UTC)
    directory = _directory(out, settings.home / "runs", f"{started:%Y%m%d-%H%M%S}-{recipe.model.architecture}", resume)
    set_threads(settings)
    on_device, place = pick_device(device), place_of(recipe, settings, device, elsewhere)
    if workers > 1:
        from millpond.learn.workers import check_workers

        if recipe.training.framework == "paddle":
            raise TrainingError("several workers train in torch only: leave --gpus out, or --framework paddle.")
        check_workers(workers, torch.device("cuda") if device == "auto" and on_device.type == "cpu" else on_device)
    watch = Stopwatch()
    with watch.stage("data"):
        note = f"reading {recipe.data.source}"
        report(JobProgress(stage="data", note=note))
        dataset = load_data(
            recipe,
            settings,
            on_rows=lambda count: report(JobProgress(stage="data", done=count, note=f"{note}, {count:,} rows")),
        )
        used, _ = used_rows(recipe, dataset)
    keep = partial(Checkpoints, directory / CHECKPOINTS, every_s=settings.checkpoint_s)
    if tracker is not None:
        tags = {"model": name, "data": dataset.name, "data.digest": dataset.digest, "device": str(on_device)}
        tracker.start(directory, tags)
    on_epoch = tracker.epoch if tracker is not None else lambda epoch: None
    try:
        trained = fit(
            recipe,
            dataset,
            used,
            on_device,
            report,
            watch,
            home=settings.home,
            place=place,
            keep=keep,
            on_epoch=on_epoch,
            workers=workers,
        )
    except (MillpondError, KeyboardInterrupt):
        if tracker is not None:
            tracker.fail()
        raise
    with watch.stage("evaluate"):
        report(JobProgress(stage="evaluate", note=f"answering {len(dataset.test):,} test texts"))
        probability = answer(trained.model, trained.encoder, dataset.test.texts, trained.device)
        evaluation = evaluate(probability, dataset.test, dataset.labels)
        scaling = None
        if (held := trained.held) is not None:
            of_held = answer(trained.model, trained.encoder, held.texts, trained.device)
            scaling = scaled(of_held, held.labels, probability, dataset.test.labels)
    with watch.stage("export"):
        report(JobProgress(stage="export"))
        write_model(
            directory / "model",
            trained.model,
            trained.encoder,
            architecture=recipe.model.architecture,
            options=trained.options,
            name=name,
            version="v1",
            labels=dataset.labels,
            metrics={f"test_{key}": value for key, value in evaluation.metrics.items()},
            data=[
                DataSource(name=dataset.name, digest=dataset.digest, rows=trained.train_rows, role="train"),
                DataSource(name=dataset.name, digest=dataset.digest, rows=len(dataset.test), role="test"),
                *trained.sources,
            ],
            lineage=Lineage(seed=recipe.seed, dropped_leaks=dataset.dropped_leaks),
            sample_texts=dataset.test.texts[:: max(1, len(dataset.test) // 8)],
        )
    done = Run(directory, name, started, recipe, dataset, trained, evaluation, scaling, watch, workers)
    with watch.stage("report"):
        _write_results(done)
    if tracker is not None:
        with watch.stage("track"):
            tracker.finish(done)
    if trained.training.ended != "interrupted":  # else --resume goes on from there
        clear(directory / CHECKPOINTS)
    return done


def _directory(out: Path | None, runs: Path, name: str, resume: bool) -> Path:
    """Return the directory to write into: an empty one, or with `resume` that of a run that did not end."""
    if out is None and resume:
        unfinished = [place for place in runs.glob("*") if is_checkpointed(place / CHECKPOINTS)]
        if not unfinished:
            raise CheckpointError(
                f"no run below {runs} has a checkpoint: there is nothing to resume. Leave --resume out."
            )
        return max(unfinished, key=lambda place: (place / CHECKPOINTS).stat().st_mtime)
    directory = out or runs / name
    if (shown := os.fsencode(directory).decode(errors="replace")) != str(directory):
        raise DataError(f"the name of {shown} is not UTF-8, and a run's own files name it. Give another --out.")
    if directory.exists() and any(directory.iterdir()):
        if not resume:
            hint = " Or go on with the run in it: --resume." if is_checkpointed(directory / CHECKPOINTS) else ""
            raise DataError(
                f"{directory} is not empty; a run writes into a directory of its own. Give another --out.{hint}"
            )
        if not is_checkpointed(directory / CHECKPOINTS) and [path.name for path in directory.iterdir()] != [
            CHECKPOINTS
        ]:
            raise CheckpointError(
                f"{directory} has no checkpoint: the run in it is finished, or it is none. Give another --out, "
                "without --resume."
            )
    return directory


def _write_results(run: Run) -> None:
    from millpond.learn.pictures import draw_evaluation, draw_training
    from millpond.learn.report import write_report

    training = run.trained.training
    (run.directory / "metrics.json").write_bytes(msgspec.json.format(msgspec.json.encode(run.summary())))
    _write_mistakes(run.evaluation, run.directory)
    if training.epochs:
        draw_training(training.epochs, run.directory / "training.png", training.best)
    draw_evaluation(run.evaluation, run.directory / "evaluation.png")
    write_report(run, run.directory / "report.html")


def _write_mistakes(evaluation: Evaluation, directory: Path) -> None:
    (directory / "mistakes.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(evaluation.worst))


def set_threads(settings: LearnSettings) -> None:
    """Use as many threads as the settings say."""
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)


def measure(
    directory: Path, recipe: Recipe, settings: LearnSettings, *, device: str, out: Path | None
) -> tuple[Dataset, Evaluation]:
    """Measure a model directory on the recipe's test split; write metrics, mistakes and picture into `out`.

    Raises:
        DataError: the data cannot be used, or has labels that the model does not know.
        ExportError: the directory is not a model.
    """
    from millpond.learn.pictures import draw_evaluation

    set_threads(settings)
    model, encoder, config = read_model(directory)
    dataset = load_data(recipe, settings)
    if unknown := set(dataset.labels) - set(config.labels):
        raise DataError(
            f"{dataset.name} has labels that the model does not know: {', '.join(sorted(unknown)[:10])}. "
            f"The model knows {', '.join(config.labels[:10])}."
        )
    chosen = pick_device(device)
    index = np.array([config.labels.index(label) for label in dataset.labels])
    test = dataset.test
    split = Split(test.texts, index[test.labels], test.sources, test.source_names)
    evaluation = evaluate(answer(model.to(chosen), encoder, split.texts, chosen), split, config.labels)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_bytes(msgspec.json.format(msgspec.json.encode(evaluation)))
        _write_mistakes(evaluation, out)
        draw_evaluation(evaluation, out / "evaluation.png")
    return dataset, evaluation
