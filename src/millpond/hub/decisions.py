"""Reviewers' decisions on corrections: each is applied or refused by itself, and keeps who and when.

Promises that two reviewers never overwrite each other unseen. Knows the database, not HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from millpond.hub.corrections import MAX_SHORT, State, named
from millpond.hub.db import Database, corrections, reviews
from millpond.schema import Identifier, Label

MAX_DECISIONS = 10_000
CHUNK = 500
"""Decisions that go to the database at once."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a reviewer says about a correction; `undo` makes it pending again.

    `seen` is the number of the review that the reviewer saw as its newest (None: none yet). A decision on a
    correction that was judged meanwhile is refused, so that nobody overwrites another's judgement unseen.
    """

    id: Identifier
    decision: Literal["accept", "change", "reject", "undo"]
    label: Label | None = None
    seen: int | None = None


class ReviewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/v1/reviews`: decisions of one reviewer (a person, or a rule such as `rule:demo`)."""

    reviewer: Annotated[str, Meta(min_length=1, max_length=MAX_SHORT)]
    decisions: Annotated[list[Decision], Meta(max_length=MAX_DECISIONS)]


class AppliedDecision(msgspec.Struct, frozen=True, kw_only=True):
    """A decision that holds now: the correction's state, and the number of its newest review."""

    id: str
    state: State
    review: int


class RefusedDecision(msgspec.Struct, frozen=True, kw_only=True):
    """A decision that was not taken.

    `code` is `unknown_id`, `unknown_label`, `label_missing`, `judged_meanwhile` or `given_twice`.
    """

    id: str
    code: str
    reason: str


class ReviewReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a `ReviewRequest`; decisions are independent of each other."""

    applied: list[AppliedDecision]
    refused: list[RefusedDecision]


def review(database: Database, request: ReviewRequest, labels: Sequence[str] | None, now: float) -> ReviewReceipt:
    """Apply decisions, each to the correction as its reviewer saw it; the same decision again changes nothing."""
    receipt = ReviewReceipt(applied=[], refused=[])
    decisions: dict[str, Decision] = {}
    for decision in request.decisions:
        if decisions.setdefault(decision.id, decision) is not decision:
            reason = "this request has a decision on it already"
            receipt.refused.append(RefusedDecision(id=decision.id, code="given_twice", reason=reason))
    with database.write() as connection:
        for some in _batched(decisions.values(), CHUNK):
            taken = _take(connection, some, labels, receipt)
            _write_reviews(connection, taken, request.reviewer, now, receipt)
    return receipt


def _batched(values: Iterable[Decision], size: int) -> Iterator[list[Decision]]:  # in itertools from Python 3.12 on
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some


@dataclass(frozen=True)
class _Taken:
    """A decision that changes a correction."""

    id: str
    number: int
    decision: str
    state: State
    final_label: str | None


def _take(
    connection: sa.Connection, decisions: Sequence[Decision], labels: Sequence[str] | None, receipt: ReviewReceipt
) -> list[_Taken]:
    columns = corrections.c
    chosen = (columns.id, columns.number, columns.state, columns.label, columns.final_label, columns.reviewer)
    query = sa.select(*chosen, columns.review).where(columns.id.in_([decision.id for decision in decisions]))
    rows = {row.id: row for row in connection.execute(query)}
    taken = []
    for decision in decisions:
        outcome = _decide(decision, rows.get(decision.id), labels)
        if isinstance(outcome, _Taken):
            taken.append(outcome)
        elif isinstance(outcome, AppliedDecision):
            receipt.applied.append(outcome)
        else:
            receipt.refused.append(RefusedDecision(id=decision.id, code=outcome[0], reason=outcome[1]))
    return taken


def _decide(
    decision: Decision, row: Any | None, labels: Sequence[str] | None
) -> _Taken | AppliedDecision | tuple[str, str]:
    if row is None:
        return "unknown_id", "no correction has this id"
    label = decision.label if decision.decision == "change" else row.label
    if label is None:
        return "label_missing", "the decision 'change' needs a label"
    if decision.decision in ("accept", "change") and labels is not None and label not in labels:
        return "unknown_label", f"the label {label!r} is unknown; the labels are {named(labels)}"
    state: State = {"reject": "rejected", "undo": "pending"}.get(decision.decision, "accepted")  # type: ignore[assignment]
    final_label = label if state == "accepted" else None
    if (row.state, row.final_label) == (state, final_label):
        return AppliedDecision(id=decision.id, state=state, review=row.review or 0)
    if row.review != decision.seen and not (row.state == "pending" and decision.seen is None):
        said = {"accepted": f"accepted as {row.final_label!r}", "rejected": "rejected", "pending": "made pending again"}
        return "judged_meanwhile", f"{row.reviewer} has {said[row.state]} it meanwhile"
    return _Taken(decision.id, row.number, decision.decision, state, final_label)


def _write_reviews(
    connection: sa.Connection, taken: Sequence[_Taken], reviewer: str, now: float, receipt: ReviewReceipt
) -> None:
    if not taken:
        return
    rows = [
        {"correction": one.number, "decision": one.decision, "label": one.final_label, "reviewer": reviewer, "at": now}
        for one in taken
    ]
    numbers = connection.scalars(sa.insert(reviews).returning(reviews.c.number, sort_by_parameter_order=True), rows)
    changes = []
    for one, number in zip(taken, numbers, strict=True):
        changes.append({"of": one.number, "to": one.state, "as": one.final_label, "by": number})
        receipt.applied.append(AppliedDecision(id=one.id, state=one.state, review=number))
    update = sa.update(corrections).where(corrections.c.number == sa.bindparam("of"))
    bound = {"state": sa.bindparam("to"), "final_label": sa.bindparam("as"), "review": sa.bindparam("by")}  # type: ignore[var-annotated]
    connection.execute(update.values(reviewer=reviewer, reviewed=now, **bound), changes)
