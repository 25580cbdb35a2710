"""The hub on a real PostgreSQL: the same promises as on SQLite, with writers that do not take turns by themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from millpond.hub import create_app, promotions
from millpond.hub.db import metadata
from postgresql_site import HOW_TO_INSTALL, IS_INSTALLED, postgresql

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IS_INSTALLED, reason=HOW_TO_INSTALL)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as url:
        yield url


@pytest.fixture
def pg(server: str, tmp_path: Path, make_bench: Callable[..., Any]) -> Iterator[Any]:
    """A bench on a new database."""
    name = f"hub_{time.monotonic_ns()}"
    admin = sa.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    admin.dispose()
    bench = make_bench(tmp_path / "pg-home", database=f"{server}/{name}")
    yield bench
    bench.close()


def test_migrations_make_the_tables_that_the_code_knows(pg: Any) -> None:
    with pg.hub.database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_loop_turns(pg: Any, sent: Callable[..., dict[str, Any]]) -> None:
    app = create_app(pg.settings, pg.registry)
    client = app.test_client()
    client.post("/api/v1/jobs", json={})
    pg.turn(lambda: promotions.newest(pg.hub))
    items = [sent(number, text=f"Ünïcode text 🎬 {number}") for number in range(30)]
    assert len(client.post("/api/v1/corrections", json={"edge": "e", "corrections": items}).json["stored"]) == 30
    again = client.post("/api/v1/corrections", json={"edge": "e", "corrections": items}).json
    assert len(again["known"]) == 30
    decisions = [{"id": item["id"], "decision": "accept"} for item in items]
    receipt = client.post("/api/v1/reviews", json={"reviewer": "ada", "decisions": decisions}).json
    assert [applied["id"] for applied in receipt["applied"]] == [item["id"] for item in items]
    pg.turn(lambda: len(promotions.newest(pg.hub)) == 2)
    assert len(client.get("/api/v1/reviews?state=accepted").json["groups"]) == 20
    page = client.get("/api/v1/corrections?limit=10&after=c-4").json
    assert [found["id"] for found in page["corrections"]] == [f"c-{number}" for number in range(5, 15)]
    assert client.post("/api/v1/rollback", json={}).json["version"] == "v1"
    assert client.post("/api/v1/edges", json={"edge": "e", "serving": None}).json["champion"]["version"] == "v1"
    assert client.get("/api/v1/state").json["corrections"] == {"pending": 0, "accepted": 30, "rejected": 0}
    assert client.get("/metrics").status_code == client.get("/readyz").status_code == 200
    app.extensions["millpond.hub"].database.close()


def test_senders_of_the_same_corrections_at_once_store_each_once(pg: Any, sent: Callable[..., dict[str, Any]]) -> None:
    app = create_app(pg.settings, pg.registry)
    receipts: list[dict[str, Any]] = []
    start = threading.Barrier(6)

    def send() -> None:
        client = app.test_client()
        for first in range(0, 100, 10):
            start.wait(10)
            body = {"edge": "e", "corrections": [sent(number) for number in range(first, first + 10)]}
            answer = client.post("/api/v1/corrections", json=body)
            assert answer.status_code == 200, answer.text
            receipts.append(answer.json)

    senders = [threading.Thread(target=send) for _ in range(6)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert len(receipts) == 60
    stored = [one for receipt in receipts for one in receipt["stored"]]
    known = [one for receipt in receipts for one in receipt["known"]]
    assert sorted(stored) == sorted(f"c-{number}" for number in range(100))
    assert len(known) == 500
    app.extensions["millpond.hub"].database.close()


def test_reviewers_at_once_do_not_overwrite_each_other(pg: Any, sent: Callable[..., dict[str, Any]]) -> None:
    app = create_app(pg.settings, pg.registry)
    client = app.test_client()
    client.post("/api/v1/corrections", json={"edge": "e", "corrections": [sent(number) for number in range(50)]})
    receipts: list[dict[str, Any]] = []

    def judge(reviewer: str, decision: str) -> None:
        decisions = [{"id": f"c-{number}", "decision": decision} for number in range(50)]
        answer = app.test_client().post("/api/v1/reviews", json={"reviewer": reviewer, "decisions": decisions})
        assert answer.status_code == 200, answer.text
        receipts.append(answer.json)

    judges = [threading.Thread(target=judge, args=pair) for pair in (("ada", "accept"), ("bob", "reject"))]
    for one in judges:
        one.start()
    for one in judges:
        one.join()
    assert sum(len(receipt["applied"]) for receipt in receipts) == 50
    assert sum(len(receipt["refused"]) for receipt in receipts) == 50
    app.extensions["millpond.hub"].database.close()
