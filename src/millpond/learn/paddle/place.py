"""Where Paddle trains: in a process on this machine, or wherever someone else has it (a lease on the pool's device)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch

from millpond.learn.options import TrainingError
from millpond.learn.paddle.messages import MAX_LINE_BYTES

END_S = 10.0
"""Seconds in which the child must have ended after its last line."""
TAIL_CHARACTERS = 600
"""How much of what a child that died has printed last is shown."""


class Child(Protocol):
    """The process that trains. Whoever has it writes its files, then starts it."""

    @property
    def device(self) -> str:
        """What it is to compute on: auto, cpu, cuda or cuda:N."""
        ...

    @property
    def where(self) -> str:
        """Where that is, in words; empty: on this machine."""
        ...

    def start(self) -> None:
        """Begin: the files are there."""
        ...

    def readline(self) -> bytes:
        """Wait for the next line; empty when there is none any more."""
        ...

    def why_ended(self) -> str:
        """Return why there are no more lines, without a full stop."""
        ...

    def stop(self) -> None:
        """Have it stop as soon as it can, and keep what it has."""
        ...

    def kill(self) -> None:
        """End it at once. From any thread."""
        ...

    def fetch(self, name: str, most_bytes: int) -> Path:
        """Return where a file that it has written is on this machine."""
        ...

    def drop(self, name: str) -> None:
        """Delete a file that it has written, and that was fetched."""
        ...


Hire = Callable[[Path], AbstractContextManager[Child]]
"""Has a child for the job in a directory, which is gone afterwards, however that ends."""


@dataclass(frozen=True)
class Place:
    """Where Paddle trains, as it was asked for."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    python: Path = Path(sys.executable)
    """The Python that has Paddle."""
    elsewhere: Hire | None = None
    """Who has the child, if not this machine: then neither device nor Python is this one's."""

    @contextlib.contextmanager
    def child(self, work: Path) -> Iterator[Child]:
        """Yield a child for the job in `work`, which is gone afterwards, however this ends."""
        if self.elsewhere is not None:
            with self.elsewhere(work) as child:
                yield child
            return
        with contextlib.closing(_Process(self, work)) as process:
            yield process
            process.wait()


class _Process:
    """A child on this machine.

    It is not in the terminal's process group: Ctrl-C is for the parent, which asks the child to stop.
    """

    where = ""

    def __init__(self, place: Place, work: Path) -> None:
        self.device = place.device
        self._python = place.python
        self._work = work
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        threads = str(torch.get_num_threads())
        environ = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [str(self._python), "-P", "-m", "millpond.learn.paddle", str(self._work)]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        with (self._work / "stderr.txt").open("wb") as stderr:
            try:
                self._process = subprocess.Popen(
                    command, env=environ, stdin=none, stdout=pipe, stderr=stderr, process_group=0
                )
            except OSError as error:
                raise TrainingError(
                    f"{self._python} cannot be started: {error}. MILLPOND_LEARN_PADDLE_PYTHON names the Python that "
                    "has Paddle; unset it if it is this one."
                ) from error

    def readline(self) -> bytes:
        return self._told.readline(MAX_LINE_BYTES)

    def why_ended(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        how = f"ended with exit status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += " (memory may have run out; a smaller --batch-size needs less)"
        printed = (self._work / "stderr.txt").read_text(errors="replace").strip()[-TAIL_CHARACTERS:]
        said = f". It printed last: {printed}" if printed else ""
        return f"the process that trains in Paddle ({self._python}) {how}{said}"

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def fetch(self, name: str, most_bytes: int) -> Path:
        return self._work / name

    def drop(self, name: str) -> None:
        (self._work / name).unlink()

    def wait(self) -> None:
        """Give it time to end by itself, if it was started."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._told.close()

    @property
    def _told(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout
