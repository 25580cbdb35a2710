"""What the tests of the hub say to it over HTTP."""

from __future__ import annotations

from typing import Any

from flask.testing import FlaskClient


def post(client: FlaskClient, items: list[Any], edge: str = "edge-1") -> dict[str, Any]:
    answer = client.post("/api/v1/corrections", json={"edge": edge, "corrections": items})
    assert answer.status_code == 200, answer.text
    return dict(answer.json or {})


def decide(client: FlaskClient, *decisions: dict[str, Any], reviewer: str = "ada") -> dict[str, Any]:
    answer = client.post("/api/v1/reviews", json={"reviewer": reviewer, "decisions": list(decisions)})
    assert answer.status_code == 200, answer.text
    return dict(answer.json or {})


def one(client: FlaskClient, correction_id: str) -> dict[str, Any]:
    page = client.get("/api/v1/corrections?limit=1000").json
    return next(found for found in page["corrections"] if found["id"] == correction_id)
