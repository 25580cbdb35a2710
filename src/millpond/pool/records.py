"""The broker's memory of leases: one file, replaced whole, and one broker at a time that writes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from millpond.files import lock, replace
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
        file = (directory / "lock").open("w")
    except OSError as error:
        raise PoolError(f"The pool cannot keep its records in {directory}: {error}. Set MILLPOND_HOME.") from error
    with file:
        try:
            lock(file, wait_s=0)
        except BlockingIOError:
            raise PoolError(
                f"Another broker runs with the records in {directory}: two would lend the same devices twice. "
                "Stop that one, or set MILLPOND_HOME to another directory."
            ) from None
        yield Records(directory / "leases.json")


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
        replace(self.path, msgspec.json.encode(list(leases)))
