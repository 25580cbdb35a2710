"""The training loop in Paddle: `millpond.learn.train` step for step, on the same batches at the same learning rates.

Each step seeds Paddle's random numbers by its own number: a training that goes on needs no generator's state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import paddle
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from paddle import nn
from paddle.nn import functional

from millpond import MillpondError
from millpond.learn.encoded import Encoded
from millpond.learn.options import TrainingError, TrainOptions, no_number, rate_at
from millpond.learn.order import batches_of_like_length, epochs, padding_share
from millpond.learn.paddle.messages import (
    CHECKPOINT,
    TRAINED,
    WEIGHTS,
    Done,
    EpochDone,
    Job,
    Message,
    Saved,
    Started,
    Stepped,
    check_rows,
    read_rows,
)
from millpond.learn.paddle.models import build, load, weights_of
from millpond.learn.progress import (
    REPORT_EVERY_S,
    Ending,
    Epoch,
    Position,
    Progress,
    Standing,
    below,
    loss_and_accuracy,
)

Arrays = dict[str, NDArray[np.float32]]


@dataclass
class State(Standing):
    """The loop's variables."""

    model: nn.Layer
    optimizer: paddle.optimizer.Adam
    totals: paddle.Tensor
    """Loss and right answers, summed over the texts of this epoch, on the device."""
    best_weights: Arrays | None = None

    def position(self, seconds: float) -> Position:
        """Return the plain values; `seconds` is what the epoch has taken so far."""
        return self.position_on(paddle.get_device(), seconds, {})

    def tensors(self) -> Arrays:
        """Return the tensors by name: weights, best weights, optimizer, sums."""
        tensors: Arrays = {"totals": self.totals.numpy()}
        tensors |= {f"model.{name}": array for name, array in weights_of(self.model).items()}
        tensors |= {f"best.{name}": array for name, array in (self.best_weights or {}).items()}
        # Paddle numbers its tensors in the order they are made, so another process has the same names.
        return tensors | {
            f"optimizer.{name}": value.numpy()
            for name, value in self.optimizer.state_dict().items()
            if isinstance(value, paddle.Tensor)
        }

    def restore(self, position: Position, tensors: Arrays) -> None:
        """Go back to where `position` and `tensors` were taken.

        Raises:
            KeyError, ValueError: they are not those of this model.
        """
        load(self.model, below("model.", tensors))
        moments = below("optimizer.", tensors)
        self.optimizer.set_state_dict({name: paddle.to_tensor(array) for name, array in moments.items()})
        self.totals.set_value(tensors["totals"])
        self.best_weights = below("best.", tensors) or None
        self.go_back(position)


