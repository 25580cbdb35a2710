"""Which model is the champion, and why: records first, the registry's tags after them.

Promises that each finished job is decided on once, that no tag moves without its record, and that a record whose
tags were not moved (the hub died between the two) has them moved later.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from millpond import MillpondError
from millpond.hub import db, jobs
from millpond.hub.db import Database, promotions, rfc3339
from millpond.hub.jobs import JobFailed
from millpond.hub.retrain import ChampionChange, previous_champion
from millpond.hub.state import CANDIDATE, CHAMPION, Hub
from millpond.registry import Promotion, PromotionFacts, PushedModel, RegistryError, decide, verify
from millpond.schema import JobResult, PairedCount


class NothingToRollBack(MillpondError):
    """No champion came before the present one."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Champion and candidate on the same rows; accuracies are shares, None without rows or without a champion."""

    rows: int
    both_right: int
    only_champion_right: int
    only_candidate_right: int
    champion_accuracy: float | None
    candidate_accuracy: float | None


class PromotionView(msgspec.Struct, frozen=True, kw_only=True):
    """A promotion, a refusal or a rollback, and why. `champion` is what `version` was measured against, or replaced."""

    id: int
    kind: Literal["promotion", "rollback"]
    promoted: bool
    version: str
    digest: str
    champion: str | None
    champion_digest: str | None
    job: str | None
    reasons: list[str]
    p_value: float | None
    test: Measured | None
    heldout: Measured | None
    official_test: bool | None
    metrics: dict[str, float]
    by: str
    at: str | None


def take_in(hub: Hub, number: int, attempt: int, now: float) -> Promotion:
    """Check a finished job's candidate, decide on it, and store decision and job in one transaction.

    Raises:
        JobFailed: the result or the candidate is not what it must be.
    """
    place = jobs.directory(hub, number, attempt)
    result = jobs.read_result(place)
    candidate = _checked_candidate(hub, result, place / "candidate")
    with hub.database.write() as connection:
        row = connection.execute(sa.select(db.jobs).where(db.jobs.c.number == number)).mappings().one()
        if candidate.version != row["version"]:
            raise JobFailed(f"The job made {candidate.version}, but was to make {row['version']}.")
        champion_digest = _champion_digest(connection, hub)
        champion = hub.describe(champion_digest) if champion_digest else None
        verdict = _judge(hub, candidate, champion, row["champion"], result)
        connection.execute(
            sa.insert(promotions).values(
                kind="promotion",
                job=number,
                promoted=verdict.promoted,
                applied=False,
                digest=candidate.digest,
                version=candidate.version,
                champion=champion_digest,
                champion_version=champion.version if champion else None,
                facts=msgspec.to_builtins(result),
                verdict=msgspec.to_builtins(verdict),
                by=f"job-{number}",
                at=now,
            )
        )
        jobs.update(connection, number, state="succeeded", finished=now, error=None, result=msgspec.to_builtins(result))
    return verdict


def roll_back(hub: Hub, by: str, now: float) -> PromotionView:
    """Make the champion before the present one the champion again.

    Raises:
        NothingToRollBack: there is none.
    """
    with hub.database.write() as connection:
        target = _rollback_target(connection)
        if target is None:
            raise NothingToRollBack("No champion came before the present one, so there is nothing to go back to.")
        present_digest = _champion_digest(connection, hub)
        present = hub.describe(present_digest) if present_digest else None
        reason = f"Rolled back from {present.version if present else 'nothing'} to {target.version} by hand."
        row = {
            "kind": "rollback",
            "promoted": True,
            "applied": False,
            "digest": target.digest,
            "version": target.version,
            "champion": present_digest,
            "champion_version": present.version if present else None,
            "verdict": {"reasons": [reason]},
            "by": by,
            "at": now,
        }
        number = connection.scalars(sa.insert(promotions).values(row).returning(promotions.c.number)).one()
    move_tags(hub)
    found = find(hub, number)
    assert found is not None
    return found


def can_roll_back(hub: Hub) -> bool:
    """Return whether a champion came before the present one."""
    with hub.database.read() as connection:
        return _rollback_target(connection) is not None


def move_tags(hub: Hub) -> int:
    """Move the registry's tags as the records say that have not taken effect yet; return how many there were.

    Raises:
        RegistryError: a model is not in the registry any more, or the registry cannot be written.
    """
    waiting = sa.select(promotions).where(~promotions.c.applied).order_by(promotions.c.number)
    with hub.database.read() as connection:
        if connection.execute(waiting.limit(1)).first() is None:
            return 0
    name = hub.settings.model
    with hub.database.write() as connection:  # whoever writes first moves them all: tags move in the records' order
        records = connection.execute(waiting).mappings().all()
        for record in records:
            if record["kind"] == "promotion":
                hub.store.tag(name, record["digest"], CANDIDATE)
            if record["promoted"]:
                hub.store.tag(name, record["digest"], CHAMPION)
            moved = sa.update(promotions).where(promotions.c.number == record["number"]).values(applied=True)
            connection.execute(moved)
    return len(records)


