"""Corrections: taken in once, looked at, handed to training.

Promises that what `take_in` reports as stored is on the disk, and that an id is stored once whatever is sent again.
Knows the database, not HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from millpond.hub.db import Database, corrections, reviews, rfc3339
from millpond.hub.retrain import is_held_out, text_key
from millpond.schema import (
    MAX_BATCH,
    MAX_CORRECTION_BYTES,
    Correction,
    CorrectionReceipt,
    Identifier,
    LabelledText,
    RefusedCorrection,
)

State = Literal["pending", "accepted", "rejected"]
STATES: tuple[State, ...] = ("pending", "accepted", "rejected")

MAX_SCORES = 1000
MAX_SHORT = 200
"""Longest predicted label, name of a model, version."""
MAX_PAGE = 1000
MAX_PAGE_BYTES = 4 * 1024 * 1024
"""A page of corrections ends before its texts grow past this; it always has at least one."""


class Intake(msgspec.Struct, frozen=True, kw_only=True):
    """A `CorrectionBatch` whose corrections are decoded one by one, so that a bad one does not refuse the others."""

    edge: Identifier
    corrections: Annotated[list[msgspec.Raw], Meta(max_length=MAX_BATCH)]


class StoredCorrection(msgspec.Struct, frozen=True, kw_only=True):
    """A correction as the hub holds it; `label` is the edge's person's, `final_label` the reviewer's."""

    id: str
    edge: str
    text: str
    label: str
    predicted: str | None
    scores: dict[str, float]
    model: dict[str, str] | None
    note: str
    created: str
    received: str | None
    state: State
    held_out: bool
    final_label: str | None
    reviewer: str | None
    reviewed: str | None
    review: int | None


class CorrectionPage(msgspec.Struct, frozen=True, kw_only=True):
    """Corrections in the order in which they came, and how many there are in each state."""

    corrections: list[StoredCorrection]
    counts: dict[str, int]


# --- from edges ---------------------------------------------------------------------------------------------------


def take_in(database: Database, intake: Intake, labels: Sequence[str] | None, now: float) -> CorrectionReceipt:
    """Store the corrections of a batch that are new and valid; `labels` are those known (None: not known yet)."""
    receipt = CorrectionReceipt(stored=[], known=[], refused=[])
    rows: dict[str, dict[str, Any]] = {}
    for number, raw in enumerate(intake.corrections):
        try:
            correction = msgspec.json.decode(raw, type=Correction)
            _check(correction, labels)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
            receipt.refused.append(RefusedCorrection(id=_claimed_id(raw, number), reason=str(error)[:300]))
            continue
        row = _row(correction, intake.edge, now)
        _sort(receipt, row, rows[row["id"]]["content"] if row["id"] in rows else None)
        rows.setdefault(row["id"], row)
    if rows:
        _store(database, rows, receipt)
    return receipt


def _store(database: Database, rows: dict[str, dict[str, Any]], receipt: CorrectionReceipt) -> None:
    known_query = sa.select(corrections.c.id, corrections.c.content).where(corrections.c.id.in_(rows))
    with database.write() as connection:
        known = dict(connection.execute(known_query).all())
        new = [row for row in rows.values() if row["id"] not in known]
        if new:
            connection.execute(sa.insert(corrections), new)
    receipt.stored.extend(row["id"] for row in new)
    for correction_id, content in known.items():
        _sort(receipt, rows[correction_id], content)


def _sort(receipt: CorrectionReceipt, row: dict[str, Any], content: str | None) -> None:
    if content == row["content"]:
        receipt.known.append(row["id"])
    elif content is not None:
        reason = "a correction with this id and another content is stored already; an id is given once"
        receipt.refused.append(RefusedCorrection(id=row["id"], reason=reason))


def _check(correction: Correction, labels: Sequence[str] | None) -> None:
    size = len(correction.text.encode())
    if size > MAX_CORRECTION_BYTES:
        raise ValueError(f"the text has {size:,} bytes; at most {MAX_CORRECTION_BYTES:,} are taken")
    if not correction.text.strip():
        raise ValueError("the text is empty")
    model = correction.model
    strings = [correction.predicted or "", correction.created, *correction.scores]
    strings += [model.name, model.version, model.digest] if model else []
    if any(len(string) > MAX_SHORT for string in strings) or len(correction.created) > 64:
        raise ValueError(f"predicted, model, created and the names of scores have at most {MAX_SHORT} characters")
    if any("\0" in string for string in (correction.text, correction.label, correction.note, *strings)):
        raise ValueError("a string contains the character NUL, which no text has")
    if len(correction.scores) > MAX_SCORES:
        raise ValueError(f"there are {len(correction.scores)} scores; at most {MAX_SCORES} are taken")
    if labels is not None and correction.label not in labels:
        raise ValueError(f"the label {correction.label!r} is unknown; the labels are {named(labels)}")