def train(job: Job, work: Path, send: Callable[[Message], None], is_stopped: Callable[[], bool]) -> Done:
    """Do the job in `work`, tell of it by `send`, and leave the weights there; `is_stopped` is asked before each batch.

    Raises:
        TrainingError: the loss was no number in the first epoch, or an option cannot be followed.
        MillpondError: the disk is full.
    """
    options = job.training
    assert options.epochs is not None
    assert options.batch_size is not None
    device = pick_device(job.device)
    if options.precision != "float32" and device == "cpu":
        raise TrainingError(
            f"Paddle computes in {options.precision} on GPUs only, and this is its CPU. Leave --precision out."
        )
    paddle.set_device(device)
    send(Started(paddle.__version__, device))
    try:
        weights = safetensors.numpy.load_file(work / WEIGHTS)
        data, labels = read_rows(work, "train")
        validation = read_rows(work, "validation") if job.validates else None
        words, classes = len(weights["embedding.weight"]), len(weights["linear.weight"])
        for rows in (data, labels), *([validation] if validation else []):
            check_rows(*rows, words, classes)
        model = build(job.architecture, weights, job.dropout, job.embedding_dropout)
    except (OSError, ValueError, KeyError, IndexError, safetensors.SafetensorError) as error:
        raise TrainingError(f"what Paddle is to train on cannot be used: {error}") from error
    clip = nn.ClipGradByGlobalNorm(options.clip_norm) if options.clip_norm else None
    optimizer = paddle.optimizer.Adam(rate_at(0, 1, options), parameters=model.parameters(), grad_clip=clip)
    at = State(model, optimizer, paddle.zeros([2]))
    if job.position is not None:
        try:
            at.restore(job.position, safetensors.numpy.load_file(work / CHECKPOINT))
        except (KeyError, ValueError) as error:
            raise TrainingError(f"the checkpoint does not fit the model: {error}. Begin anew.") from error
        (work / CHECKPOINT).unlink()

    def go_on() -> None:
        if is_stopped():
            raise KeyboardInterrupt

    lengths = data.lengths
    steps = math.ceil(len(data) / options.batch_size)
    order = epochs(lengths, options.batch_size, job.seed, by_length=bool(options.by_length))
    began, first, saved = time.monotonic(), (at.epoch - 1) * steps + at.step, time.monotonic()
    ended: Ending = "finished"
    error_text = ""
    try:
        for epoch, batches in enumerate(islice(order, at.epoch - 1, options.epochs), at.epoch):
            at.epoch = epoch
            started = reported = time.monotonic()
            seen = sum(map(len, batches[: at.step]))
            seen_before = seen
            recent: list[tuple[int, float, paddle.Tensor]] = []  # step, rate and loss of what has not been read yet
            model.train()
            for step in range(at.step, steps):
                go_on()
                at.step = step
                done = (epoch - 1) * steps + step
                is_due = job.checkpoint_s > 0 and time.monotonic() - saved >= job.checkpoint_s
                if is_due and not (work / CHECKPOINT).exists():  # else the parent has not read the last one yet
                    _save(work / CHECKPOINT, at.tensors())
                    send(Saved(at.position(at.seconds + time.monotonic() - started)))
                    saved = time.monotonic()
                paddle.seed(_seed_at(job.seed, done))
                rate = rate_at(done, options.epochs * steps, options)
                optimizer.set_lr(rate)
                chosen = batches[step]
                target = paddle.to_tensor(np.ascontiguousarray(labels[chosen]))
                logits, loss = _forward(model, data.take(chosen), target, options)
                loss.backward()
                optimizer.step()
                optimizer.clear_grad()
                with paddle.no_grad():
                    right = (logits.argmax(1) == target).astype("float32").sum()
                    at.totals += paddle.stack([loss * len(chosen), right])
                seen += len(chosen)
                recent.append((step + 1, rate, loss.detach()))
                now = time.monotonic()
                if step + 1 == steps or now - reported > REPORT_EVERY_S:
                    mean_loss, accuracy = _read(at, seen, recent, options)
                    recent.clear()
                    reported = now = time.monotonic()
                    texts_per_s = (seen - seen_before) / (now - started)
                    left_s = (now - began) / (done + 1 - first) * (options.epochs * steps - done - 1)
                    at_step = (epoch, options.epochs, step + 1, steps)
                    send(Stepped(Progress(*at_step, mean_loss, accuracy, texts_per_s, left_s)))
            validation_loss = validation_accuracy = None
            if validation is not None:
                validation_loss, validation_accuracy = _validate(model, *validation, job.max_ids, go_on)
            seconds = at.seconds + time.monotonic() - started
            of_validation = (validation_loss, validation_accuracy)
            padding = padding_share(lengths, batches)
            at.epochs.append(Epoch(epoch, mean_loss, accuracy, *of_validation, seconds, rate, padding))
            send(EpochDone(at.epochs[-1]))
            # Without validation the last epoch is the best there is to know of.
            if validation_loss is None or validation_loss < at.best_loss:
                at.best, at.best_weights = epoch, weights_of(model) if epoch < options.epochs else None
                at.best_loss = math.inf if validation_loss is None else validation_loss
            if options.patience and epoch - at.best >= options.patience:
                ended = "early"
                break
            at.epoch, at.step, at.seconds = epoch + 1, 0, 0.0
            at.totals.zero_()
    except KeyboardInterrupt:
        ended = "interrupted"
        if validation is None or at.best_weights is None:
            at.best, at.best_weights = 0, None
    except TrainingError as error:
        if at.best_weights is None:
            raise
        ended, error_text = "diverged", str(error)
    _save(work / TRAINED, at.best_weights or weights_of(model))
    return Done(at.best, ended, error_text)


