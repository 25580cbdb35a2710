"""From the rows of a recipe to a trained model on its device. The command line and the job both call this."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from millpond.learn.checkpoint import Checkpoints, Fingerprint
from millpond.learn.datasets import Dataset, Split, split_digest
from millpond.learn.distil import prepare_lesson
from millpond.learn.encoded import Encoded
from millpond.learn.models import ModelOptions, TextModel, build, options_of
from millpond.learn.options import TrainingError, TrainOptions
from millpond.learn.paddle.messages import missing
from millpond.learn.paddle.parent import train_in_paddle
from millpond.learn.paddle.place import Hire, Place
from millpond.learn.progress import Epoch, Progress, Training
from millpond.learn.recipes import Recipe, hold_back
from millpond.learn.train import complete, predict, train
from millpond.registry import DataSource
from millpond.schema import JobProgress
from millpond.settings import LearnSettings, default_home
from millpond.text import TextEncoder

Report = Callable[[JobProgress], None]
"""Told where a run is: the command line draws a bar, a job appends to progress.jsonl."""
Encode = Callable[[ModelOptions, Split, Split | None], tuple[TextEncoder, Encoded, Encoded | None]]
"""As `encode_splits`; trials of a search share what it returns."""


@dataclass
class Stopwatch:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)


@dataclass
class Trained:
    """A trained model, on its device."""

    model: TextModel
    encoder: TextEncoder
    options: ModelOptions
    how: TrainOptions
    """The recipe's, with what the model and the amount of data gave."""
    training: Training
    train_rows: int
    held: Split | None
    """The rows that the best epoch was chosen on."""
    device: torch.device
    sources: list[DataSource] = field(default_factory=list)
    """What it learned from besides the recipe's rows: a teacher, unlabelled texts."""


def pick_device(name: str) -> torch.device:
    """Return the device to train on; `auto` is the accelerator, a pool's lease included, or else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def place_of(recipe: Recipe, settings: LearnSettings, device: str, elsewhere: Hire | None = None) -> Place:
    """Return where Paddle trains, if the recipe wants that; it is looked for before any work is done.

    Raises:
        TrainingError: it is not installed, or cannot use the device.
    """
    place = Place(device, settings.paddle_python or Path(sys.executable), elsewhere)
    if recipe.training.framework != "paddle" or elsewhere is not None:
        return place
    if (chosen := pick_device(device)).type not in ("cpu", "cuda"):
        raise TrainingError(
            f"Paddle cannot use {chosen}, which only torch sees. Train as a job of the pool, with --lease and without "
            "millpond pool run (docs/how-to/train-with-paddle.md); or in torch; or on this host with --device cpu."
        )
    if settings.paddle_python is None and find_spec("paddle") is None:
        raise TrainingError(missing(sys.executable, "there is no module paddle"))
    return place


def encode_splits(
    options: ModelOptions, learned: Split, held: Split | None
) -> tuple[TextEncoder, Encoded, Encoded | None]:
    """Return what turns texts into ids, learned from the rows to learn from, and the ids of both splits."""
    encoder = options.learn_encoder(learned.texts)
    return encoder, Encoded.of(encoder, learned.texts), Encoded.of(encoder, held.texts) if held else None


def fit(
    recipe: Recipe,
    dataset: Dataset,
    used: Split,
    device: torch.device,
    report: Report,
    watch: Stopwatch,
    *,
    home: Path | None = None,
    place: Place = Place(),  # noqa: B008 (frozen)
    keep: Callable[[Fingerprint], Checkpoints] | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    workers: int = 1,
    encode: Encode = encode_splits,
) -> Trained:
    """Train the recipe's model on the rows `used`; `keep` says where the checkpoints of this training are.

    A teacher's answers are kept in `home` (None: Millpond's own). Of several `workers` each has a GPU of this machine,
    or all share the processor where that is the device. `place` is where Paddle trains, if it is to.

    Raises:
        DataError: the recipe's teacher or unlabelled texts cannot be used.
        TrainingError: training cannot go on.
        CheckpointError: a checkpoint is of another training, or cannot be written.
    """
    architecture = recipe.model.architecture
    options = options_of(architecture, recipe.model.options)
    learned, held = hold_back(recipe, dataset, used)
    lesson = None
    if recipe.distil is not None:
        with watch.stage("teach"):
            report(JobProgress(stage="data", note=f"asking the teacher {recipe.distil.teacher}"))
            lesson = prepare_lesson(recipe.distil, dataset, learned, held, device, home or default_home())
            learned = lesson.split
    with watch.stage("encode"):
        report(JobProgress(stage="data", note=f"encoding {len(learned):,} texts"))
        encoder, encoded, of_held = encode(options, learned, held)
        validation = (of_held, held.labels) if held and of_held else None
        how = complete(recipe.training, architecture, len(learned))
        checkpoints = keep(_fingerprint(recipe, options, how, learned, held)) if keep else None
    with watch.stage("train"):
        torch.manual_seed(recipe.seed)
        model = build(architecture, options, encoder.rows, len(dataset.labels))
        model.prepare(encoded, learned.labels)

        def on_progress(at: Progress) -> None:
            done, total = (at.epoch - 1) * at.steps + at.step, at.epochs * at.steps
            note = f"epoch {at.epoch}/{at.epochs}, {at.texts_per_s:,.0f} texts/s, {_span(at.left_s)} left"
            report(JobProgress(stage="train", done=done, total=total, loss=at.loss, accuracy=at.accuracy, note=note))

        if how.framework == "paddle":
            training = train_in_paddle(
                model,
                encoded,
                learned.labels,
                validation,
                how,
                place=place,
                architecture=architecture,
                model_options=options,
                seed=recipe.seed,
                on_progress=on_progress,
                on_epoch=on_epoch,
                checkpoints=checkpoints,
            )
            # Paddle may have had a GPU that this torch has not.
            device = torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device
            model.to(device)
        else:
            training = (train if workers == 1 else partial(_workers(), workers))(
                model,
                encoded,
                learned.labels,
                validation,
                how,
                device,
                seed=recipe.seed,
                objective=lesson.objective if lesson else None,
                on_progress=on_progress,
                on_epoch=on_epoch,
                checkpoints=checkpoints,
            )
    taught = sum(source.rows for source in lesson.sources if source.role == "unlabelled") if lesson else 0
    sources = lesson.sources if lesson else []
    return Trained(model, encoder, options, how, training, len(learned) - taught, held, device, sources)


def _workers() -> Callable[..., Training]:
    from millpond.learn.workers import train_on_workers  # Ray's: only where it is asked for

    return train_on_workers


def _fingerprint(
    recipe: Recipe, options: ModelOptions, how: TrainOptions, learned: Split, held: Split | None
) -> Fingerprint:
    """Return what a checkpoint is held against; where the data lies does not matter, only what it is."""
    table = msgspec.to_builtins(recipe)
    del table["data"], table["tune"]
    table["model"]["options"] = msgspec.to_builtins(options)
    table["training"] = msgspec.to_builtins(how)
    return Fingerprint(recipe=table, train=split_digest(learned), validation=split_digest(held) if held else None)


def _span(seconds: float) -> str:
    """Return a time for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def answer(model: TextModel, encoder: TextEncoder, texts: Sequence[str], device: torch.device) -> NDArray[np.float32]:
    """Return the probabilities [texts, labels] of texts."""
    return predict(model, Encoded.of(encoder, texts), device)
