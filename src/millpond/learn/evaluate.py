"""How good answers are: accuracy, F1, confusion, calibration, the worst mistakes. Plain NumPy, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millpond.learn.datasets import Split
from millpond.schema import PairedCount

CALIBRATION_BINS = 15
LENGTH_BINS = 8
SHOWN_CHARACTERS = 500


class ClassScore(msgspec.Struct, frozen=True, kw_only=True):
    """How one label fared."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


class CalibrationBin(msgspec.Struct, frozen=True, kw_only=True):
    """Answers of like confidence: how many, how sure they were, how often they were right."""

    rows: int
    confidence: float
    accuracy: float


class LengthBin(msgspec.Struct, frozen=True, kw_only=True):
    """Texts of like length, in characters: how many, and how often the answers were right."""

    shortest: int
    longest: int
    rows: int
    accuracy: float


class SourceScore(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one source: how many, and how often the answers were right."""

    name: str
    rows: int
    accuracy: float


class Mistake(msgspec.Struct, frozen=True, kw_only=True):
    """A wrong answer: `row` is its place in the split, `probability` what the model gave its answer."""

    row: int
    text: str
    label: str
    predicted: str
    probability: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured on one split; `confusion[i][j]` counts texts of label i answered with label j."""

    rows: int
    accuracy: float
    macro_f1: float
    log_loss: float
    calibration_error: float
    labels: list[str]
    classes: list[ClassScore]
    confusion: list[list[int]]
    calibration: list[CalibrationBin]
    by_length: list[LengthBin]
    by_source: list[SourceScore]
    """The largest first."""
    worst: list[Mistake]

    @property
    def metrics(self) -> dict[str, float]:
        """Return the single numbers, as a model's config carries them."""
        return {
            "accuracy": round(self.accuracy, 6),
            "macro_f1": round(self.macro_f1, 6),
            "log_loss": round(self.log_loss, 6),
            "calibration_error": round(self.calibration_error, 6),
        }


def evaluate(probability: NDArray[np.float32], split: Split, labels: Sequence[str], worst: int = 20) -> Evaluation:
    """Compare probabilities [texts, labels] with the truth."""
    truth, answer = split.labels, probability.argmax(1)
    count = len(labels)
    confusion = np.bincount(truth * count + answer, minlength=count * count).reshape(count, count)
    hit, of_truth, of_answer = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = _ratio(hit, of_answer), _ratio(hit, of_truth)
    f1 = _ratio(2 * hit, of_truth + of_answer)
    confidence = probability.max(1)
    bins = calibration_bins(probability, truth)
    wrong = np.flatnonzero(answer != truth)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:worst]
    return Evaluation(
        rows=len(truth),
        accuracy=float((answer == truth).mean()),
        macro_f1=float(f1[of_truth > 0].mean()),
        log_loss=log_loss(probability, truth),
        calibration_error=calibration_error(bins),
        labels=list(labels),
        classes=[
            ClassScore(label=name, rows=int(n), precision=float(p), recall=float(r), f1=float(f))
            for name, n, p, r, f in zip(labels, of_truth, precision, recall, f1, strict=True)
        ],
        confusion=confusion.tolist(),
        calibration=bins,
        by_length=_by_length(split.texts, answer == truth),
        by_source=_by_source(split, answer == truth),
        worst=[
            Mistake(
                row=int(i),
                text=split.texts[i][:SHOWN_CHARACTERS],
                label=labels[truth[i]],
                predicted=labels[answer[i]],
                probability=round(float(confidence[i]), 6),
            )
            for i in wrong
        ],
    )


def paired(candidate: NDArray[np.bool_], champion: NDArray[np.bool_] | None) -> PairedCount:
    """Count who was right on the same rows; without a champion, the candidate alone."""
    if champion is None:
        champion = np.zeros_like(candidate)
    return PairedCount(
        rows=len(candidate),
        both_right=int((candidate & champion).sum()),
        only_champion_right=int((~candidate & champion).sum()),
        only_candidate_right=int((candidate & ~champion).sum()),
    )


def paired_by_source(
    split: Split, candidate: NDArray[np.bool_], champion: NDArray[np.bool_] | None
) -> dict[str, PairedCount]:
    """Count, for each source of the rows, who was right on them."""
    rows = {name: split.sources == number for number, name in enumerate(split.source_names)}
    return {
        name: paired(candidate[of], None if champion is None else champion[of]) for name, of in rows.items() if of.any()
    }


def log_loss(probability: NDArray[np.floating[Any]], truth: NDArray[np.int64]) -> float:
    """Return the mean negative logarithm of what the true labels were given, in nats."""
    return float(-np.log(np.maximum(probability[np.arange(len(truth)), truth], 1e-12)).mean())


def calibration_bins(probability: NDArray[np.floating[Any]], truth: NDArray[np.int64]) -> list[CalibrationBin]:
    """Group answers into bins of equal width in confidence; bins without answers are left out."""
    confidence = probability.max(1).astype(np.float64)
    which = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    rows = np.bincount(which, minlength=CALIBRATION_BINS)
    sure, hits = np.bincount(which, confidence), np.bincount(which, probability.argmax(1) == truth)
    return [
        CalibrationBin(rows=int(rows[i]), confidence=float(sure[i] / rows[i]), accuracy=float(hits[i] / rows[i]))
        for i in np.flatnonzero(rows)
    ]


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error (Naeini et al. 2015): the mean gap of confidence and accuracy."""
    return sum(b.rows * abs(b.confidence - b.accuracy) for b in bins) / sum(b.rows for b in bins)


def _by_length(texts: Sequence[str], right: NDArray[np.bool_]) -> list[LengthBin]:
    """Group answers by the length of their texts into bins of about as many rows each."""
    length = np.fromiter(map(len, texts), np.int64, len(texts))
    edges = np.unique(np.quantile(length, np.linspace(0, 1, LENGTH_BINS + 1)[1:], method="higher"))
    which = np.searchsorted(edges, length)
    return [
        LengthBin(
            shortest=int(length[inside].min()),
            longest=int(length[inside].max()),
            rows=int(inside.sum()),
            accuracy=float(right[inside].mean()),
        )
        for inside in (which == i for i in np.unique(which))
    ]


def _by_source(split: Split, right: NDArray[np.bool_]) -> list[SourceScore]:
    count = len(split.source_names)
    rows, hits = np.bincount(split.sources, minlength=count), np.bincount(split.sources, right, count)
    return [
        SourceScore(name=split.source_names[i], rows=int(rows[i]), accuracy=float(hits[i] / rows[i]))
        for i in np.argsort(-rows, kind="stable")
        if rows[i]
    ]


def wilson(share: float, rows: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval that holds the true share with 95 % (Wilson 1927)."""
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (share * (1 - share) / rows + z * z / (4 * rows * rows)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
