"""A training job: what the hub starts. Reads job.json, leaves a signed candidate in the registry and result.json.

Only what is finished is seen: the model is pushed before result.json is written, and that by renaming. A job that is
tried again resumes from its last checkpoint. Corrections whose text is in the test split, or held out, do not train:
those splits would no longer measure anything.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from millpond.files import replace
from millpond.learn.checkpoint import Checkpoints, clear
from millpond.learn.datasets import DataError, Dataset, Split, split_digest
from millpond.learn.evaluate import evaluate, paired, paired_by_source
from millpond.learn.export import read_model, write_model
from millpond.learn.fit import Report, Stopwatch, answer, fit, pick_device, place_of
from millpond.learn.options import TrainingError
from millpond.learn.recipes import Recipe, load_data, read_recipe, used_rows
from millpond.learn.run import set_threads
from millpond.learn.sources import read_lines
from millpond.registry import DataSource, Lineage, Store, sign
from millpond.schema import MAX_CORRECTION_BYTES, JobProgress, JobResult, JobSpec, LabelledText
from millpond.settings import LearnSettings

MAX_SPEC_BYTES = 64 * 1024
MAX_LINE_BYTES = 6 * MAX_CORRECTION_BYTES + 4096
"""Longest line of a JSONL file: a text may grow sixfold when JSON escapes it."""


class JobError(DataError):
    """A job's files cannot be used."""


