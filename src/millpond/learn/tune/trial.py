"""`python -m millpond.learn.tune.trial`: train the trials that a search asks for, one after the other.

Each epoch is reported and waits for leave to go on, so that a search's cost is what it was given. Whatever goes wrong
in a trial is that trial's end, never the process's.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from millpond import MillpondError
from millpond.learn.datasets import BadRows, Dataset
from millpond.learn.fit import Stopwatch, fit, pick_device
from millpond.learn.prepared import PreparedSets
from millpond.learn.progress import Epoch
from millpond.learn.recipes import Recipe
from millpond.learn.train import complete
from millpond.learn.tune.encodings import shared_encodings
from millpond.learn.tune.space import applied
from millpond.learn.tune.trial_process import Answer, EpochDone, Go, Said, Setup, Stop, Task, TrialEnded
from millpond.process import die_with_parent

ROWS, ENCODINGS = "rows", "encodings"
"""Directories in that of the search, which go when it ends."""
KEEP_BYTES = 2**62
"""A search keeps its rows to the end, however many they are."""


class _Stopped(BaseException):
    """The search has seen enough of this trial, or is gone."""


def rows_of(directory: Path, stamp: str) -> Dataset:
    """Return the rows of a search, mapped: `train` to learn from, `validation` to measure trials on.

    Raises:
        DataError: they are not there.
    """
    kept = PreparedSets(directory / ROWS, KEEP_BYTES)
    dataset = kept.prepare("rows", (), BadRows(), stamp=stamp, source="", seed=0, sort=False)
    return replace(dataset, validation=dataset.test)


def serve(lines: Iterable[bytes], answers: BinaryIO) -> None:
    """Train what is asked for until there is no more to read.

    Raises:
        msgspec.MsgspecError: what is asked for cannot be read.
    """
    source = iter(lines)
    setup = msgspec.json.decode(next(source), type=Setup)
    recipe = msgspec.convert(setup.recipe, Recipe)
    torch.set_num_threads(setup.threads)
    device = pick_device(setup.device)
    if setup.memory_share is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(setup.memory_share, device)
    dataset = rows_of(Path(setup.directory), setup.rows)
    encode = partial(shared_encodings, Path(setup.directory) / ENCODINGS)

    def answer(what: Answer) -> None:
        answers.write(msgspec.json.encode(what) + b"\n")
        answers.flush()

    def train(task: Task) -> TrialEnded | None:
        """Train a trial; return how it ended, or None where its last epoch has said so."""
        tried = applied(recipe, task.parameters)
        epochs = complete(tried.training, tried.model.architecture, len(dataset.train)).epochs
        is_over = False

        def on_epoch(epoch: Epoch) -> None:
            nonlocal is_over
            loss, accuracy = epoch.validation_loss, epoch.validation_accuracy
            if loss is None or accuracy is None or not (math.isfinite(loss) and math.isfinite(epoch.loss)):
                raise ValueError("its loss on validation is no number")
            is_over = epoch.epoch == epochs
            answer(
                EpochDone(
                    epoch=epoch.epoch,
                    loss=loss,
                    accuracy=accuracy,
                    training_loss=epoch.loss,
                    seconds=epoch.seconds,
                    last=is_over,
                )
            )
            if not is_over and not isinstance(_read(source), Go):
                raise _Stopped

        trained = fit(
            tried, dataset, dataset.train, device, lambda at: None, Stopwatch(), on_epoch=on_epoch, encode=encode
        )
        return None if is_over else TrialEnded(error=trained.training.error)

    while (said := _read(source)) is not None:
        if not isinstance(said, Task):
            continue  # a Go or Stop that crossed with the trial's end
        ended: TrialEnded | None = None
        try:
            ended = train(said)
        except _Stopped:
            pass
        except MillpondError as error:
            ended = TrialEnded(error=str(error))
        except MemoryError:
            ended = TrialEnded(error="it ran out of memory")
        except Exception as error:  # a trial's failure is its own, whatever it is
            traceback.print_exc()
            is_memory = isinstance(error, torch.OutOfMemoryError)
            what = "it ran out of the device's memory" if is_memory else f"{type(error).__name__}: {error}"
            ended = TrialEnded(error=what.partition("\n")[0][:500])
        if ended is not None:
            answer(ended)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _read(lines: Iterable[bytes]) -> Go | Stop | Task | None:
    """Return what is said next, None at the end."""
    line = next(iter(lines), b"")
    return msgspec.json.decode(line, type=Said) if line else None


def main() -> None:
    """Serve the search at the other end of stdin and stdout; what libraries print goes to stderr."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        with contextlib.suppress(BrokenPipeError):
            serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