def newest(hub: Hub, limit: int = 100) -> list[PromotionView]:
    """Return records, newest first."""
    query = sa.select(promotions).order_by(promotions.c.number.desc()).limit(limit)
    with hub.database.read() as connection:
        return [_view(row) for row in connection.execute(query).mappings()]


def find(hub: Hub, number: int) -> PromotionView | None:
    """Return one record."""
    with hub.database.read() as connection:
        query = sa.select(promotions).where(promotions.c.number == number)
        row = connection.execute(query).mappings().one_or_none()
    return _view(row) if row else None


def count_outcomes(database: Database) -> dict[str, int]:
    """Return how many candidates were promoted and refused, and how many rollbacks there were."""
    query = sa.select(promotions.c.kind, promotions.c.promoted, sa.func.count()).group_by(
        promotions.c.kind, promotions.c.promoted
    )
    counts = {"promoted": 0, "refused": 0, "rolled_back": 0}
    with database.read() as connection:
        for kind, promoted, count in connection.execute(query):
            counts["rolled_back" if kind == "rollback" else "promoted" if promoted else "refused"] = count
    return counts


def _checked_candidate(hub: Hub, result: JobResult, temporary: Path) -> PushedModel:
    shutil.rmtree(temporary, ignore_errors=True)  # of a hub that died here
    try:
        candidate = hub.describe(result.digest)
        verify(hub.store.checkout(hub.settings.model, result.digest, temporary), hub.registry.public_key_path)
    except RegistryError as error:
        raise JobFailed(f"The job's candidate {result.digest[:100]!r} is not accepted: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if candidate.version != result.version:
        raise JobFailed(
            f"The job says that it made {result.version[:100]!r}, but its candidate is {candidate.version}."
        )
    return candidate


def _judge(
    hub: Hub, candidate: PushedModel, champion: PushedModel | None, measured_against: str | None, result: JobResult
) -> Promotion:
    facts = PromotionFacts(
        candidate=candidate.version,
        champion=champion.version if champion else None,
        test=result.test,
        heldout=result.heldout,
    )
    if measured_against == (champion.digest if champion else None):
        return decide(facts)
    was = hub.describe(measured_against).version if measured_against else "no champion"
    now = champion.version if champion else "none"
    reason = f"It was measured against {was}, but the champion is {now} meanwhile: train again to compare with that."
    return Promotion(promoted=False, reasons=[reason], facts=facts)


def _rollback_target(connection: sa.Connection) -> ChampionChange | None:
    effective = (
        sa.select(promotions.c.kind, promotions.c.digest, promotions.c.version)
        .where(promotions.c.promoted)
        .order_by(promotions.c.number)
    )
    return previous_champion([ChampionChange(*change) for change in connection.execute(effective)])


def _champion_digest(connection: sa.Connection, hub: Hub) -> str | None:
    query = (
        sa.select(promotions.c.digest)
        .where(promotions.c.promoted, ~promotions.c.applied)
        .order_by(promotions.c.number.desc())
        .limit(1)
    )
    return connection.scalar(query) or hub.tags().get(CHAMPION)


def _view(row: sa.RowMapping) -> PromotionView:
    facts = msgspec.convert(row["facts"], JobResult) if row["facts"] else None
    had_champion = row["champion"] is not None
    verdict: dict[str, Any] = row["verdict"]
    return PromotionView(
        id=row["number"],
        kind=row["kind"],
        promoted=row["promoted"],
        version=row["version"],
        digest=row["digest"],
        champion=row["champion_version"],
        champion_digest=row["champion"],
        job=f"job-{row['job']}" if row["job"] else None,
        reasons=verdict["reasons"],
        p_value=verdict.get("p_value"),
        test=_measured(facts.test, had_champion) if facts else None,
        heldout=_measured(facts.heldout, had_champion) if facts else None,
        official_test=facts.official_test if facts else None,
        metrics=facts.metrics if facts else {},
        by=row["by"],
        at=rfc3339(row["at"]),
    )


def _measured(count: PairedCount, had_champion: bool) -> Measured:
    return Measured(
        rows=count.rows,
        both_right=count.both_right,
        only_champion_right=count.only_champion_right,
        only_candidate_right=count.only_candidate_right,
        champion_accuracy=count.champion_accuracy if had_champion and count.rows else None,
        candidate_accuracy=count.candidate_accuracy if count.rows else None,
    )