def _row(correction: Correction, edge: str, now: float) -> dict[str, Any]:
    key = text_key(correction.text)
    content = hashlib.sha256(msgspec.json.encode(correction, order="deterministic")).hexdigest()
    fields: dict[str, Any] = msgspec.to_builtins(correction)
    return fields | {
        "content": content,
        "edge": edge,
        "text_key": key,
        "held_out": is_held_out(key),
        "received": now,
        "state": "pending",
    }


def _claimed_id(raw: msgspec.Raw, number: int) -> str:
    class Claim(msgspec.Struct):
        id: str

    try:
        return msgspec.json.decode(raw, type=Claim).id[:200]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return f"#{number}"


def named(labels: Sequence[str]) -> str:
    """Return labels for a message, the first ten of them."""
    shown = ", ".join(repr(label) for label in labels[:10])
    return shown if len(labels) <= 10 else f"{shown} and {len(labels) - 10} more"


# --- looking at them ----------------------------------------------------------------------------------------------


def count_states(database: Database) -> dict[str, int]:
    """Return how many corrections are in each state."""
    query = sa.select(corrections.c.state, sa.func.count()).group_by(corrections.c.state)
    with database.read() as connection:
        found: dict[str, int] = dict(connection.execute(query).all())
    return {state: found.get(state, 0) for state in STATES}


def count_by_edge(database: Database) -> dict[str, dict[str, int]]:
    """Return edge → state → how many corrections."""
    query = sa.select(corrections.c.edge, corrections.c.state, sa.func.count()).group_by(
        corrections.c.edge, corrections.c.state
    )
    with database.read() as connection:
        rows = connection.execute(query).all()
    found: dict[str, dict[str, int]] = {}
    for edge, state, count in rows:
        found.setdefault(edge, dict.fromkeys(STATES, 0))[state] = count
    return found


def list_page(
    database: Database, state: State | None, edge: str | None, after: str | None, limit: int
) -> list[StoredCorrection] | None:
    """Return corrections in the order in which they came; None where no correction has the id `after`."""
    columns = corrections.c
    query = sa.select(corrections).order_by(columns.number).limit(min(limit, MAX_PAGE))
    if state:
        query = query.where(columns.state == state)
    if edge:
        query = query.where(columns.edge == edge)
    with database.read() as connection:
        if after:
            number = connection.scalar(sa.select(columns.number).where(columns.id == after))
            if number is None:
                return None
            query = query.where(columns.number > number)
        return _up_to_limit(connection.execution_options(yield_per=20).execute(query).mappings())


def list_groups(
    database: Database, state: State, edge: str | None, after: int, limit: int
) -> list[tuple[int, list[StoredCorrection]]]:
    """Return (position, corrections with the same text) in a state, oldest first, from the position `after` on."""
    columns = corrections.c
    position = sa.func.min(columns.number)
    keys = (
        sa.select(columns.text_key, position.label("position"))
        .where(columns.state == state)
        .group_by(columns.text_key)
        .having(position > after)
        .order_by(position)
        .limit(limit)
    )
    if edge:
        keys = keys.where(columns.edge == edge)
    groups: list[tuple[int, list[StoredCorrection]]] = []
    size = 0
    with database.read() as connection:
        for key, first in connection.execute(keys).all():
            members = sa.select(corrections).where(columns.text_key == key, columns.state == state)
            found = connection.execute(members.order_by(columns.number).limit(MAX_PAGE)).mappings()
            groups.append((first, _up_to_limit(found)))
            size += sum(len(member.text) for member in groups[-1][1])
            if size > MAX_PAGE_BYTES:
                break
    return groups


def _up_to_limit(rows: Any) -> list[StoredCorrection]:
    page: list[StoredCorrection] = []
    size = 0
    for row in rows:
        size += len(row["text"])
        if page and size > MAX_PAGE_BYTES:
            break
        known = {name: row[name] for name in StoredCorrection.__struct_fields__}
        times = {"received": rfc3339(row["received"]), "reviewed": rfc3339(row["reviewed"])}
        page.append(StoredCorrection(**known | times))
    return page


# --- for training -------------------------------------------------------------------------------------------------


def count_accepted_since(database: Database, review: int) -> int:
    """Return how many corrections were accepted by reviews after number `review` (and still are)."""
    columns = corrections.c
    query = sa.select(sa.func.count()).where(columns.state == "accepted", columns.review > review)
    with database.read() as connection:
        return connection.scalar(query) or 0


def newest_review(connection: sa.Connection) -> int:
    """Return the number of the newest review; 0 without any."""
    return connection.scalar(sa.select(sa.func.max(reviews.c.number))) or 0


def labelled_texts(connection: sa.Connection, held_out: bool) -> list[LabelledText]:
    """Return the accepted corrections for training (or the held-out ones), each text once: its newest review wins."""
    columns = corrections.c
    query = (
        sa.select(columns.text_key, columns.id, columns.text, columns.final_label)
        .where(columns.state == "accepted", columns.held_out == held_out)
        .order_by(columns.review)
    )
    newest = {key: LabelledText(id=i, text=text, label=label) for key, i, text, label in connection.execute(query)}
    return list(newest.values())