def do_job(
    directory: Path, settings: LearnSettings, *, device: str = "auto", on_progress: Report = lambda at: None
) -> JobResult:
    """Do the job that `directory`/job.json describes and return what is in result.json.

    Raises:
        JobError: the job's files cannot be used.
        MillpondError: what goes wrong with the recipe, its data, training, export or registry.
    """
    set_threads(settings)
    spec = read_spec(directory)
    watch = Stopwatch()

    def report(at: JobProgress) -> None:
        with (directory / "progress.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(at) + b"\n")
        on_progress(at)

    with watch.stage("data"):
        report(JobProgress(stage="data", note="reading the corpus"))
        recipe = read_recipe(Path(spec.recipe))
        on_device, paddle = pick_device(device), place_of(recipe, settings, device)
        dataset = load_data(recipe, settings)
        corrections = _as_split(read_texts(directory / spec.corrections), dataset.labels, "corrections")
        heldout = _as_split(read_texts(directory / spec.heldout), dataset.labels, "corrections, held out")
        used, corrections = training_rows(recipe, dataset, corrections, heldout)
    place = directory / spec.checkpoints
    keep = partial(Checkpoints, place, every_s=settings.checkpoint_s, strict=False)
    trained = fit(recipe, dataset, used, on_device, report, watch, home=settings.home, place=paddle, keep=keep)
    if trained.training.interrupted:
        raise JobError("the job was interrupted; start it again.")
    if trained.training.ended == "diverged":
        raise TrainingError(trained.training.error)
    store = Store(Path(spec.registry))
    with watch.stage("evaluate"), tempfile.TemporaryDirectory(dir=directory, prefix=".champion-") as temporary:
        report(JobProgress(stage="evaluate", note=f"candidate on {len(dataset.test):,} test texts"))
        tests = len(dataset.test)
        both = dataset.test.with_rows(heldout)
        probability = answer(trained.model, trained.encoder, both.texts, trained.device)
        evaluation = evaluate(probability[:tests], dataset.test, dataset.labels)
        candidate_right = probability.argmax(1) == both.labels
        champion_right = None
        if spec.champion is not None:
            report(JobProgress(stage="evaluate", note="champion on the same texts"))
            champion = store.checkout(spec.model, spec.champion, Path(temporary) / "model")
            champion_right = _right(champion, both, dataset.labels, trained.device)
    with watch.stage("export"), tempfile.TemporaryDirectory(dir=directory, prefix=".candidate-") as temporary:
        report(JobProgress(stage="export"))
        candidate = Path(temporary) / "model"
        of_corpus = len(used) - recipe.correction_weight * len(corrections)
        data = [
            DataSource(name=dataset.name, digest=dataset.digest, rows=of_corpus, role="train"),
            DataSource(name=dataset.name, digest=dataset.digest, rows=len(dataset.test), role="test"),
            *trained.sources,
        ]
        for role, split in (("corrections", corrections), ("heldout", heldout)):
            if len(split):
                digest = f"sha256:{split_digest(split)}"
                data.append(DataSource(name=f"{spec.model}-{role}", digest=digest, rows=len(split), role=role))
        write_model(
            candidate,
            trained.model,
            trained.encoder,
            architecture=recipe.model.architecture,
            options=trained.options,
            name=spec.model,
            version=spec.version,
            labels=dataset.labels,
            metrics={f"test_{key}": value for key, value in evaluation.metrics.items()},
            data=data,
            lineage=Lineage(
                parent=spec.champion,
                corrections=len(corrections),
                seed=recipe.seed,
                dropped_leaks=dataset.dropped_leaks,
            ),
            sample_texts=dataset.test.texts[:: max(1, len(dataset.test) // 8)],
        )
        with watch.stage("register"):
            report(JobProgress(stage="register", note=spec.version))
            sign(candidate, Path(spec.private_key))
            digest = store.push(candidate).digest
    result = JobResult(
        digest=digest,
        version=spec.version,
        test=paired(candidate_right[:tests], None if champion_right is None else champion_right[:tests]),
        heldout=paired(candidate_right[tests:], None if champion_right is None else champion_right[tests:]),
        by_source=paired_by_source(both, candidate_right, champion_right),
        official_test=dataset.official_test,
        metrics=evaluation.metrics,
        seconds=watch.seconds,
    )
    replace(directory / "result.json", msgspec.json.encode(result))
    clear(place)
    return result


def read_spec(directory: Path) -> JobSpec:
    """Read job.json.

    Raises:
        JobError: it is missing, too long, or not what it must be.
    """
    path = directory / "job.json"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SPEC_BYTES + 1)
        if len(raw) > MAX_SPEC_BYTES:
            raise JobError(f"{path} is larger than {MAX_SPEC_BYTES} bytes.")
        return msgspec.json.decode(raw, type=JobSpec)
    except (OSError, msgspec.MsgspecError) as error:
        raise JobError(f"{path} is not a job: {error}. Jobs are written by the hub.") from error


def read_texts(path: Path) -> list[LabelledText]:
    """Read a JSONL file of labelled texts; a line that is wrong ends the job, as the hub has written them all.

    Raises:
        JobError: the file is missing or a line is not a labelled text.
    """
    decoder = msgspec.json.Decoder(LabelledText)
    texts = []
    number = 0
    try:
        for number, line in read_lines(path, MAX_LINE_BYTES):
            if len(line) > MAX_LINE_BYTES:
                raise JobError(f"{path} line {number} is longer than {MAX_LINE_BYTES} bytes.")
            texts.append(decoder.decode(line))
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise JobError(f"{path} line {number} is not a labelled text: {error}") from error
    return texts


def training_rows(recipe: Recipe, dataset: Dataset, corrections: Split, heldout: Split) -> tuple[Split, Split]:
    """Return the rows to train on (the recipe's, then the corrections, repeated) and the corrections among them.

    A correction outranks the corpus: rows with its text are left out.
    """
    measured = np.concatenate([dataset.test.texts.keys, heldout.texts.keys])
    fresh = (corrections.labels >= 0) & ~np.isin(corrections.texts.keys, measured)
    corrections = corrections.take(np.flatnonzero(fresh))
    corrected = np.concatenate([corrections.texts.keys, heldout.texts.keys])
    used, _ = used_rows(recipe, dataset)
    used = used.take(np.flatnonzero(~np.isin(used.texts.keys, corrected)))
    for _ in range(recipe.correction_weight):
        used = used.with_rows(corrections)
    return used, corrections


def _as_split(texts: list[LabelledText], labels: list[str], source: str) -> Split:
    """Return the texts with the index of their label, -1 where the corpus has no such label."""
    index = {label: i for i, label in enumerate(labels)}
    numbers = np.array([index.get(text.label, -1) for text in texts], np.int64)
    return Split([text.text for text in texts], numbers, source_names=(source,))


def _right(directory: Path, split: Split, labels: list[str], device: torch.device) -> NDArray[np.bool_]:
    """Return where the champion answers right; its labels may stand in another order."""
    model, encoder, config = read_model(directory)
    index = {label: i for i, label in enumerate(config.labels)}
    truth = np.array([index.get(label, -1) for label in labels] + [-1])[split.labels]  # -1 stays -1
    right: NDArray[np.bool_] = answer(model.to(device), encoder, split.texts, device).argmax(1) == truth
    return right
