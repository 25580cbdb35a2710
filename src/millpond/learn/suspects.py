"""Labels that are likely wrong, by confident learning: a model that has not seen a text is sure of another label.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70, 2021. The
probabilities are those of the n-gram model, each text's from a model trained on the other folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from millpond.learn.datasets import Dataset, Split
from millpond.learn.encoded import Encoded
from millpond.learn.models import build, options_of
from millpond.learn.options import TrainOptions
from millpond.learn.texts import numbered
from millpond.learn.train import complete, predict, train

FOLDS = 5
MOST_ROWS = 50_000
"""Rows looked at, at most; of more, a sample."""
OPTIONS = {"max_ngram": 2, "buckets": 2**18}
EPOCHS, FEW_ROWS = 2, 4000
"""Times through the rows; more often where there are fewer than so many, at most 10 times."""


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A row of a split whose label is likely wrong: indices of its label and of the one that the model is sure of."""

    row: int
    label: int
    suggested: int
    probability: float
    """Of the suggested label."""
    of_label: float
    """Of the label that it has."""


@dataclass(frozen=True)
class Suspicion:
    """What confident learning found: the suspects, the most suspicious first, and how labels are mixed up."""

    rows: int
    suspects: list[Suspect]
    accuracy: float
    """Share of the rows to which the models give the label that they have."""
    joint: NDArray[np.float64]
    """[labels, labels]: estimated share of rows with the first label that truly have the second."""


def find_suspects(
    dataset: Dataset, rows: NDArray[np.int64], on_fold: Callable[[int, int], None] = lambda done, total: None
) -> Suspicion:
    """Look for wrong labels among the training rows `rows`, on the CPU."""
    split = dataset.train.take(rows)
    probability = out_of_fold(split, len(dataset.labels), on_fold)
    joint, suggested = confident_joint(probability, split.labels)
    at = np.arange(len(split))
    margin = probability[at, split.labels] - probability[at, suggested]
    wrong = np.flatnonzero(suggested != split.labels)
    suspects = [
        Suspect(
            row=int(rows[i]),
            label=int(split.labels[i]),
            suggested=int(suggested[i]),
            probability=round(float(probability[i, suggested[i]]), 4),
            of_label=round(float(probability[i, split.labels[i]]), 4),
        )
        for i in wrong[np.argsort(margin[wrong], kind="stable")].tolist()
    ]
    accuracy = float((probability.argmax(1) == split.labels).mean())
    return Suspicion(len(split), suspects, accuracy, joint)


def out_of_fold(split: Split, labels: int, on_fold: Callable[[int, int], None]) -> NDArray[np.float32]:
    """Return probabilities [rows, labels], each row's from a model that has not seen its text."""
    number, first = numbered(split.texts.keys)
    fold = (np.random.default_rng(0).permutation(len(first)) % FOLDS)[number]  # repeated texts share a fold
    on_fold(0, FOLDS + 1)
    options = options_of("ngram", OPTIONS)
    encoder = options.learn_encoder(split.texts)
    encoded = Encoded.of(encoder, split.texts)
    probability = np.full((len(split), labels), 1 / labels, np.float32)
    device = torch.device("cpu")
    for held in range(FOLDS):
        on_fold(held + 1, FOLDS + 1)
        learned, asked = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        if not len(asked) or not len(learned):
            continue
        torch.manual_seed(held)
        model = build("ngram", options, encoder.rows, labels)
        data, truth = encoded.take(learned), split.labels[learned]
        model.prepare(data, truth)
        how = TrainOptions(epochs=max(EPOCHS, min(10, FEW_ROWS // len(data))))
        train(model, data, truth, None, complete(how, "ngram", len(data)), device, seed=held)
        probability[asked] = predict(model, encoded.take(asked), device)
    on_fold(FOLDS + 1, FOLDS + 1)
    return probability


def confident_joint(
    probability: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the estimated joint [label given, true label] of all rows, and each row's suggested label.

    A row counts for the likeliest label whose probability is at least the mean of those that have it (the paper's
    equations 1 to 3); where there is none, it keeps its own.
    """
    count = probability.shape[1]
    given = np.bincount(labels, minlength=count)
    own = np.bincount(labels, probability[np.arange(len(labels)), labels], minlength=count)
    threshold = np.where(given > 0, own / np.maximum(given, 1), np.inf)
    confident = np.where(probability >= threshold, probability, -1.0)
    suggested = np.where(confident.max(1) >= 0, confident.argmax(1), labels)
    counts = np.bincount(labels * count + suggested, minlength=count * count).reshape(count, count).astype(np.float64)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1) * given[:, None]
    return share / max(1, given.sum()), suggested
