"""`python -m millpond.learn.keeper`: end what a program started when it ends, however it ends; clear its directory.

The kernel's parent-death signal reaches children, not theirs: of Ray, two agents would live on for a minute. The keeper
notes once a second what the program has started; when its stdin closes, it kills what is left of that and goes.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

LOOK_EVERY_S = 1.0
END_S = 10.0
"""Seconds in which all must have ended; what cannot be killed then is left to the kernel."""

Process = tuple[int, int]
"""Process id, and when it started (in clock ticks since boot): an id that was given again is another process."""


def descendants(parents: set[int]) -> set[Process]:
    """Return the living processes below some others."""
    found: set[Process] = set()
    waiting = list(parents)
    while waiting:
        for listed in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for pid in map(int, listed.read_text().split()):
                    started = _started(pid)
                    if started is not None and (pid, started) not in found and pid != os.getpid():
                        found.add((pid, started))
                        waiting.append(pid)
    return found


def end(processes: set[Process], within_s: float = END_S) -> set[Process]:
    """Kill processes, and what they have started meanwhile; return those that still live."""
    deadline = time.monotonic() + within_s
    while left := {process for process in processes if _started(process[0]) == process[1]}:
        if time.monotonic() > deadline:
            return left
        processes |= descendants({pid for pid, _ in left})
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return set()


def _started(pid: int) -> int | None:
    """Return when a process started, None if it does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def main() -> None:
    """Keep the program that started us, whose directory is the only argument, until our stdin closes."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    program, directory = os.getppid(), Path(sys.argv[1])
    known: set[Process] = set()
    while not select.select([0], [], [], LOOK_EVERY_S)[0]:
        known |= descendants({program})
    end(known)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
