"""The last predictions, so that feedback may name one by its id: in any worker, and after a restart.

A cache on disk, bounded in rows and in bytes. Where it fails (a full disk), predicting goes on without it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millpond.edge.database import Database
from millpond.schema import ModelRef

MAX_BYTES = 1024**3
"""Largest size of the file."""
PAGE_BYTES = 4096
SCHEMA = """
CREATE TABLE IF NOT EXISTS predictions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    body BLOB NOT NULL
);
"""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the edge said of a text."""

    id: str
    text: str
    label: str
    scores: dict[str, float]
    model: ModelRef


class PredictionLog:
    """The file; one object per process, for all of its threads."""

    def __init__(self, path: Path, keep: int, max_bytes: int = MAX_BYTES) -> None:
        self._keep = keep
        # NORMAL: survives kill -9; a power cut may take the last ones
        self._db = Database(path, "NORMAL", f"PRAGMA max_page_count={max_bytes // PAGE_BYTES};{SCHEMA}")

    @staticmethod
    def clear_if_damaged(path: Path) -> None:
        """Remove a file that is no database any more; it is a cache. Only while nobody has it open.

        Raises:
            sqlite3.Error, OSError: the place cannot be written.
        """
        try:
            PredictionLog(path, keep=1).close()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            for damaged in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
                damaged.unlink(missing_ok=True)

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Remember predictions, in one transaction; the oldest are forgotten.

        Raises:
            sqlite3.Error: they could not be written.
        """
        rows = [(prediction.id, msgspec.json.encode(prediction)) for prediction in predictions]
        try:
            self._insert(rows)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            with self._db.writing() as db:  # the file is at its bound: make room, then try once more
                db.execute("DELETE FROM predictions WHERE seq <= (SELECT (min(seq) + max(seq)) / 2 FROM predictions)")
            self._insert(rows)

    def get(self, prediction_id: str) -> Prediction | None:
        """Return a prediction, or None if it is unknown or forgotten."""
        with self._db.reading() as db:
            row = db.execute("SELECT body FROM predictions WHERE id = ?", (prediction_id,)).fetchone()
        return msgspec.json.decode(row[0], type=Prediction) if row else None

    def total(self) -> int:
        """Return how many predictions were ever made here."""
        with self._db.reading() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'predictions'").fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _insert(self, rows: Sequence[tuple[str, bytes]]) -> None:
        with self._db.writing() as db:
            db.executemany("INSERT INTO predictions (id, body) VALUES (?, ?)", rows)
            db.execute("DELETE FROM predictions WHERE seq <= (SELECT max(seq) FROM predictions) - ?", (self._keep,))
