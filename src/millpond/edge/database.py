"""SQLite as the edge uses it: write-ahead log, several processes, short transactions."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

BUSY_S = 10.0
"""How long a writer waits for the writers of other processes."""
BUSY_LOOK_S = 0.0005
"""Seconds between its looks. SQLite's own waiting grows to 100 ms a look; with two busy writers that made the
99th percentile of a small transaction 10 ms."""


class Database:
    """One connection, shared by the threads of one process."""

    def __init__(self, path: Path, synchronous: Literal["FULL", "NORMAL"], schema: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute(f"PRAGMA synchronous={synchronous}")
        self._connection.executescript(schema)

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Run a transaction: all of it is there afterwards, or, after an error, nothing."""
        with self._lock:
            self._begin()
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def _begin(self) -> None:
        deadline = time.monotonic() + BUSY_S
        self._connection.execute("PRAGMA busy_timeout=0")
        try:
            while True:
                try:
                    self._connection.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise
                time.sleep(BUSY_LOOK_S)
        finally:
            self._connection.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Use the connection for single queries."""
        with self._lock:
            yield self._connection

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()
