"""What edges say of themselves: the newest report of each, and when it came."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from millpond.hub.db import Database, edges, rfc3339
from millpond.schema import EdgeReport

MAX_EDGES = 10_000
"""The edges that were silent for the longest are forgotten beyond this."""
MAX_REPORT_BYTES = 16 * 1024


class EdgeView(msgspec.Struct, frozen=True, kw_only=True):
    """An edge: its newest report, and for how long it has been silent."""

    name: str
    report: EdgeReport
    first_seen: str | None
    last_seen: str | None
    silent_s: float


def keep(database: Database, report: EdgeReport, now: float) -> bool:
    """Store an edge's newest report; return False if it is too long to be one."""
    if len(msgspec.json.encode(report)) > MAX_REPORT_BYTES:
        return False
    values = {"report": msgspec.to_builtins(report), "last_seen": now}
    with database.write() as connection:
        changed = connection.execute(sa.update(edges).where(edges.c.name == report.edge).values(values))
        if not changed.rowcount:
            connection.execute(sa.insert(edges).values(name=report.edge, first_seen=now, **values))
            forgotten = sa.select(edges.c.name).order_by(edges.c.last_seen.desc()).offset(MAX_EDGES).limit(MAX_EDGES)
            connection.execute(sa.delete(edges).where(edges.c.name.in_(forgotten)))
    return True


def listed(database: Database, now: float) -> list[EdgeView]:
    """Return all edges by name."""
    with database.read() as connection:
        rows = connection.execute(sa.select(edges).order_by(edges.c.name)).mappings().all()
    return [
        EdgeView(
            name=row["name"],
            report=msgspec.convert(row["report"], EdgeReport),
            first_seen=rfc3339(row["first_seen"]),
            last_seen=rfc3339(row["last_seen"]),
            silent_s=round(max(0.0, now - row["last_seen"]), 1),
        )
        for row in rows
    ]
