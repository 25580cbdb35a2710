"""Trains small models captured and not, under a lease, and prints what each came to as JSON. Run by a test."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millpond.learn.checkpoint import Checkpoints, Fingerprint
from millpond.learn.encoded import Encoded
from millpond.learn.models import build, options_of
from millpond.learn.options import TrainOptions
from millpond.learn.train import train

TEXTS, EPOCHS, STEPS = 104, 3, 7
MODELS: dict[str, dict[str, Any]] = {
    "ngram": {"buckets": 1000, "min_count": 1},
    # Without dropout of embeddings: how much is drawn for that follows from the width of the batch.
    "seqcnn": {"min_count": 1, "embedding": 8, "filters": 8, "embedding_dropout": 0.0},
    "lstm": {"min_count": 1, "embedding": 4, "width": 4, "hidden": 4, "max_words": 8, "dropout": 0.1},
}


class Killed(BaseException):
    """In the place of a SIGKILL: nothing of ours handles it."""


def losses(architecture: str, *, checkpoints: Checkpoints | None = None, **given: Any) -> tuple[list[float], list[int]]:
    """Return the loss of each epoch, and how many runs of a graph each took."""
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


def resumed(place: Path) -> tuple[list[float], list[int]]:
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    session = torch.pool.session()  # type: ignore[attr-defined]
    issue = session.issue

    def counted(item: Any, what: Any = "") -> None:
        counts[type(item).__name__] += 1
        issue(item, what)

    session.issue = counted
    result: dict[str, Any] = {}
    for name in MODELS:
        result[name] = [losses(name, compile=compiled) for compiled in (False, True)]
    result["clipped"] = [losses("seqcnn", compile=compiled, clip_norm=0.1) for compiled in (False, True)]
    low = {"precision": "bfloat16"}
    result["bfloat16"] = [losses("seqcnn", compile=compiled, **low) for compiled in (False, True)]
    result["default"] = [losses("ngram"), losses("ngram", compile=False)]
    with tempfile.TemporaryDirectory() as directory:
        result["resumed"] = [losses("seqcnn", compile=True), resumed(Path(directory))]
    print(json.dumps(result))
