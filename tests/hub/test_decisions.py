"""Reviewers' decisions over the hub's own addresses: applied once, never over another's unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from hub.talk import decide, one, post

Send = Callable[..., dict[str, Any]]


def test_decisions_are_applied_and_keep_who_and_when(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1), sent(2), sent(3)])
    receipt = decide(
        client,
        {"id": "c-1", "decision": "accept"},
        {"id": "c-2", "decision": "change", "label": "positive"},
        {"id": "c-3", "decision": "reject"},
    )
    assert [applied["state"] for applied in receipt["applied"]] == ["accepted", "accepted", "rejected"]
    assert receipt["refused"] == []
    accepted = one(client, "c-1")
    assert (accepted["state"], accepted["final_label"], accepted["reviewer"]) == ("accepted", "negative", "ada")
    assert accepted["reviewed"].endswith("Z")
    assert one(client, "c-2")["final_label"] == "positive"
    assert one(client, "c-3")["final_label"] is None


def test_the_same_decision_again_changes_nothing(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1)])
    first = decide(client, {"id": "c-1", "decision": "accept"})
    assert decide(client, {"id": "c-1", "decision": "accept"}, reviewer="bob") == first
    assert one(client, "c-1")["reviewer"] == "ada"


def test_a_reviewer_does_not_overwrite_another_unseen(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1)])
    decide(client, {"id": "c-1", "decision": "accept"})
    receipt = decide(client, {"id": "c-1", "decision": "reject"}, reviewer="bob")
    assert receipt["refused"] == [
        {"id": "c-1", "code": "judged_meanwhile", "reason": "ada has accepted as 'negative' it meanwhile"}
    ]
    assert one(client, "c-1")["state"] == "accepted"


def test_a_reviewer_who_has_seen_the_judgement_may_change_or_undo_it(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1)])
    seen = decide(client, {"id": "c-1", "decision": "accept"})["applied"][0]["review"]
    seen = decide(client, {"id": "c-1", "decision": "reject", "seen": seen}, reviewer="bob")["applied"][0]["review"]
    undone = decide(client, {"id": "c-1", "decision": "undo", "seen": seen}, reviewer="bob")["applied"][0]
    assert undone["state"] == "pending"
    assert one(client, "c-1")["final_label"] is None
    assert decide(client, {"id": "c-1", "decision": "accept"}, reviewer="eve")["refused"] == []


@pytest.mark.parametrize(
    ("decision", "code"),
    [
        ({"id": "nobody", "decision": "accept"}, "unknown_id"),
        ({"id": "c-1", "decision": "change"}, "label_missing"),
    ],
)
def test_a_decision_that_cannot_be_taken_is_refused_alone(
    client: FlaskClient, sent: Send, decision: dict[str, Any], code: str
) -> None:
    post(client, [sent(1), sent(2)])
    receipt = decide(client, decision, {"id": "c-2", "decision": "accept"})
    assert [refused["code"] for refused in receipt["refused"]] == [code]
    assert [applied["id"] for applied in receipt["applied"]] == ["c-2"]


def test_two_decisions_on_one_correction_in_a_request_are_not_both_taken(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1)])
    receipt = decide(client, {"id": "c-1", "decision": "accept"}, {"id": "c-1", "decision": "reject"})
    assert [refused["code"] for refused in receipt["refused"]] == ["given_twice"]
    assert one(client, "c-1")["state"] == "accepted"


def test_many_decisions_at_once_keep_their_order(client: FlaskClient, sent: Send) -> None:
    for start in range(0, 1200, 200):
        post(client, [sent(number) for number in range(start, start + 200)])
    receipt = decide(client, *({"id": f"c-{number}", "decision": "accept"} for number in range(1200)))
    assert [applied["id"] for applied in receipt["applied"]] == [f"c-{number}" for number in range(1200)]
    assert [applied["review"] for applied in receipt["applied"]] == list(range(1, 1201))
    assert one(client, "c-700")["review"] == 701


def test_the_same_text_is_shown_together(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1, text="Twice the same."), sent(2), sent(3, text="Twice  the same.\n")])
    queue = client.get("/api/v1/reviews").json
    assert [[c["id"] for c in group["corrections"]] for group in queue["groups"]] == [["c-1", "c-3"], ["c-2"]]
    rest = client.get(f"/api/v1/reviews?after={queue['groups'][0]['position']}").json
    assert [[c["id"] for c in group["corrections"]] for group in rest["groups"]] == [["c-2"]]


def test_the_queue_can_be_filtered_by_edge_and_state(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1)], edge="north")
    post(client, [sent(2)], edge="south")
    decide(client, {"id": "c-1", "decision": "reject"})
    queue = client.get("/api/v1/reviews?edge=south").json
    assert [group["corrections"][0]["id"] for group in queue["groups"]] == ["c-2"]
    assert queue["edges"] == ["north", "south"]
    rejected = client.get("/api/v1/reviews?state=rejected").json
    assert [group["corrections"][0]["id"] for group in rejected["groups"]] == ["c-1"]
