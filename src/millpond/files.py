"""Files that others rely on: whole or not there, on the disk when that is said, written by one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO, Any


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file, and its directory, so that a reader finds the old content or the new; if `durable`, so does a
    power cut.

    Raises:
        OSError: the disk is full, or has failed; the old content is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_bytes(content)
    if durable:
        sync(unfinished)
    unfinished.replace(path)
    if durable:
        sync(path.parent)


def lock(file: IO[Any], wait_s: float) -> None:
    """Lock an open file against other processes; the kernel frees it when the last process that has it open ends.

    Raises:
        BlockingIOError: another process held it for all of `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.02)
