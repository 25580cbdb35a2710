"""The child: `python -m millpond.learn.paddle WORK` does the job in that directory. `parent` starts it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

import millpond
from millpond import MillpondError
from millpond.learn.paddle.messages import JOB, Done, Failed, Job, Message, missing
from millpond.process import die_with_parent


def main(work: Path) -> None:
    """Tell of the job in lines of JSON on standard output; whatever else is printed goes to standard error."""
    stopped = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    job = msgspec.json.decode((work / JOB).read_bytes(), type=Job)
    die_with_parent(job.parent)
    told = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: Message) -> None:
        told.write(msgspec.json.encode(message) + b"\n")
        told.flush()

    send(_do(job, work, send, stopped))


def _do(job: Job, work: Path, send: Callable[[Message], None], stopped: threading.Event) -> Done | Failed:
    if job.version != millpond.__version__:
        return Failed(
            f"{sys.executable} has millpond {millpond.__version__} and this is {job.version}: install the same there."
        )
    try:
        from millpond.learn.paddle.loop import train
    except ImportError as error:
        return Failed(missing(sys.executable, str(error)))
    try:
        return train(job, work, send, stopped.is_set)
    except MillpondError as error:
        return Failed(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # all is said and written; nothing of Paddle's is taken down that could still go wrong
