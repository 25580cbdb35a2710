"""The child: `python -m millpond.learn.paddle WORK [SOCKET]` does the job in that directory.

`parent` starts it, and reads its standard output. On a host of the pool Ray starts it, and it speaks over the socket of
that name in WORK, which is the worker's of its lease; with the other end of the socket it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

import millpond
from millpond import MillpondError
from millpond.confine import confine
from millpond.learn.paddle.messages import JOB, Done, Failed, Job, Message, missing
from millpond.process import die_with_parent
from millpond.settings import PoolSettings, load


def main(work: Path, name: str = "") -> None:
    """Tell of the job in lines of JSON; whatever is printed goes to standard error."""
    stopped = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    line = _dial(work, name) if name else None
    job = msgspec.json.decode((work / JOB).read_bytes(), type=Job)
    if line is None:
        die_with_parent(job.parent)
    told = os.fdopen(os.dup(1), "wb") if line is None else line.makefile("wb")
    os.dup2(2, 1)

    def send(message: Message) -> None:
        told.write(msgspec.json.encode(message) + b"\n")
        told.flush()

    send(_do(job, work, send, stopped, line))


def _dial(work: Path, name: str) -> socket.socket:
    """Return the connection to the worker of this lease."""
    line = socket.socket(socket.AF_UNIX)
    directory = os.open(work, os.O_PATH | os.O_DIRECTORY)
    line.connect(f"/proc/self/fd/{directory}/{name}")  # however long the path to it is
    os.close(directory)
    return line


def _follow(line: socket.socket, stopped: threading.Event) -> None:
    """Stop as the worker says, and end with it."""
    with contextlib.suppress(OSError):
        while line.recv(64):
            stopped.set()
    os._exit(1)


def _confine(work: Path) -> None:
    """Take from this process what it does not need: Paddle is loaded, for which it runs programs, and no data yet."""
    if load(PoolSettings).confine:
        gpu = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if lacking := confine(gpu=gpu, connects=False, writes=str(work)):
            print(f"not kept from its host's files and programs: {lacking}", file=sys.stderr)  # noqa: T201


def _do(
    job: Job, work: Path, send: Callable[[Message], None], stopped: threading.Event, line: socket.socket | None
) -> Done | Failed:
    if job.version != millpond.__version__:
        return Failed(
            f"{sys.executable} has millpond {millpond.__version__} and this is {job.version}: install the same there."
        )
    try:
        from millpond.learn.paddle.loop import train
    except ImportError as error:
        return Failed(missing(sys.executable, str(error)))
    if line is not None:
        _confine(work)
        threading.Thread(target=_follow, args=(line, stopped), name="lease", daemon=True).start()
    try:
        return train(job, work, send, stopped.is_set)
    except MillpondError as error:
        return Failed(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
    os._exit(0)  # all is said and written; nothing of Paddle's is taken down that could still go wrong
