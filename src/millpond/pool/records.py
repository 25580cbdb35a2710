"""The broker's memory of leases: one file, replaced whole, and one broker at a time that writes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from millpond.pool.errors import PoolError
from millpond.pool.scheduler import Lease


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[Records]:
    """Yield the records in `directory` while no other process has them.

    Raises:
        PoolError: another broker has them, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PoolError(f"The pool cannot keep its records in {directory}: {error}. Set MILLPOND_HOME.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PoolError(
            f"Another broker runs with the records in {directory}: two would lend the same devices twice. "
            "Stop that one, or set MILLPOND_HOME to another directory."
        ) from None
    else:
        yield Records(directory / "leases.json")
    finally:
        os.close(lock)


class Records:
    """Leases on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[Lease]:
        """Return what was saved last; nothing if there is nothing.

        Raises:
            PoolError: the file is damaged.
        """
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=list[Lease])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            raise PoolError(
                f"The records of past leases in {self.path} cannot be read: {error}. "
                "Nothing else depends on them: move the file away and start again."
            ) from error

    def save(self, leases: Iterable[Lease]) -> None:
        """Replace what was saved; returns when it is on disk.

        Raises:
            OSError: the disk is full, or has failed; what was saved before is still there.
        """
        temporary = self.path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(list(leases)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
