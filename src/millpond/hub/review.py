"""The review page, and the address that takes decisions of people, rules and scripts."""

from __future__ import annotations

import time

import flask
import msgspec
from flask.typing import ResponseReturnValue

from millpond.hub import corrections, decisions
from millpond.hub.corrections import StoredCorrection
from millpond.hub.decisions import ReviewReceipt, ReviewRequest
from millpond.hub.feedback_api import number_argument, state_argument
from millpond.hub.state import Hub
from millpond.web import Access, documented, json_response, read_json

MAX_GROUPS = 50


class TextGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Corrections of the same text; `position` is where the next page begins."""

    position: int
    corrections: list[StoredCorrection]


class ReviewQueue(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/reviews`: what the review page shows."""

    groups: list[TextGroup]
    counts: dict[str, int]
    labels: list[str]
    edges: list[str]


def blueprint(hub: Hub, access: Access) -> flask.Blueprint:
    """Return the page and the addresses for reviewers."""
    pages = flask.Blueprint("review", __name__)

    @pages.get("/review")
    @access.required("reviewer", page=True)
    def page() -> ResponseReturnValue:
        """Show the review page."""
        return flask.render_template("review.html", model=hub.settings.model)

    @pages.get("/api/v1/reviews")
    @documented(answer=ReviewQueue, errors={400: "A parameter cannot be used."})
    @access.required("reviewer")
    def queue() -> ResponseReturnValue:
        """Return corrections grouped by text, oldest first: `state`, `edge`, `limit`, `after` (a position)."""
        groups = corrections.list_groups(
            hub.database,
            state_argument() or "pending",
            flask.request.args.get("edge") or None,
            number_argument("after", 0, most=2**31, least=0),
            number_argument("limit", 20, MAX_GROUPS),
        )
        by_edge = corrections.count_by_edge(hub.database)
        answer = ReviewQueue(
            groups=[TextGroup(position=position, corrections=members) for position, members in groups],
            counts=corrections.count_states(hub.database),
            labels=hub.labels() or sorted({member.label for _, members in groups for member in members}),
            edges=sorted(by_edge),
        )
        return json_response(answer)

    @pages.post("/api/v1/reviews")
    @documented(body=ReviewRequest, answer=ReviewReceipt)
    @access.required("reviewer")
    def decide() -> ResponseReturnValue:
        """Take decisions; each is applied or refused by itself, with a reason."""
        request = read_json(ReviewRequest)
        return json_response(decisions.review(hub.database, request, hub.labels(), time.time()))

    return pages
