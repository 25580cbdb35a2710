"""The parent's side of training in Paddle: write the job, start the child, pass on what it tells, take its weights."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray

import millpond
from millpond.learn.checkpoint import Checkpoints, is_checkpointed
from millpond.learn.encoded import Encoded
from millpond.learn.models import ModelOptions, TextModel
from millpond.learn.models.model import EVALUATION_FLOATS
from millpond.learn.options import TrainingError, TrainOptions, settled
from millpond.learn.paddle.messages import (
    CHECKPOINT,
    JOB,
    MAX_LINE_BYTES,
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
from millpond.learn.progress import Epoch, Progress, Training

STOP_S = 60.0
"""Seconds in which the child must have ended after Ctrl-C: the batch it is at, and writing the weights."""
END_S = 10.0
"""Seconds in which the child must have ended after its last line."""
TAIL_CHARACTERS = 600
"""How much of what a child that died has printed last is shown."""


@dataclass(frozen=True)
class Place:
    """Where Paddle trains, as it was asked for."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    python: Path = Path(sys.executable)
    """The Python that has Paddle."""


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
    job = Job(
        version=millpond.__version__,
        parent=os.getpid(),
        architecture=architecture,  # type: ignore[arg-type]
        dropout=getattr(model_options, "dropout", 0.0),
        embedding_dropout=getattr(model_options, "embedding_dropout", 0.0),
        training=options,
        seed=seed,
        device=place.device,
        validates=validation is not None,
        max_ids=max(1, EVALUATION_FLOATS // model.floats_per_id),
        checkpoint_s=checkpoints.every_s if checkpoints is not None else 0.0,
        position=saved[0] if saved else None,
    )
    result = Training()
    if saved:
        result.epochs, result.resumed = list(saved[0].epochs), (saved[0].epoch, saved[0].step)
    with _work(checkpoints) as work:
        try:
            safetensors.torch.save_file(model.weights(), work / WEIGHTS)
            write_rows(work, "train", data, labels)
            if validation is not None:
                write_rows(work, "validation", *validation)
            if saved:
                safetensors.torch.save_file(saved[1], work / CHECKPOINT)
            (work / JOB).write_bytes(msgspec.json.encode(job))
        except (OSError, safetensors.SafetensorError) as error:
            raise TrainingError(
                f"what Paddle is to train on cannot be written into {work}: {error}. Make room."
            ) from error

        def take(message: Message) -> Done | None:
            """Pass on what a line says; return the last one."""
            match message:
                case Started(version, device):
                    result.trained_by = f"PaddlePaddle {version} on {device}"
                case Stepped(progress):
                    on_progress(progress)
                case EpochDone(epoch):
                    result.epochs.append(epoch)
                    on_epoch(epoch)
                case Saved(position):
                    assert checkpoints is not None  # else it is told to save none
                    checkpoints.write(position, safetensors.torch.load_file(work / CHECKPOINT))
                    (work / CHECKPOINT).unlink()
                case Failed(error):
                    raise TrainingError(error)
                case Done():
                    return message
            return None

        with _child(place.python, work) as child:
            try:
                done = _last(child, place.python, work, take)
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
                with _limit(child, STOP_S):
                    done = _last(child, place.python, work, take)
        model.load_weights(safetensors.torch.load_file(work / TRAINED))
    result.best, result.ended, result.error = done.best, done.ended, done.error
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


@contextlib.contextmanager
def _child(python: Path, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child; it is gone afterwards, however this ends.

    It is not in the terminal's process group: Ctrl-C is for the parent, which asks the child to stop.
    """
    threads = str(torch.get_num_threads())
    environ = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [str(python), "-P", "-m", "millpond.learn.paddle", str(work)]
    with (work / "stderr.txt").open("wb") as stderr:
        try:
            child = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, process_group=0
            )
        except OSError as error:
            raise TrainingError(
                f"{python} cannot be started: {error}. MILLPOND_LEARN_PADDLE_PYTHON names the Python that has Paddle; "
                "unset it if it is this one."
            ) from error
    try:
        yield child
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_S)
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def _last(child: subprocess.Popen[bytes], python: Path, work: Path, take: Callable[[Message], Done | None]) -> Done:
    """Pass on the child's lines until the last one, and return that. It waits as long as the child lives.

    Raises:
        TrainingError: it died, or what it says is not understood.
    """
    assert child.stdout is not None
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Message)
    while line := child.stdout.readline(MAX_LINE_BYTES):
        try:
            message = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise TrainingError(f"the process that trains in Paddle says what is not understood: {error}") from error
        if (done := take(message)) is not None:
            return done
    status = child.wait()
    how = f"ended with exit status {status}"
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
    if status == -signal.SIGKILL:
        how += " (memory may have run out; a smaller --batch-size needs less)"
    printed = (work / "stderr.txt").read_text(errors="replace").strip()[-TAIL_CHARACTERS:]
    said = f" It printed last: {printed}" if printed else ""
    resume = " With --resume it goes on from its last checkpoint." if is_checkpointed(work.parent) else ""
    raise TrainingError(f"the process that trains in Paddle ({python}) {how}.{resume}{said}")


@contextlib.contextmanager
def _limit(child: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
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
