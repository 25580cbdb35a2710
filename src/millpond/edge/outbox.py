"""Corrections on the edge's disk until the hub has said that it stored them.

Rule: `put` returns when the correction is on disk (SQLite, WAL, synchronous=FULL), and it leaves the state
`waiting` only for what a receipt of the hub says of it: `stored`, or `refused` with a reason, which stays visible.
The id makes a repeated `put`, or a repeated delivery, the same correction.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from millpond import MillpondError
from millpond.edge.database import Database
from millpond.schema import Correction, RefusedCorrection

State = Literal["waiting", "stored", "refused"]

KEEP_STORED = 100
"""Delivered corrections that are kept, to be shown."""
KEEP_IDS = 100_000
"""Of older ones the ids are kept (state `id`), so that a late repetition is known for what it is."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS corrections (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL DEFAULT 'waiting',
    reason TEXT NOT NULL DEFAULT '',
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS corrections_by_state ON corrections (state, seq);
CREATE TABLE IF NOT EXISTS installation (id TEXT NOT NULL);
"""


class OutboxFull(MillpondError):
    """The correction was not taken in: as many as may wait are waiting, or the disk has no room."""


class OutboxBusy(MillpondError):
    """The correction was not taken in: other processes held the outbox for too long."""


class OutboxEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A correction and what became of it."""

    correction: Correction
    state: State
    reason: str = ""


class Outbox:
    """The file; one object per process, for all of its threads."""

    def __init__(self, path: Path, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._path = path
        self._db = Database(path, "FULL", SCHEMA)
        with self._db.writing() as db:
            row = db.execute("SELECT id FROM installation").fetchone()
            if row is None:
                row = (uuid.uuid4().hex,)
                db.execute("INSERT INTO installation (id) VALUES (?)", row)
        self.installation: str = row[0]
        """Tells this outbox from every other, those of edges with the same name included."""

    def put(self, correction: Correction) -> OutboxEntry:
        """Take a correction in; on disk when this returns. One that is here already is returned as it is.

        Raises:
            OutboxFull: nothing was taken in, and nothing will be until there is room.
            OutboxBusy: nothing was taken in; trying again helps.
        """
        try:
            with self._db.writing() as db:
                row = db.execute(
                    "SELECT body, state, reason FROM corrections WHERE id = ?", (correction.id,)
                ).fetchone()
                if row:
                    return OutboxEntry(correction=correction, state="stored") if row[1] == "id" else _entry(row)
                if _count(db, "waiting") >= self._max_waiting:
                    raise OutboxFull(
                        f"{self._max_waiting} corrections wait for the hub, the most this edge keeps. "
                        "This one was not taken in. Restore the connection to the hub, or raise "
                        "MILLPOND_EDGE_MAX_OUTBOX."
                    )
                db.execute(
                    "INSERT INTO corrections (id, body) VALUES (?, ?)", (correction.id, msgspec.json.encode(correction))
                )
        except sqlite3.OperationalError as error:
            if (error.sqlite_errorcode & 0xFF) == sqlite3.SQLITE_BUSY:
                raise OutboxBusy("The outbox is busy. This correction was not taken in; send it again.") from error
            raise OutboxFull(
                f"{self._path} cannot be written ({error}). This correction was not taken in. "
                "Make room on that disk, then send it again."
            ) from error
        return OutboxEntry(correction=correction, state="waiting")

    def waiting(self, limit: int, max_bytes: int = 2**31) -> list[Correction]:
        """Return the corrections that wait, the oldest first: at most `limit` and `max_bytes` of JSON, at least one."""
        bodies: list[bytes] = []
        with self._db.reading() as db:
            rows = db.execute("SELECT body FROM corrections WHERE state = 'waiting' ORDER BY seq LIMIT ?", (limit,))
            for (body,) in rows:
                max_bytes -= len(body)
                if bodies and max_bytes < 0:
                    break
                bodies.append(body)
        return [msgspec.json.decode(body, type=Correction) for body in bodies]

    def settle(self, stored: Sequence[str], refused: Sequence[RefusedCorrection]) -> None:
        """Note what the hub said: `stored` have arrived, `refused` are set aside with their reasons."""
        with self._db.writing() as db:
            db.executemany(
                "UPDATE corrections SET state = 'stored' WHERE id = ? AND state = 'waiting'", [(id,) for id in stored]
            )
            db.executemany(
                "UPDATE corrections SET state = 'refused', reason = ? WHERE id = ? AND state = 'waiting'",
                [(entry.reason[:1000], entry.id) for entry in refused],
            )
            db.execute(
                "UPDATE corrections SET state = 'id', body = x'' WHERE state = 'stored' AND seq <= "
                "(SELECT seq FROM corrections WHERE state = 'stored' ORDER BY seq DESC LIMIT 1 OFFSET ?)",
                (KEEP_STORED,),
            )
            db.execute(
                "DELETE FROM corrections WHERE state = 'id' AND seq <= (SELECT max(seq) FROM corrections) - ?",
                (KEEP_IDS,),
            )

    def retry_refused(self) -> int:
        """Let the refused ones wait again; return how many."""
        with self._db.writing() as db:
            return db.execute("UPDATE corrections SET state = 'waiting', reason = '' WHERE state = 'refused'").rowcount

    def latest(self, limit: int, state: State | None = None) -> list[OutboxEntry]:
        """Return the latest corrections (in `state`, if given), the newest first."""
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT body, state, reason FROM corrections WHERE state = ?1 OR (?1 IS NULL AND state != 'id') "
                "ORDER BY seq DESC LIMIT ?2",
                (state, limit),
            ).fetchall()
        return [_entry(row) for row in rows]

    def count(self, state: State) -> int:
        """Return how many corrections are in a state."""
        with self._db.reading() as db:
            return _count(db, state)

    def total(self) -> int:
        """Return how many corrections were ever taken in."""
        with self._db.reading() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'corrections'").fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _count(db: sqlite3.Connection, state: State) -> int:
    return int(db.execute("SELECT count(*) FROM corrections WHERE state = ?", (state,)).fetchone()[0])


def _entry(row: tuple[bytes, State, str]) -> OutboxEntry:
    return OutboxEntry(correction=msgspec.json.decode(row[0], type=Correction), state=row[1], reason=row[2])