def pick_device(name: str) -> str:
    """Return Paddle's name of a device; `auto` is the GPU if this Paddle can use one, else the CPU.

    Raises:
        TrainingError: a GPU is asked for and there is none, or this Paddle is made without CUDA.
    """
    kind, _, number = name.partition(":")
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if kind == "cpu" or (kind == "auto" and not gpus):
        return "cpu"
    if not paddle.is_compiled_with_cuda():
        raise TrainingError(
            f"Paddle {paddle.__version__} is installed without CUDA and cannot train on {name}. Train with --device "
            "cpu, or name the Python of an environment with paddlepaddle-gpu: MILLPOND_LEARN_PADDLE_PYTHON."
        )
    if int(number or 0) >= gpus:
        raise TrainingError(f"there is no {name}: Paddle sees {gpus} GPUs. Train with --device cpu, or on a GPU host.")
    return f"gpu:{number or 0}"


def predict(model: nn.Layer, data: Encoded, max_ids: int, go_on: Callable[[], None]) -> NDArray[np.float32]:
    """Return the probabilities [texts, labels]; texts of like length share a batch of at most `max_ids` ids."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    batches = []
    with paddle.no_grad():
        for chosen in batches_of_like_length(data.lengths, order, max_ids):
            go_on()
            logits = model(paddle.to_tensor(data.take(chosen).padded()))
            batches.append(functional.softmax(logits, 1).numpy())
    answers = np.concatenate(batches)
    result: NDArray[np.float32] = np.empty_like(answers)
    result[order] = answers
    return result


def _forward(
    model: nn.Layer, texts: Encoded, target: paddle.Tensor, options: TrainOptions
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return logits and mean loss of a batch, in the precision asked for."""
    with paddle.amp.auto_cast(enable=options.precision == "bfloat16", dtype="bfloat16"):
        logits = model(paddle.to_tensor(texts.padded()))
    logits = logits.astype("float32")
    return logits, functional.cross_entropy(logits, target)


def _validate(
    model: nn.Layer, data: Encoded, labels: NDArray[np.int64], max_ids: int, go_on: Callable[[], None]
) -> tuple[float, float]:
    """Return mean loss and accuracy on the validation split."""
    return loss_and_accuracy(predict(model, data, max_ids, go_on), labels)


def _read(
    at: State, texts: int, recent: list[tuple[int, float, paddle.Tensor]], options: TrainOptions
) -> tuple[float, float]:
    """Read the sums from the device and return mean loss and accuracy.

    Raises:
        TrainingError: the loss of a recent step, or a weight after the last one, is no number.
    """
    with paddle.no_grad():
        are_numbers = paddle.stack([p.isfinite().all() for p in at.model.parameters()]).all()
    (loss, right), sound = at.totals.tolist(), bool(are_numbers)
    if math.isfinite(loss) and sound:
        return loss / texts, right / texts
    losses = paddle.stack([loss for _, _, loss in recent]).tolist()
    raise no_number(losses, [(step, rate) for step, rate, _ in recent], at.epoch, options)


def _seed_at(seed: int, step: int) -> int:
    """Return the seed of one step's random numbers: another for each, and for each seed of the training."""
    return int(np.random.SeedSequence((abs(seed), step)).generate_state(1, np.uint64)[0] >> 1)


def _save(path: Path, tensors: Arrays) -> None:
    temporary = path.with_name(f".{path.name}")
    plain = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    try:
        safetensors.numpy.save_file(plain, temporary)
        temporary.rename(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MillpondError(f"weights cannot be written into {path.parent}: {error}. Make room there.") from error
