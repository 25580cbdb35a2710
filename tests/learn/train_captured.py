"""Trains small models captured and not, under a lease, and prints what each came to as JSON. Run by a test.

    train_captured.py DIRECTORY CASE…

DIRECTORY has a pretrained encoder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from millpond.learn.checkpoint import Checkpoints, Fingerprint
from millpond.learn.encoded import Encoded
from millpond.learn.models import build, options_of
from millpond.learn.options import TrainOptions
from millpond.learn.train import train
from millpond.pool import capture

TEXTS, EPOCHS, STEPS = 104, 3, 7
MODELS: dict[str, dict[str, Any]] = {
    "ngram": {"buckets": 1000, "min_count": 1},
    # Without dropout of embeddings: how much is drawn for that follows from the width of the batch.
    "seqcnn": {"min_count": 1, "embedding": 8, "filters": 8, "embedding_dropout": 0.0},
    "lstm": {"min_count": 1, "embedding": 4, "width": 4, "hidden": 4, "max_words": 8, "dropout": 0.1},
}


Trained = tuple[list[float], list[int]]
"""The loss of each epoch, and how many runs of a graph each took."""


class Killed(BaseException):
    """In the place of a SIGKILL: nothing of ours handles it."""


def losses(architecture: str, *, checkpoints: Checkpoints | None = None, **given: Any) -> Trained:
    """Train a model on texts made up here."""
    rng = np.random.default_rng(0)
    labels = np.arange(TEXTS) % 2
    texts = [" ".join(f"w{w}" for w in rng.integers(20 * n, 20 * n + 30, rng.integers(5, 40))) for n in labels]
    options = options_of(architecture, MODELS[architecture])
    encoder = options.learn_encoder(texts)
    torch.manual_seed(0)
    model, data = build(architecture, options, encoder.rows, 2), Encoded.of(encoder, texts)
    model.prepare(data, labels)
    how = {"epochs": EPOCHS, "batch_size": 16, "learning_rate": 0.01, "schedule": "linear", "by_length": True}
    runs: list[int] = []
    counts.clear()

    def on_epoch(_: object) -> None:
        runs.append(counts["Run"])
        counts.clear()

    pool = torch.device("pool")
    how_given = TrainOptions(**(how | given))
    done = train(model, data, labels, None, how_given, pool, seed=0, on_epoch=on_epoch, checkpoints=checkpoints)
    return [epoch.loss for epoch in done.epochs], runs


def resumed(place: Path) -> Trained:
    """Be killed in the second epoch, and go on from there."""

    def at(step: int) -> Checkpoints:
        steps = iter(range(1, 1000))
        checkpoints = Checkpoints(place, Fingerprint(recipe={}, train="", validation=None), every_s=0)
        checkpoints.is_due = lambda: next(steps) == step  # type: ignore[method-assign]
        return checkpoints

    dying = at(STEPS + 3)
    write = dying.write

    def write_and_die(*arguments: Any) -> None:
        write(*arguments)
        raise Killed

    dying.write = write_and_die  # type: ignore[method-assign]
    try:
        losses("seqcnn", compile=True, checkpoints=dying)
    except Killed:
        return losses("seqcnn", compile=True, checkpoints=at(0))
    raise AssertionError("it was not killed")


def encoder(directory: str) -> dict[str, Any]:
    """Return options without the dropout within, which draws by the width of a batch."""
    config = json.loads(Path(directory, "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {"pretrained": directory, "config": json.dumps(config), "max_words": 48, "dropout": 0.0}


def not_compilable(*_: object) -> None:
    """In the place of the pool's backend: a graph that it cannot make."""
    raise RuntimeError("no graph today")


def both(architecture: str, **given: Any) -> list[Trained]:
    """Train op by op, and captured."""
    return [losses(architecture, compile=compiled, **given) for compiled in (False, True)]


def interrupted() -> list[Trained]:
    """Train captured, as one and with a break."""
    with tempfile.TemporaryDirectory() as directory:
        return [losses("seqcnn", compile=True), resumed(Path(directory))]


def failing() -> list[Trained]:
    """Train op by op, and captured where that fails."""
    eager = losses("seqcnn", compile=False)
    with mock.patch.object(capture, "compile_graph", not_compilable):
        return [eager, losses("seqcnn", compile=True)]


CASES: dict[str, Callable[[], list[Trained]]] = {
    "ngram": lambda: both("ngram"),
    "seqcnn": lambda: both("seqcnn"),
    "lstm": lambda: both("lstm"),
    "encoder": lambda: both("encoder", learning_rate=1e-3),
    "clipped": lambda: both("seqcnn", clip_norm=0.1),
    "bfloat16": lambda: both("seqcnn", precision="bfloat16"),
    "default": lambda: [losses("ngram", compile=False), losses("ngram")],
    "resumed": interrupted,
    "failing": failing,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    MODELS["encoder"] = encoder(sys.argv[1])
    counts: Counter[str] = Counter()
    session = torch.pool.session()  # type: ignore[attr-defined]
    issue = session.issue

    def counted(item: Any, what: Any = "") -> None:
        counts[type(item).__name__] += 1
        issue(item, what)

    session.issue = counted
    print(json.dumps({name: CASES[name]() for name in sys.argv[2:]}))
