"""A process that trains one trial after the other, as the search sees it: what is said to it, and how it ends.

Trials have a process of their own so that one that runs out of memory, or of its lease on the pool, fails alone. The
process stays for the next trial: libraries and lease are taken once. This file loads no torch: Ray's workers run it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

LOG = "trials.log"
END_S = 10.0
"""Seconds that a process has to end by itself after it was told."""
LOG_TAIL_BYTES = 2000


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is said first: what is the same for all trials of a search."""

    recipe: dict[str, Any]
    directory: str
    """Of the search."""
    rows: str
    """Stamp of the prepared set in it that holds the rows."""
    device: str
    threads: int
    memory_share: float | None
    """Of a GPU's memory; None: all."""


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="task"):
    """A trial to train."""

    parameters: dict[str, int | float | str | bool]


class Go(msgspec.Struct, frozen=True, kw_only=True, tag="go"):
    """Said after each epoch but the last: train the next one."""


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Said after an epoch: enough of this trial; another follows."""


class EpochDone(msgspec.Struct, frozen=True, kw_only=True, tag="epoch"):
    """Answer: an epoch is done; unless it is the trial's last one, the process waits for `Go` or `Stop`."""

    epoch: int
    loss: float
    accuracy: float
    training_loss: float
    seconds: float
    last: bool


class TrialEnded(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Answer: the trial has ended before its last epoch, well (`error` is empty) or not."""

    error: str = ""


Said = Task | Go | Stop
Answer = EpochDone | TrialEnded


class TrialProcess:
    """The process; it is started by its first trial, and again by the first one after it died.

    It dies with the *thread* that first calls `start`, so call from one that lives as long as the process shall.
    """

    def __init__(self, setup: Setup, prefix: Sequence[str] = ()) -> None:
        self.setup = setup
        self._command = [*prefix, sys.executable, "-m", "millpond.learn.tune.trial"]
        self._process: subprocess.Popen[bytes] | None = None
        self._waits = False  # for Go or Stop

    def start(self, parameters: dict[str, Any]) -> None:
        """Begin a trial; the one before it, if it has not ended, is given up."""
        if self._waits:
            self._say(Stop())
        if self._process is None or self._process.poll() is not None:
            self._begin()
        self._waits = False
        self._say(Task(parameters=parameters))

    def next_answer(self) -> Answer:
        """Have the trial train an epoch and return what came of it; a process that died is a trial that failed."""
        assert self._process is not None
        assert self._process.stdout is not None
        if self._waits:
            self._say(Go())
        line = self._process.stdout.readline()
        try:
            answer = msgspec.json.decode(line, type=Answer)
        except msgspec.MsgspecError:
            self._waits = False
            return TrialEnded(error=self._why_it_died())
        self._waits = isinstance(answer, EpochDone) and not answer.last
        return cast("Answer", answer)

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(OSError):
            cast("BinaryIO", process.stdin).close()
        try:
            process.terminate()  # it may be amid an epoch
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        cast("BinaryIO", process.stdout).close()

    def _begin(self) -> None:
        from millpond.process import die_with_parent

        if self._process is not None:
            self.close()
        parent = os.getpid()
        with (Path(self.setup.directory) / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the search, which then ends us
                preexec_fn=lambda: die_with_parent(parent),
            )
        self._say(self.setup)

    def _say(self, what: Said | Setup) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died: the next answer says so
            self._process.stdin.write(msgspec.json.encode(what) + b"\n")
            self._process.stdin.flush()

    def _why_it_died(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "its process said what is no answer"
        if code == -signal.SIGKILL:
            return "its process was killed (SIGKILL): most likely this machine has too little memory for it"
        if code < 0:
            return f"its process died by {signal.Signals(-code).name}"
        with (Path(self.setup.directory) / LOG).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {code}: {lines[-1][:300] if lines else 'it said nothing'}"
