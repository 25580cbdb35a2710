"""The parent's side of training in Paddle: write the job, start the child, pass on what it tells, take its weights.

The child may be on another machine (`place`), so what it says is checked as what comes from one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import safetensors
import safetensors.torch
from numpy.typing import NDArray

import millpond
from millpond import MillpondError
from millpond.learn.checkpoint import Checkpoints, is_checkpointed
from millpond.learn.encoded import Encoded
from millpond.learn.models import ModelOptions, TextModel
from millpond.learn.models.model import EVALUATION_FLOATS
from millpond.learn.options import TrainingError, TrainOptions, settled
from millpond.learn.paddle.messages import (
    CHECKPOINT,
    JOB,
    TRAINED,
    WEIGHTS,
    Architecture,
    Done,
    EpochDone,
    Failed,
    Job,
    Message,
    Saved,
    Started,
    Stepped,
    write_rows,
)
from millpond.learn.paddle.place import Child, Place
from millpond.learn.progress import Epoch, Progress, Training
from millpond.terminal import plain

STOP_S = 60.0
"""Seconds in which the child must have ended after Ctrl-C: the batch it is at, and writing the weights."""
SIZES_OF_WEIGHTS = 8
"""Most that a file of the child's may have: weights, best ones, two moments and sums are in a checkpoint."""


def train_in_paddle(
    model: TextModel,
    data: Encoded,
    labels: NDArray[np.int64],
    validation: tuple[Encoded, NDArray[np.int64]] | None,
    options: TrainOptions,
    *,
    place: Place,
    architecture: str,
    model_options: ModelOptions,
    seed: int,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    checkpoints: Checkpoints | None = None,
) -> Training:
    """Train `model` in Paddle, from the weights it has; it ends on the CPU, as `millpond.learn.train.train` leaves it.

    Raises:
        TrainingError: the loss was no number in the first epoch, Paddle is not there, cannot do what is asked, or its
            process died.
        CheckpointError: a checkpoint is of another training, or the disk is full.
    """
    if architecture not in get_args(Architecture):
        raise TrainingError(f"{architecture} cannot be trained in Paddle; {' and '.join(get_args(Architecture))} can.")
    options = settled(options, validates=validation is not None)
    saved = checkpoints.read() if checkpoints is not None else None
    job = partial(
        Job,
        version=millpond.__version__,
        parent=os.getpid(),
        architecture=architecture,  # type: ignore[arg-type]
        dropout=getattr(model_options, "dropout", 0.0),
        embedding_dropout=getattr(model_options, "embedding_dropout", 0.0),
        training=options,
        seed=seed,
        validates=validation is not None,
        max_ids=max(1, EVALUATION_FLOATS // model.floats_per_id),
        checkpoint_s=checkpoints.every_s if checkpoints is not None else 0.0,
        position=saved[0] if saved else None,
    )
    result = Training()
    if saved:
        result.epochs, result.resumed = list(saved[0].epochs), (saved[0].epoch, saved[0].step)
    with _work(checkpoints) as work, place.child(work) as child:
        try:
            safetensors.torch.save_file(model.weights(), work / WEIGHTS)
            write_rows(work, "train", data, labels)
            if validation is not None:
                write_rows(work, "validation", *validation)
            if saved:
                safetensors.torch.save_file(saved[1], work / CHECKPOINT)
            (work / JOB).write_bytes(msgspec.json.encode(job(device=child.device)))
            most_bytes = SIZES_OF_WEIGHTS * (work / WEIGHTS).stat().st_size + 2**20
        except (OSError, safetensors.SafetensorError) as error:
            raise TrainingError(
                f"what Paddle is to train on cannot be written into {work}: {error}. Make room."
            ) from error

        def fetch(name: str) -> Path:
            try:
                return child.fetch(name, most_bytes)
            except MillpondError as error:
                raise TrainingError(_with_hint(str(error), work)) from error

        def take(message: Message) -> Done | None:
            """Pass on what a line says; return the last one."""
            match message:
                case Started(version, device):
                    on = f"{child.where} ({device})" if child.where else device
                    result.trained_by = plain(f"PaddlePaddle {version} on {on}"[:200])
                case Stepped(progress):
                    on_progress(progress)
                case EpochDone(epoch):
                    result.epochs.append(epoch)
                    on_epoch(epoch)
                case Saved(position):
                    if checkpoints is None:
                        raise TrainingError("the process that trains in Paddle saves what it was not asked for")
                    checkpoints.write(position, safetensors.torch.load_file(fetch(CHECKPOINT)))
                    child.drop(CHECKPOINT)
                case Failed(error):
                    raise TrainingError(plain(error))
                case Done():
                    return message
            return None

        child.start()
        try:
            done = _last(child, work, take)
        except KeyboardInterrupt:
            child.stop()
            with _limit(child, STOP_S):
                done = _last(child, work, take)
        try:
            model.load_weights(safetensors.torch.load_file(fetch(TRAINED)))
        except (OSError, safetensors.SafetensorError, KeyError, RuntimeError) as error:
            raise TrainingError(f"the weights that Paddle has trained cannot be read: {error}") from error
    result.best, result.ended, result.error = done.best, done.ended, plain(done.error)
    model.eval()
    return result


@contextlib.contextmanager
def _work(checkpoints: Checkpoints | None) -> Iterator[Path]:
    """Make a directory for the two to share, beside the checkpoints; what a kill -9 has left there is deleted."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory(prefix="millpond-paddle-") as temporary:
            yield Path(temporary)
        return
    beside = checkpoints.directory
    made = [path for path in (beside, beside.parent) if not path.exists()]
    try:
        beside.mkdir(parents=True, exist_ok=True)
        for left in beside.glob("paddle-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="paddle-", dir=beside) as temporary:
            yield Path(temporary)
    finally:
        with contextlib.suppress(OSError):  # there are checkpoints in it
            for path in made:
                path.rmdir()


def _last(child: Child, work: Path, take: Callable[[Message], Done | None]) -> Done:
    """Pass on the child's lines until the last one, and return that. It waits as long as the child lives.

    Raises:
        TrainingError: it died, or what it says is not understood.
    """
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Message)
    while line := child.readline():
        try:
            message = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise TrainingError(f"the process that trains in Paddle says what is not understood: {error}") from error
        if (done := take(message)) is not None:
            return done
    raise TrainingError(_with_hint(child.why_ended(), work))


def _with_hint(why: str, work: Path) -> str:
    """Return why it cannot go on, and how it yet can."""
    resume = " With --resume it goes on from its last checkpoint." if is_checkpointed(work.parent) else ""
    return f"{why.rstrip('.')}.{resume}"


@contextlib.contextmanager
def _limit(child: Child, seconds: float) -> Iterator[None]:
    """Kill the child if this takes longer.

    Raises:
        TrainingError: it was killed.
    """
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        child.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    except TrainingError as error:
        if is_late.is_set():
            raise TrainingError(
                f"the process that trains in Paddle did not stop within {seconds:g} s of Ctrl-C and was killed: there "
                "is no model of it. With --resume it goes on from its last checkpoint, if it has one."
            ) from error
        raise
    finally:
        timer.cancel()
        timer.join()
