"""What edges send: corrections, taken in before they are receipted, and how the edges are."""

from __future__ import annotations

import time

import flask
import msgspec
from flask.typing import ResponseReturnValue

from millpond.hub import corrections, edges
from millpond.hub.corrections import STATES, CorrectionPage, Intake, State
from millpond.hub.state import Hub
from millpond.schema import CorrectionBatch, CorrectionReceipt, EdgeReport, EdgeReportReceipt
from millpond.web import Access, ApiError, documented, json_response, read_json


class EdgesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/edges`."""

    edges: list[edges.EdgeView]


def blueprint(hub: Hub, access: Access) -> flask.Blueprint:
    """Return the addresses for edges, and those that list what they sent."""
    api = flask.Blueprint("feedback", __name__, url_prefix="/api/v1")

    @api.post("/corrections")
    @documented(body=CorrectionBatch, answer=CorrectionReceipt, errors={507: "No room on the disk.", 503: "Try again."})
    @access.required("edge")
    def take_in() -> ResponseReturnValue:
        """Take corrections in; what the receipt calls stored or known is on the disk."""
        return json_response(corrections.take_in(hub.database, read_json(Intake), hub.labels(), time.time()))

    @api.get("/corrections")
    @documented(answer=CorrectionPage, errors={400: "A parameter cannot be used."})
    @access.required("reviewer")
    def page() -> ResponseReturnValue:
        """Return corrections, oldest first: `state`, `edge`, `limit`, and `after` (the last id of the page before)."""
        after = flask.request.args.get("after") or None
        found = corrections.list_page(
            hub.database, state_argument(), flask.request.args.get("edge") or None, after, number_argument("limit", 100)
        )
        if found is None:
            raise ApiError(400, "unknown_id", "No correction has the id `after`.", "Begin again without `after`.")
        return json_response(CorrectionPage(corrections=found, counts=corrections.count_states(hub.database)))

    @api.post("/edges")
    @documented(body=EdgeReport, answer=EdgeReportReceipt)
    @access.required("edge")
    def report() -> ResponseReturnValue:
        """Keep what an edge says of itself; answer with the champion."""
        if not edges.keep(hub.database, read_json(EdgeReport), time.time()):
            message = f"The report has over {edges.MAX_REPORT_BYTES:,} bytes."
            raise ApiError(413, "report_too_large", message, "Send shorter strings.")
        return json_response(EdgeReportReceipt(champion=hub.champion_ref()))

    @api.get("/edges")
    @documented(answer=EdgesAnswer)
    @access.required("operator")
    def listed() -> ResponseReturnValue:
        """Return all edges with their newest reports."""
        return json_response(EdgesAnswer(edges=edges.listed(hub.database, time.time())))

    return api


def state_argument() -> State | None:
    """Return the query's `state`, None where it has none; raises ApiError for another word."""
    text = flask.request.args.get("state", "")
    for state in STATES:
        if text == state:
            return state
    if not text:
        return None
    raise ApiError(400, "invalid_parameter", f"state is {text[:50]!r}.", f"Use one of: {', '.join(STATES)}.")


def number_argument(name: str, default: int, most: int = corrections.MAX_PAGE, least: int = 1) -> int:
    """Return a whole number of the query; raises ApiError where it is none, or out of range."""
    text = flask.request.args.get(name, str(default))
    if text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= most:
        return int(text)
    message = f"{name} is {text[:50]!r}."
    raise ApiError(400, "invalid_parameter", message, f"Use a whole number from {least} to {most}.")
