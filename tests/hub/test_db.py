"""The database: what the migrations make, what a write promises."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from millpond.hub.db import Database, DatabaseError, default_url, edges, metadata, migrate, rfc3339


def test_migrations_make_the_tables_that_the_code_knows(tmp_path: Path) -> None:
    database = Database(default_url(tmp_path))
    migrate(database)
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    database.close()


def test_migrating_again_changes_nothing(tmp_path: Path) -> None:
    database = Database(default_url(tmp_path))
    migrate(database)
    with database.write() as connection:
        connection.execute(sa.insert(edges).values(name="e", report={}, first_seen=1.0, last_seen=1.0))
    migrate(database)
    with database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(edges)) == 1
    database.close()


def test_sqlite_is_durable_and_checks_references(tmp_path: Path) -> None:
    database = Database(default_url(tmp_path))
    migrate(database)
    with database.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    database.close()


def test_a_write_that_raises_leaves_nothing(tmp_path: Path) -> None:
    database = Database(default_url(tmp_path))
    migrate(database)
    row = {"name": "e", "report": {}, "first_seen": 1.0, "last_seen": 1.0}
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        connection.execute(sa.insert(edges), [row, row])
    with database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(edges)) == 0
    database.close()


def test_a_database_of_a_newer_millpond_is_refused(tmp_path: Path) -> None:
    database = Database(default_url(tmp_path))
    migrate(database)
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'from-the-future'")
    with pytest.raises(DatabaseError, match="newer Millpond"):
        migrate(database)
    database.close()


def test_a_file_that_is_no_database_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/hub.db").write_text("this is no database, however long one looks at it" * 20)
    database = Database(default_url(tmp_path))
    with pytest.raises(DatabaseError, match="cannot be opened"):
        migrate(database)
    database.close()


@pytest.mark.parametrize("url", ["", "nonsense", "nosuchdb://x/y", "mysql://x/y", "postgresql+nodriver://x/y"])
def test_a_url_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(DatabaseError, match="MILLPOND_HUB_DATABASE"):
        Database(url)


def test_a_password_in_the_url_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError) as caught:
        Database("nosuchdb://user:secret-word@host/db")
    assert "secret-word" not in str(caught.value)


def test_two_writers_take_turns(tmp_path: Path) -> None:
    database = Database(default_url(tmp_path))
    migrate(database)
    other = sqlite3.connect(tmp_path / "hub/hub.db", timeout=0.05)
    with database.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.close()
    database.close()


def test_times_are_utc() -> None:
    assert rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(None) is None
