"""The training loop. It takes any `torch.device`, repeats exactly for a seed, and keeps the best weights so far.

On a device at the far end of a network each read waits for everything before it, so a step only sends: one upload,
a few large ops, no read. Loss and accuracy are summed on the device and read every `REPORT_EVERY_S`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from millpond.learn.checkpoint import CheckpointError, Checkpoints
from millpond.learn.encoded import Encoded
from millpond.learn.models import TextModel
from millpond.learn.models.model import EVALUATION_FLOATS
from millpond.learn.options import COMMON, TrainingError, TrainOptions, filled, no_number, rate_at, settled
from millpond.learn.order import batches_of_like_length, epochs, padding_share, widened, width_unit
from millpond.learn.parallel import Alone
from millpond.learn.progress import REPORT_EVERY_S, Epoch, Progress, Training, loss_and_accuracy
from millpond.learn.state import State
from millpond.learn.step import Step

DEFAULTS = {
    "ngram": TrainOptions(epochs=3, batch_size=1024, learning_rate=0.01),
    "seqcnn": TrainOptions(epochs=3, batch_size=32, learning_rate=2e-3, schedule="linear", by_length=True),
    "lstm": TrainOptions(epochs=4, batch_size=64, learning_rate=2e-3),
    "encoder": TrainOptions(epochs=2, batch_size=32, learning_rate=5e-5),
}
MIN_STEPS = 16


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
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    checkpoints: Checkpoints | None = None,
    workers: Alone | None = None,
) -> Training:
    """Train `model` on `device`; it is left there, with the weights of the best epoch on validation (else the last).

    Epochs, batch size and learning rate must be set (see `complete`). Without an objective it is the cross-entropy of
    the labels. Ctrl-C ends the loop early and keeps the best so far; so does a loss that is no number, once an epoch is
    done. With `checkpoints` it goes on from the last one that is there, and ends with the weights that an unbroken
    training has (on a CPU: bit for bit). Each of several `workers` calls this with equal arguments, computes its part
    of every batch, and ends with the same weights.

    Raises:
        TrainingError: the loss was no number in the first epoch, or an option cannot be followed.
        CheckpointError: a checkpoint is of another training, or the disk is full.
    """
    options = settled(options, validates=validation is not None)
    workers = workers or Alone()
    assert options.epochs is not None
    assert options.batch_size is not None
    torch.manual_seed(seed)
    model.to(device).train()
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "float16")
    step_of = Step(model, options, device, objective.loss if objective else functional.cross_entropy)
    optimizer = step_of.optimizer
    at = State(model, optimizer, scaler, device, totals=torch.zeros(2, device=device))
    result = Training(trained_by=f"torch {torch.__version__} on {device}")
    if checkpoints is not None and (saved := checkpoints.read()):
        try:
            at.restore(*saved)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit the model: {error}. Begin anew.") from error
        result.resumed = (at.epoch, at.step)
    lengths = data.lengths
    unit = width_unit(lengths, options.batch_size, pads_texts=model.pads_texts) if step_of.captured else 1
    steps = math.ceil(len(data) / options.batch_size)
    order = epochs(lengths, options.batch_size, seed, by_length=bool(options.by_length))
    began, first = time.monotonic(), (at.epoch - 1) * steps + at.step
    try:
        for epoch, batches in enumerate(islice(order, at.epoch - 1, options.epochs), at.epoch):
            at.epoch = epoch
            started = reported = time.monotonic()
            seen = sum(map(len, batches[: at.step]))
            seen_before = seen
            recent: list[tuple[int, float, Tensor]] = []  # step, rate and loss of what has not been read yet
            for step in range(at.step, steps):
                at.step = step
                if checkpoints is not None and checkpoints.is_due():
                    checkpoints.write(at.position(at.seconds + time.monotonic() - started), at.tensors())
                rate = rate_at((epoch - 1) * steps + step, options.epochs * steps, options)
                step_of.set_rate(rate)
                part = workers.share(batches[step])
                chosen = part.rows
                batch = torch.from_numpy(widened(model.batch(data.take(chosen)), unit)).to(device, non_blocking=True)
                target = torch.from_numpy(labels[chosen]).to(device, non_blocking=True)
                wanted = target
                if objective is not None:
                    wanted = torch.from_numpy(objective.targets[chosen]).to(device, non_blocking=True)
                logits, loss = step_of.forward(batch, wanted)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(scaler.scale(loss if part.weight == 1 else loss * part.weight))
                with torch.no_grad():
                    right = (logits.argmax(1) == target)[: part.counted].sum()
                    sums = torch.stack([loss * part.counted, right.to(loss.dtype)])
                workers.combine(model, sums)
                if options.clip_norm:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm, foreach=True)
                step_of.update(scaler)
                at.totals += sums
                seen += len(batches[step])
                recent.append((step + 1, rate, loss.detach()))
                now = time.monotonic()
                if step + 1 == steps or workers.is_read_due(step, now - reported, REPORT_EVERY_S):
                    mean_loss, accuracy = _read(at, seen, recent, options)
                    recent.clear()
                    reported = now = time.monotonic()
                    texts_per_s = (seen - seen_before) / (now - started)
                    done = (epoch - 1) * steps + step + 1
                    left_s = (now - began) / (done - first) * (options.epochs * steps - done)
                    at_step = (epoch, options.epochs, step + 1, steps)
                    on_progress(Progress(*at_step, mean_loss, accuracy, texts_per_s, left_s))
            validation_loss = validation_accuracy = None
            if validation is not None:
                validation_loss, validation_accuracy = workers.first(partial(_validate, model, *validation, device))
                model.train()
            seconds = at.seconds + time.monotonic() - started
            padding = padding_share(lengths, batches, unit) if model.pads_texts else 0.0
            of_validation = (validation_loss, validation_accuracy)
            at.epochs.append(Epoch(epoch, mean_loss, accuracy, *of_validation, seconds, rate, padding))
            on_epoch(at.epochs[-1])
            # Without validation the last epoch is the best there is to know of.
            if validation_loss is None or validation_loss < at.best_loss:
                at.best, at.best_weights = epoch, _copy(model) if epoch < options.epochs else None
                at.best_loss = math.inf if validation_loss is None else validation_loss
            if options.patience and epoch - at.best >= options.patience:
                result.ended = "early"
                break
            at.epoch, at.step, at.seconds = epoch + 1, 0, 0.0
            at.totals.zero_()
    except KeyboardInterrupt:
        result.ended = "interrupted"
        if validation is None or at.best_weights is None:
            at.best, at.best_weights = 0, None
    except TrainingError as error:
        if at.best_weights is None:
            raise
        result.ended, result.error = "diverged", str(error)
    if at.best_weights is not None:
        model.load_state_dict(at.best_weights)
    result.epochs, result.best = at.epochs, at.best
    model.eval()
    return result


def complete(options: TrainOptions, architecture: str, rows: int) -> TrainOptions:
    """Return `options` with what is None filled in for a model and a number of training texts."""
    default = filled(DEFAULTS[architecture], COMMON)
    assert default.batch_size is not None
    few = msgspec.structs.replace(default, batch_size=min(default.batch_size, max(4, rows // MIN_STEPS)))
    return filled(options, few)


@torch.no_grad()
def predict(model: TextModel, data: Encoded, device: torch.device) -> NDArray[np.float32]:
    """Return the probabilities [texts, labels]; texts of like length share a batch, one read at the end."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    batches: list[Tensor] = []
    for chosen in batches_of_like_length(data.lengths, order, EVALUATION_FLOATS // model.floats_per_id):
        batch = torch.from_numpy(model.batch(data.take(chosen))).to(device, non_blocking=True)
        batches.append(model(batch, len(chosen)).softmax(1))
    answers = torch.cat(batches).float().cpu().numpy()
    result = np.empty_like(answers)
    result[order] = answers
    return result


def _validate(model: TextModel, data: Encoded, labels: NDArray[np.int64], device: torch.device) -> tuple[float, float]:
    """Return mean loss and accuracy on the validation split."""
    return loss_and_accuracy(predict(model, data, device), labels)


def _read(at: State, texts: int, recent: list[tuple[int, float, Tensor]], options: TrainOptions) -> tuple[float, float]:
    """Read the sums from the device (this waits for it) and return mean loss and accuracy.

    Raises:
        TrainingError: the loss of a recent step, or a weight after the last one, is no number.
    """
    with torch.no_grad():
        are_numbers = torch.stack([p.isfinite().all() for p in at.model.parameters()]).all()
        loss, right, sound = torch.cat([at.totals, are_numbers.to(at.totals.dtype).reshape(1)]).tolist()
    if math.isfinite(loss) and sound:
        return loss / texts, right / texts
    losses = torch.stack([loss for _, _, loss in recent]).tolist()
    raise no_number(losses, [(step, rate) for step, rate, _ in recent], at.epoch, options)


def _copy(model: TextModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
