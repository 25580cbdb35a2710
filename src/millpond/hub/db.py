"""The hub's tables and how they are reached: SQLAlchemy Core on SQLite or PostgreSQL, Alembic for changes.

Promises that a write that returned is on the disk (SQLite: WAL, synchronous=FULL) and that writers take turns.
Times are seconds since 1970, UTC. The tables here say what the newest migration makes; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Boolean, Column, Double, ForeignKey, Index, Integer, String, Text
from sqlalchemy.types import JSON

from millpond import MillpondError

BUSY_TIMEOUT_S = 20.0
"""How long a writer waits for its turn."""

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

corrections = sa.Table(
    "corrections",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("content", String(64), nullable=False),  # SHA-256 of all that the edge said: the same id must say the same
    Column("edge", String(128), nullable=False),
    Column("text", Text, nullable=False),
    Column("text_key", String(64), nullable=False),
    Column("held_out", Boolean, nullable=False),
    Column("label", String(200), nullable=False),  # what the person at the edge says
    Column("predicted", String(200)),
    Column("scores", JSON, nullable=False),
    Column("model", JSON),
    Column("note", Text, nullable=False),
    Column("created", String(64), nullable=False),
    Column("received", Double, nullable=False),
    Column("state", String(16), nullable=False),  # pending | accepted | rejected
    Column("final_label", String(200)),  # what the reviewer says, once accepted
    Column("reviewer", String(200)),
    Column("reviewed", Double),
    Column("review", Integer),  # number of the newest review
    Index(None, "state", "text_key", "edge"),  # the review page's groups, without reading the texts
    Index(None, "edge", "state"),
    Index(None, "state", "review"),
)

reviews = sa.Table(
    "reviews",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("correction", ForeignKey("corrections.number"), nullable=False, index=True),
    Column("decision", String(16), nullable=False),  # accept | change | reject | undo
    Column("label", String(200)),
    Column("reviewer", String(200), nullable=False),
    Column("at", Double, nullable=False),
)

jobs = sa.Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("state", String(16), nullable=False, index=True),  # queued | running | succeeded | failed
    Column("reason", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("attempt", Integer, nullable=False),  # attempts begun so far
    Column("failures", Integer, nullable=False),
    Column("started", Double),  # of the newest attempt
    Column("finished", Double),
    Column("version", String(16)),  # the rest is of the newest attempt too
    Column("champion", String(80)),
    Column("training_rows", Integer),
    Column("heldout_rows", Integer),
    Column("review", Integer),  # the newest review that the attempt has seen
    Column("error", Text),
    Column("result", JSON),
)

promotions = sa.Table(
    "promotions",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),  # promotion | rollback
    Column("job", ForeignKey("jobs.number"), unique=True),
    Column("promoted", Boolean, nullable=False),
    Column("applied", Boolean, nullable=False, index=True),  # the registry's tags say the same
    Column("digest", String(80), nullable=False),
    Column("version", String(16), nullable=False),
    Column("champion", String(80)),  # what it was measured against, or took the place of
    Column("champion_version", String(16)),
    Column("facts", JSON),  # the job's result: counts on test and held-out rows, metrics
    Column("verdict", JSON, nullable=False),  # reasons and figures of the rule
    Column("by", String(200), nullable=False),
    Column("at", Double, nullable=False),
)

edges = sa.Table(
    "edges",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("report", JSON, nullable=False),
    Column("first_seen", Double, nullable=False),
    Column("last_seen", Double, nullable=False),
)


class DatabaseError(MillpondError):
    """The hub's database cannot be used."""


class Database:
    """Transactions on the hub's database; `read` sees one moment, `write` is durable when its block ends."""

    def __init__(self, url: str):
        try:
            self.url = sa.make_url(url)
            self.engine = sa.create_engine(self.url, **_options(self.url))
            prepare, begin = _BACKENDS[self.url.get_backend_name()]
        except (sa.exc.ArgumentError, ModuleNotFoundError, KeyError) as error:
            raise DatabaseError(
                f"MILLPOND_HUB_DATABASE cannot be used: {error}. Leave it empty, or give a URL such as "
                "postgresql+psycopg://user:password@host/database (pip install 'millpond[postgresql]')."
            ) from error
        sa.event.listen(self.engine, "connect", prepare)
        sa.event.listen(self.engine, "begin", begin)
        self._writing = self.engine.execution_options(millpond_writes=True)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection for reading."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a connection whose changes are all stored when the block ends, or none if it raises."""
        with self._writing.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def default_url(home: Path) -> str:
    """Return the URL of the SQLite file under `home`."""
    return f"sqlite:///{home / 'hub/hub.db'}"


def migrate(database: Database) -> None:
    """Bring the tables to the newest migration; makes them where there are none.

    Raises:
        DatabaseError: the database cannot be opened, or was made by a newer Millpond.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    if path := database.url.database if database.url.get_backend_name() == "sqlite" else None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    try:
        with database.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise DatabaseError(
            f"The hub's database is not one that this Millpond knows ({error}). "
            "A newer Millpond made it: run that one, or restore the backup from before."
        ) from error
    except sa.exc.SQLAlchemyError as error:
        raise DatabaseError(
            f"The hub's database {database.url.render_as_string(hide_password=True)} cannot be opened: "
            f"{getattr(error, 'orig', error)}. Check that it exists, and that this user may write it."
        ) from error


def rfc3339(seconds: float | None) -> str | None:
    """Return a time for people and messages; None stays None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_full(error: sa.exc.SQLAlchemyError) -> bool:
    """Return whether a write failed because the disk is full."""
    text = str(getattr(error, "orig", error)).lower()
    return "database or disk is full" in text or "no space left" in text


def _options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_TIMEOUT_S}, "pool_size": 16, "max_overflow": 48}
    return {"pool_pre_ping": True, "pool_size": 8, "max_overflow": 16}


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # we begin transactions ourselves
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={int(BUSY_TIMEOUT_S * 1000)}",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # a transaction that reads first and writes later cannot wait for its turn: it fails with "database is locked"
    connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")


def _prepare_postgresql(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    connection.commit()


def _begin_postgresql(connection: sa.Connection) -> None:
    if _writes(connection):  # writers take turns, as on SQLite: what one has read is still true when it writes
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS})")


def _writes(connection: sa.Connection) -> bool:
    return bool(connection.get_execution_options().get("millpond_writes", False))


_WRITERS = 0x6D696C6C706F6E64
"""Key of the lock that writers hold: "millpond"."""
_BACKENDS = {"sqlite": (_prepare_sqlite, _begin_sqlite), "postgresql": (_prepare_postgresql, _begin_postgresql)}
