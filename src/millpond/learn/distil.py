"""Distillation: a student learns a teacher's answers besides the labels, on unlabelled texts too.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015. The teacher answers each text once;
its answers are kept under the digest of teacher and texts. No text of the test or validation split is taught.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.learn.datasets import MAX_TEXT_CHARACTERS, DataError, Dataset, Split, split_digest
from millpond.learn.encoded import Encoded
from millpond.learn.export import read_model
from millpond.learn.recipes import DistilTable
from millpond.learn.sources import Columns, rows_of, shown
from millpond.learn.train import Objective, predict
from millpond.registry import DataSource

TEACHER_FILES = ("config.json", "tokenizer.json", "weights.safetensors")


@dataclass(frozen=True)
class Lesson:
    """What a student trains on: the labelled texts, then the unlabelled ones with the teacher's answer as label."""

    split: Split
    objective: Objective
    sources: list[DataSource]


def distillation(
    labels: NDArray[np.int64], answers: NDArray[np.float32], weight: NDArray[np.float32], temperature: float
) -> Objective:
    """Return the objective (1 - w) × the cross-entropy of the label + w × T² × that of the teacher.

    `answers` are the teacher's probabilities [texts, labels], `weight` [texts] is w. T² keeps both gradients of one
    size whatever the temperature (section 2.1 of the paper).
    """
    # Log-probabilities are logits but for a constant, which a softmax does not see.
    softened = torch.from_numpy(np.log(np.maximum(answers, 1e-12)) / temperature).softmax(1).numpy()
    of_label = np.eye(answers.shape[1], dtype=np.float32)[labels] * (1 - weight[:, None])
    of_teacher = softened * weight[:, None] * temperature**2

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        wanted, softly = targets.chunk(2, 1)
        both = wanted * logits.log_softmax(1) + softly * (logits / temperature).log_softmax(1)
        return -both.sum(1).mean()

    return Objective(np.concatenate([of_label, of_teacher], 1).astype(np.float32), loss)


def prepare_lesson(
    table: DistilTable, dataset: Dataset, learned: Split, held: Split | None, device: torch.device, home: Path
) -> Lesson:
    """Have the teacher answer the texts to train on; what it answered before is read from `home`/taught.

    Raises:
        DataError: the unlabelled texts cannot be read, or the teacher does not know the labels.
        ExportError: the teacher is no model that can be loaded.
    """
    measured = {*dataset.test.texts, *(held.texts if held else ())}
    extra: list[str] = []
    if table.unlabelled is not None:
        known = measured | set(learned.texts)
        found = dict.fromkeys(_unlabelled(table.unlabelled, table.text, table.unlabelled_rows))
        extra = [text for text in found if text not in known]
    texts = [*learned.texts, *extra]
    directory = Path(table.teacher)
    directory = directory / "model" if (directory / "model").is_dir() else directory
    digest = _digest(directory)
    name, answers = _answers(directory, digest, texts, dataset.labels, device, home / "taught")
    hard = np.concatenate([learned.labels, answers[len(learned) :].argmax(1)])
    weight = np.ones(len(texts), np.float32)
    weight[: len(learned)] = table.weight
    sources = [DataSource(name=name, digest=f"sha256:{digest}", rows=len(texts), role="teacher")]
    if extra:
        taught = Split(extra, hard[len(learned) :])
        name = PurePosixPath(shown(table.unlabelled or "")).stem
        sources.append(
            DataSource(name=name, digest=f"sha256:{split_digest(taught)}", rows=len(extra), role="unlabelled")
        )
    return Lesson(Split(texts, hard), distillation(hard, answers, weight, table.temperature), sources)


def _unlabelled(source: str, column: str, most: int | None) -> list[str]:
    """Return the texts of a source, with labels or without; empty and too long ones are left out."""
    found = (text for _, text, _, _ in rows_of(source, Columns(column, column)) if isinstance(text, str))
    return list(islice((text for text in found if text.strip() and len(text) <= MAX_TEXT_CHARACTERS), most))


def _digest(directory: Path) -> str:
    """Return the sha256 (hexadecimal) of what a teacher answers by."""
    try:
        return hashlib.sha256(
            b"".join(hashlib.sha256((directory / name).read_bytes()).digest() for name in TEACHER_FILES)
        ).hexdigest()
    except OSError as error:
        raise DataError(f"the teacher {directory} is no model or run that can be read: {error}") from error


def _answers(
    directory: Path, digest: str, texts: Sequence[str], labels: Sequence[str], device: torch.device, kept: Path
) -> tuple[str, NDArray[np.float32]]:
    """Return the teacher's name and its probabilities [texts, labels]."""
    model, encoder, config = read_model(directory)
    if missing := set(labels) - set(config.labels):
        raise DataError(
            f"the teacher {directory} does not know {', '.join(sorted(missing)[:10])}; it answers "
            f"{', '.join(config.labels[:10])}. Train it on the same labels."
        )
    asked = hashlib.sha256(digest.encode())
    for text in (*labels, *texts):
        asked.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    path = kept / f"{asked.hexdigest()}.npy"
    if path.exists():
        answers: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return config.name, answers
    found = predict(model.to(device), Encoded.of(encoder, texts), device)
    answers = np.ascontiguousarray(found[:, [config.labels.index(label) for label in labels]])
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept, prefix=".new-", delete=False) as file:
        np.save(file, answers, allow_pickle=False)
    Path(file.name).replace(path)
    return config.name, answers
