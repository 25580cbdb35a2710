"""The training loop. It takes any `torch.device`, repeats exactly for a seed, and keeps the best weights so far.

On a device at the far end of a network each read waits for everything before it, so a step only sends: one upload,
a few large ops, no read. Loss and accuracy are summed on the device and read every `REPORT_EVERY_S`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from millpond import MillpondError
from millpond.learn.encoded import Encoded
from millpond.learn.models import TextModel
from millpond.learn.models.model import EVALUATION_FLOATS

REPORT_EVERY_S = 0.5
"""Seconds between two reads of loss and accuracy."""


class TrainingError(MillpondError):
    """Training cannot go on; the message says why and what to change."""


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long, in which steps. What is None follows the model (`DEFAULTS`) or the amount of data."""

    epochs: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    batch_size: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Texts a step; fewer where that would give an epoch under `MIN_STEPS` steps, unless it is set."""
    learning_rate: Annotated[float, Meta(gt=0)] | None = None


DEFAULTS = {
    "ngram": TrainOptions(epochs=3, batch_size=1024, learning_rate=0.01),
    "seqcnn": TrainOptions(epochs=3, batch_size=32, learning_rate=2e-3),
    "lstm": TrainOptions(epochs=4, batch_size=64, learning_rate=2e-3),
    "encoder": TrainOptions(epochs=2, batch_size=32, learning_rate=5e-5),
}
MIN_STEPS = 16


@dataclass(frozen=True)
class Progress:
    """Where the loop is, since the start of its epoch."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    texts_per_s: float


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to; validation values are None where there is no validation split."""

    epoch: int
    loss: float
    accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float


@dataclass
class Training:
    """What the loop did: the model holds the weights of epoch `best` (1 is the first; 0: of the unfinished one)."""

    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    interrupted: bool = False


@dataclass(frozen=True)
class Objective:
    """What is to be learned where that is more than the labels."""

    targets: NDArray[np.float32]
    """A row for each text."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """From logits [texts, labels] and rows of `targets` to the number to lower."""


def train(
    model: TextModel,
    data: Encoded,
    labels: NDArray[np.int64],
    validation: tuple[Encoded, NDArray[np.int64]] | None,
    options: TrainOptions,
    device: torch.device,
    *,
    seed: int,
    objective: Objective | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Training:
    """Train `model` on `device`; it is left there, with the weights of the best epoch on validation (else the last).

    `options` must be complete (see `complete`). Without an objective it is the cross-entropy of the labels. Ctrl-C ends
    the loop early and keeps the best so far.

    Raises:
        TrainingError: the loss is no longer a number.
    """
    assert options.epochs is not None
    assert options.batch_size is not None
    assert options.learning_rate is not None
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model.to(device).train()
    steps = math.ceil(len(data) / options.batch_size)
    loss_of = objective.loss if objective else functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, foreach=True)
    result = Training()
    best_loss, best_weights = math.inf, None
    try:
        for epoch in range(1, options.epochs + 1):
            started = reported = time.monotonic()
            order = rng.permutation(len(data))
            totals = torch.zeros(2, device=device)  # loss and right answers, summed over the epoch's texts
            for step in range(steps):
                chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
                batch = torch.from_numpy(model.batch(data.take(chosen))).to(device, non_blocking=True)
                target = torch.from_numpy(labels[chosen]).to(device, non_blocking=True)
                logits = model(batch, len(chosen))
                wanted = target
                if objective is not None:
                    wanted = torch.from_numpy(objective.targets[chosen]).to(device, non_blocking=True)
                loss = loss_of(logits, wanted)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                with torch.no_grad():
                    right = (logits.argmax(1) == target).sum()
                    totals += torch.stack([loss * len(chosen), right.to(loss.dtype)])
                if step + 1 == steps or time.monotonic() - reported > REPORT_EVERY_S:
                    reported = time.monotonic()
                    seen = step * options.batch_size + len(chosen)
                    mean_loss, accuracy = _read(totals, seen)
                    rate = seen / (time.monotonic() - started)
                    on_progress(Progress(epoch, options.epochs, step + 1, steps, mean_loss, accuracy, rate))
            validation_loss = validation_accuracy = None
            if validation is not None:
                validation_loss, validation_accuracy = _validate(model, *validation, device)
            seconds = time.monotonic() - started
            result.epochs.append(Epoch(epoch, mean_loss, accuracy, validation_loss, validation_accuracy, seconds))
            # Without validation the last epoch is the best there is to know of.
            if validation_loss is None or validation_loss < best_loss:
                result.best = epoch
                if validation_loss is not None and epoch < options.epochs:
                    best_loss, best_weights = validation_loss, _copy(model)
                else:
                    best_weights = None
    except KeyboardInterrupt:
        result.interrupted = True
        result.best = 0 if best_weights is None else result.best
    if best_weights is not None:
        model.load_state_dict(best_weights)
    model.eval()
    return result


def complete(options: TrainOptions, architecture: str, rows: int) -> TrainOptions:
    """Return `options` with what is None filled in for a model and a number of training texts."""
    default = DEFAULTS[architecture]
    assert default.batch_size is not None
    few = max(4, rows // MIN_STEPS)
    return TrainOptions(
        epochs=default.epochs if options.epochs is None else options.epochs,
        batch_size=min(default.batch_size, few) if options.batch_size is None else options.batch_size,
        learning_rate=default.learning_rate if options.learning_rate is None else options.learning_rate,
    )


@torch.no_grad()
def predict(model: TextModel, data: Encoded, device: torch.device) -> NDArray[np.float32]:
    """Return the probabilities [texts, labels]; texts of like length share a batch, one read at the end."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    batches: list[Tensor] = []
    for chosen in _batches_by_length(data.lengths, order, EVALUATION_FLOATS // model.floats_per_id):
        batch = torch.from_numpy(model.batch(data.take(chosen))).to(device, non_blocking=True)
        batches.append(model(batch, len(chosen)).softmax(1))
    answers = torch.cat(batches).float().cpu().numpy()
    result = np.empty_like(answers)
    result[order] = answers
    return result


def _batches_by_length(lengths: NDArray[np.int64], order: NDArray[np.int64], max_ids: int) -> list[NDArray[np.int64]]:
    """Cut `order` (by rising length) into batches of at most `max_ids` ids, padding included; a text is never cut."""
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > max_ids:
            batches.append(order[start:end])
            start = end
    return batches


def _validate(model: TextModel, data: Encoded, labels: NDArray[np.int64], device: torch.device) -> tuple[float, float]:
    """Return mean loss and accuracy on the validation split, and go back to training."""
    probability = predict(model, data, device)
    model.train()
    of_truth = probability[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(of_truth, 1e-30)).mean()), float((probability.argmax(1) == labels).mean())


def _read(totals: Tensor, texts: int) -> tuple[float, float]:
    """Read the sums from the device (this waits for it) and return mean loss and accuracy."""
    loss, right = totals.tolist()
    if not math.isfinite(loss):
        raise TrainingError(
            "the loss is no longer a number: the steps were too large. Lower the learning rate (--learning-rate)."
        )
    return loss / texts, right / texts


def _copy(model: TextModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
