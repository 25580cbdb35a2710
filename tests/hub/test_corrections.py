"""Corrections over the hub's own addresses: once in, listed, out to training."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from hub.talk import decide, one, post
from millpond.hub import corrections, promotions
from millpond.hub.retrain import is_held_out, text_key
from millpond.schema import MAX_BATCH, MAX_CORRECTION_BYTES

Send = Callable[..., dict[str, Any]]


def test_a_correction_is_stored_once_whatever_is_sent_again(client: FlaskClient, sent: Send) -> None:
    items = [sent(1), sent(2)]
    assert post(client, items) == {"stored": ["c-1", "c-2"], "known": [], "refused": []}
    assert post(client, items) == {"stored": [], "known": ["c-1", "c-2"], "refused": []}
    assert post(client, [sent(2), sent(3)], edge="renamed") == {"stored": ["c-3"], "known": ["c-2"], "refused": []}
    assert client.get("/api/v1/corrections").json["counts"] == {"pending": 3, "accepted": 0, "rejected": 0}


def test_an_id_in_one_batch_twice_is_stored_once(client: FlaskClient, sent: Send) -> None:
    receipt = post(client, [sent(1), sent(1), sent(1, label="positive")])
    assert (receipt["stored"], receipt["known"]) == (["c-1"], ["c-1"])
    assert [refused["id"] for refused in receipt["refused"]] == ["c-1"]
    assert one(client, "c-1")["label"] == "negative"


def test_an_id_with_another_content_is_refused_and_changes_nothing(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(1)])
    receipt = post(client, [sent(1, text="Something else.")])
    assert "another content" in receipt["refused"][0]["reason"]
    assert one(client, "c-1")["text"] == sent(1)["text"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": "x" * (MAX_CORRECTION_BYTES + 1)}, "at most 1,048,576"),
        ({"text": "é" * (MAX_CORRECTION_BYTES // 2 + 1)}, "at most 1,048,576"),
        ({"text": "  \n "}, "empty"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": 7}, "Expected `str`, got `int`"),
        ({"label": ""}, "label"),
        ({"label": "x" * 201}, "label"),
        ({"note": "x" * 2001}, "note"),
        ({"predicted": "x" * 201}, "200 characters"),
        ({"scores": {"positive": "high"}}, "scores"),
        ({"scores": {str(number): 0.0 for number in range(1001)}}, "1001 scores"),
        ({"created": "x" * 65}, "characters"),
        ({"model": {"name": "m", "version": "v" * 300, "digest": "d"}}, "200 characters"),
        ({"model": "sentiment"}, "model"),
        ({"id": "../../etc"}, "id"),
    ],
)
def test_a_bad_correction_is_refused_with_its_reason_and_the_others_are_stored(
    client: FlaskClient, sent: Send, changes: dict[str, Any], reason: str
) -> None:
    bad = sent(1, **changes)
    receipt = post(client, [sent(0), bad, sent(2)])
    assert receipt["stored"] == ["c-0", "c-2"]
    assert [refused["id"] for refused in receipt["refused"]] == [bad["id"]]
    assert reason in receipt["refused"][0]["reason"]


@pytest.mark.parametrize("raw", ["null", "[]", "7", '"text"', '{"id": 7}', "{}"])
def test_what_has_no_id_is_refused_by_its_place(client: FlaskClient, sent: Send, raw: str) -> None:
    receipt = post(client, [sent(0), json.loads(raw)])
    assert receipt["stored"] == ["c-0"]
    assert receipt["refused"][0]["id"] == "#1"


def test_labels_that_the_champion_does_not_know_are_refused(client: FlaskClient, sent: Send, bench: Any) -> None:
    assert post(client, [sent(1, label="whatever")])["stored"] == ["c-1"]  # no champion yet: any label may be right
    client.post("/api/v1/jobs", json={})
    bench.turn(lambda: promotions.newest(bench.hub))
    receipt = post(client, [sent(2), sent(3, label="neutral")])
    assert receipt["stored"] == ["c-2"]
    assert receipt["refused"] == [
        {"id": "c-3", "reason": "the label 'neutral' is unknown; the labels are 'negative', 'positive'"}
    ]


def test_a_batch_has_a_largest_size(client: FlaskClient, sent: Send) -> None:
    answer = client.post(
        "/api/v1/corrections", json={"edge": "e", "corrections": [sent(n) for n in range(MAX_BATCH + 1)]}
    )
    assert answer.status_code == 400
    assert str(MAX_BATCH) in answer.json["error"]["message"]
    assert len(post(client, [sent(n) for n in range(MAX_BATCH)])["stored"]) == MAX_BATCH


def test_corrections_are_listed_in_order_page_by_page(client: FlaskClient, sent: Send) -> None:
    post(client, [sent(n) for n in range(7)])
    seen, after = [], ""
    while page := client.get(f"/api/v1/corrections?state=pending&limit=3&after={after}").json["corrections"]:
        seen += [found["id"] for found in page]
        after = page[-1]["id"]
    assert seen == [f"c-{n}" for n in range(7)]


def test_a_page_ends_before_its_texts_grow_too_large(client: FlaskClient, sent: Send) -> None:
    for number in range(6):
        post(client, [sent(number, text=f"{number}" + "x" * (MAX_CORRECTION_BYTES - 1))])
    page = client.get("/api/v1/corrections?limit=6").json["corrections"]
    assert len(page) == 4
    assert len(client.get(f"/api/v1/corrections?after={page[-1]['id']}").json["corrections"]) == 2


@pytest.mark.parametrize(
    "query",
    ["state=maybe", "limit=0", "limit=x", "limit=1001", "limit=-1", "limit=٣", "after=nobody", "limit=" + "9" * 5000],
)
def test_a_parameter_that_cannot_be_is_refused(client: FlaskClient, query: str) -> None:
    answer = client.get(f"/api/v1/corrections?{query}")
    assert answer.status_code == 400
    assert answer.json["error"]["next"]


# --- training -----------------------------------------------------------------------------------------------------


def test_training_gets_each_text_once_with_its_newest_judgement(client: FlaskClient, sent: Send, bench: Any) -> None:
    training = next(text for text in map("Text {}".format, range(99)) if not is_held_out(text_key(text)))
    held_out = next(text for text in map("Text {}".format, range(99)) if is_held_out(text_key(text)))
    post(client, [sent(1, text=training), sent(2, text=f" {training}"), sent(3, text=held_out), sent(4, text="left")])
    decide(client, {"id": "c-2", "decision": "accept"}, {"id": "c-3", "decision": "accept"})
    decide(client, {"id": "c-1", "decision": "change", "label": "positive"}, {"id": "c-4", "decision": "reject"})
    with bench.hub.database.read() as connection:
        trains = corrections.labelled_texts(connection, held_out=False)
        measures = corrections.labelled_texts(connection, held_out=True)
    assert [(row.id, row.label) for row in trains] == [("c-1", "positive")]
    assert [(row.id, row.label) for row in measures] == [("c-3", "negative")]
