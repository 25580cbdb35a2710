"""The HTTP interface in this process: answers, feedback, limits, what is said when something is missing."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from edge_site import Site, score
from millpond.edge.app import Edge
from millpond.schema import MAX_CORRECTION_BYTES, RefusedCorrection
from millpond.settings import EdgeSettings

if TYPE_CHECKING:
    from conftest import Puller

MakeApp = Callable[[EdgeSettings], tuple[FlaskClient, Edge]]


@pytest.fixture
def served(make_app: MakeApp, settings: EdgeSettings, puller: Puller, site: Site) -> tuple[FlaskClient, Edge]:
    """Return a client of an edge that serves v1."""
    site.publish("v1")
    puller.step()
    return make_app(settings)


@pytest.fixture
def client(served: tuple[FlaskClient, Edge]) -> FlaskClient:
    return served[0]


@pytest.fixture
def edge(served: tuple[FlaskClient, Edge]) -> Edge:
    return served[1]


@pytest.fixture
def bare(make_app: MakeApp, settings: EdgeSettings) -> FlaskClient:
    """Return a client of an edge without a model."""
    return make_app(settings)[0]


def code(response: TestResponse) -> str:
    assert response.json is not None, response.text
    error = response.json["error"]
    assert error["message"]
    assert error["next"]
    return str(error["code"])


def body(response: TestResponse, status: int = 200) -> Any:
    assert response.status_code == status, response.text
    return response.json


# --- predict ----------------------------------------------------------------------------------------------------------


def test_one_text_is_classified(client: FlaskClient, edge: Edge) -> None:
    answer = body(client.post("/v1/predict", json={"text": "a good film"}))
    assert answer["label"] == "positive"
    assert answer["scores"] == pytest.approx({"negative": 1 - score("good"), "positive": score("good")}, abs=1e-6)
    assert answer["score"] == answer["scores"]["positive"]
    assert answer["model"] == {"name": "sentiment", "version": "v1", "digest": edge.engine.ref.digest}
    assert len(answer["id"]) == 32


def test_several_texts_are_classified_in_order_by_one_model(client: FlaskClient) -> None:
    answer = body(client.post("/v1/predict", json={"texts": ["good", "bad", "", "good bad bad"]}))
    assert [row["label"] for row in answer["predictions"]][:2] == ["positive", "negative"]
    assert answer["predictions"][3]["label"] == "negative"
    assert answer["model"]["version"] == "v1"
    assert len({row["id"] for row in answer["predictions"]}) == 4
    assert set(answer["predictions"][0]) == {"id", "label", "score", "scores"}


@pytest.mark.parametrize(
    ("request_body", "status", "expected"),
    [
        ({}, 400, "invalid_request"),
        ({"text": "a", "texts": ["b"]}, 400, "invalid_request"),
        ({"text": 5}, 400, "invalid_request"),
        ({"text": None}, 400, "invalid_request"),
        ({"texts": "a"}, 400, "invalid_request"),
        ({"texts": ["a", 5]}, 400, "invalid_request"),
        ([], 400, "invalid_request"),
        ({"texts": []}, 400, "no_texts"),
        ({"texts": ["a"] * 9}, 413, "too_many_texts"),
        ({"text": "a" * 2001}, 413, "text_too_long"),
        ({"text": "ü" * 1001}, 413, "text_too_long"),
        ({"texts": ["a", "b" * 2001]}, 413, "text_too_long"),
        ({"texts": ["a" * 1900] * 60}, 413, "request_too_large"),
    ],
)
def test_what_does_not_fit_is_refused(client: FlaskClient, request_body: Any, status: int, expected: str) -> None:
    response = client.post("/v1/predict", json=request_body)
    assert (response.status_code, code(response)) == (status, expected)


def test_the_longest_text_fits(client: FlaskClient) -> None:
    assert body(client.post("/v1/predict", json={"text": "ü" * 1000}))["label"]


def test_without_a_model_callers_are_asked_to_come_back(bare: FlaskClient) -> None:
    for response in (bare.post("/v1/predict", json={"text": "a"}), bare.get("/readyz")):
        assert (response.status_code, code(response)) == (503, "no_model")
        assert int(response.headers["Retry-After"]) >= 1
    assert body(bare.get("/healthz")) == {"status": "ok"}
    assert body(bare.get("/v1/model"))["serving"] is None


def test_with_a_model_it_is_ready(client: FlaskClient) -> None:
    assert body(client.get("/readyz")) == {"status": "ready", "version": "v1"}


def test_predicting_goes_on_where_it_cannot_be_remembered(
    client: FlaskClient, edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(predictions: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(edge.predictions, "add", full)
    answer = body(client.post("/v1/predict", json={"text": "good"}))
    assert answer["label"] == "positive"
    assert "millpond_edge_predictions_not_kept_total" in client.get("/metrics").text


# --- feedback ---------------------------------------------------------------------------------------------------------


def predict(client: FlaskClient, text: str = "good film") -> str:
    return str(body(client.post("/v1/predict", json={"text": text}))["id"])


def test_feedback_on_a_prediction_becomes_a_correction_on_disk(client: FlaskClient, edge: Edge) -> None:
    prediction = predict(client)
    answer = body(client.post("/v1/feedback", json={"id": prediction, "label": "negative", "note": "irony"}), 202)
    (correction,) = edge.outbox.waiting(10)
    assert answer == {"id": correction.id, "state": "waiting"}
    assert (correction.text, correction.label, correction.predicted) == ("good film", "negative", "positive")
    assert correction.note == "irony"
    assert correction.model == edge.engine.ref
    assert correction.scores["positive"] > 0.9
    assert correction.created.endswith("Z")


def test_feedback_on_a_text_needs_no_prediction(client: FlaskClient, edge: Edge) -> None:
    body(client.post("/v1/feedback", json={"text": "a new text", "label": "positive"}), 202)
    (correction,) = edge.outbox.waiting(10)
    assert (correction.text, correction.label, correction.predicted) == ("a new text", "positive", None)


def test_the_same_feedback_again_is_the_same_correction(client: FlaskClient, edge: Edge) -> None:
    prediction = predict(client)
    first = body(client.post("/v1/feedback", json={"id": prediction, "label": "negative"}), 202)
    assert body(client.post("/v1/feedback", json={"id": prediction, "label": "negative"}), 202) == first
    edge.outbox.settle([first["id"]], [])
    again = body(client.post("/v1/feedback", json={"id": prediction, "label": "negative"}), 202)
    assert again == {"id": first["id"], "state": "stored"}
    other = body(client.post("/v1/feedback", json={"id": prediction, "label": "positive"}), 202)
    assert other["id"] != first["id"]


def test_an_idempotency_key_makes_a_repeated_text_the_same_correction(client: FlaskClient, edge: Edge) -> None:
    def send(text: str, **headers: str) -> str:
        response = client.post("/v1/feedback", json={"text": text, "label": "positive"}, headers=headers)
        return str(body(response, 202)["id"])

    key = {"Idempotency-Key": "k-1"}
    assert send("one", **key) == send("one", **key)
    assert edge.outbox.count("waiting") == 1
    # the same key with another content is not thrown away: accepted means stored
    assert send("two", **key) != send("one", **key)
    assert send("three") != send("three")
    assert edge.outbox.count("waiting") == 4


@pytest.mark.parametrize(
    ("request_body", "status", "expected"),
    [
        ({"label": "positive"}, 400, "invalid_request"),
        ({"id": "a", "text": "b", "label": "positive"}, 400, "invalid_request"),
        ({"text": "b"}, 400, "invalid_request"),
        ({"text": "b", "label": ""}, 400, "invalid_request"),
        ({"text": "b", "label": "x" * 201}, 400, "invalid_request"),
        ({"text": "b", "label": "positive", "note": "x" * 2001}, 400, "invalid_request"),
        ({"text": "b", "label": "neutral"}, 400, "unknown_label"),
        ({"text": " \n", "label": "positive"}, 400, "empty_text"),
        ({"text": "a\0", "label": "positive"}, 400, "nul"),
        ({"text": "a", "label": "positive", "note": "\0"}, 400, "nul"),
        ({"text": "x" * 2001, "label": "positive"}, 413, "text_too_long"),
        ({"id": "0" * 32, "label": "positive"}, 404, "unknown_prediction"),
        ({"id": "../../etc", "label": "positive"}, 400, "invalid_request"),
        ({"id": "x" * 200, "label": "positive"}, 400, "invalid_request"),
    ],
)
def test_feedback_that_does_not_fit_is_refused(
    client: FlaskClient, edge: Edge, request_body: Any, status: int, expected: str
) -> None:
    response = client.post("/v1/feedback", json=request_body)
    assert (response.status_code, code(response)) == (status, expected)
    assert edge.outbox.total() == 0


def test_an_unknown_label_of_a_prediction_is_refused_with_the_known_ones(client: FlaskClient) -> None:
    response = client.post("/v1/feedback", json={"id": predict(client), "label": "neutral"})
    assert (response.status_code, code(response)) == (400, "unknown_label")
    assert "'negative', 'positive'" in response.text


def test_a_text_that_the_hub_would_not_take_is_refused_here(
    make_app: MakeApp, settings: EdgeSettings, puller: Puller, site: Site
) -> None:
    site.publish("v1")
    puller.step()
    large = dataclasses.replace(settings, max_text_bytes=2 * MAX_CORRECTION_BYTES, max_request_bytes=2**23)
    client, _ = make_app(large)
    prediction = predict(client, "x" * (MAX_CORRECTION_BYTES + 1))
    response = client.post("/v1/feedback", json={"id": prediction, "label": "negative"})
    assert (response.status_code, code(response)) == (413, "text_too_long")


def test_a_key_that_is_too_long_is_refused(client: FlaskClient) -> None:
    headers = {"Idempotency-Key": "k" * 256}
    response = client.post("/v1/feedback", json={"text": "a", "label": "positive"}, headers=headers)
    assert (response.status_code, code(response)) == (400, "invalid_request")


def test_a_full_outbox_is_507_before_the_202(
    make_app: MakeApp, settings: EdgeSettings, puller: Puller, site: Site
) -> None:
    site.publish("v1")
    puller.step()
    client, edge = make_app(dataclasses.replace(settings, max_outbox=1))
    body(client.post("/v1/feedback", json={"text": "a", "label": "positive"}), 202)
    response = client.post("/v1/feedback", json={"text": "b", "label": "positive"})
    assert (response.status_code, code(response)) == (507, "insufficient_storage")
    assert edge.outbox.count("waiting") == 1


def test_what_the_hub_refused_is_not_taken_in_again(client: FlaskClient, edge: Edge) -> None:
    prediction = predict(client)
    first = body(client.post("/v1/feedback", json={"id": prediction, "label": "negative"}), 202)
    edge.outbox.settle([], [RefusedCorrection(id=first["id"], reason="a reason of the hub")])
    response = client.post("/v1/feedback", json={"id": prediction, "label": "negative"})
    assert (response.status_code, code(response)) == (409, "refused_by_hub")
    assert "a reason of the hub" in response.text


def test_feedback_is_taken_in_without_a_model(bare: FlaskClient) -> None:
    body(bare.post("/v1/feedback", json={"text": "a", "label": "any label"}), 202)


def test_feedback_names_a_prediction_of_another_worker(
    client: FlaskClient, make_app: MakeApp, settings: EdgeSettings
) -> None:
    prediction = predict(client)
    other, _ = make_app(settings)
    body(other.post("/v1/feedback", json={"id": prediction, "label": "negative"}), 202)


def test_the_latest_feedback_is_listed_with_what_became_of_it(client: FlaskClient, edge: Edge) -> None:
    first = body(client.post("/v1/feedback", json={"text": "x" * 500, "label": "positive"}), 202)
    second = body(client.post("/v1/feedback", json={"text": "two", "label": "negative", "note": "n"}), 202)
    edge.outbox.settle([first["id"]], [RefusedCorrection(id=second["id"], reason="why")])
    newest, oldest = body(client.get("/v1/feedback"))["corrections"]
    assert (newest["text"], newest["state"], newest["reason"], newest["note"]) == ("two", "refused", "why", "n")
    assert (oldest["text"], oldest["state"]) == ("x" * 200, "stored")
    assert len(body(client.get("/v1/feedback?limit=1"))["corrections"]) == 1
    assert len(body(client.get("/v1/feedback?limit=junk"))["corrections"]) == 2
    assert len(body(client.get("/v1/feedback?limit=-5"))["corrections"]) == 1


# --- model, metrics, the page -----------------------------------------------------------------------------------------


def test_the_model_says_what_is_served_what_was_refused_and_what_waits(
    client: FlaskClient, edge: Edge, puller: Puller, site: Site
) -> None:
    first = edge.engine.ref.digest
    second = site.publish("v2", lean=1.0)
    puller.step()
    bad = site.publish("v3", golden_lean=2.0)
    puller.step()
    edge.live.follow()
    client.post("/v1/feedback", json={"text": "a", "label": "positive"})
    answer = body(client.get("/v1/model"))
    assert answer["edge"] == "edge-1"
    assert (answer["serving"]["version"], answer["serving"]["digest"]) == ("v2", second)
    assert answer["serving"]["metrics"] == {"test_accuracy": 0.9}
    assert [ref["digest"] for ref in answer["previous"]] == [first]
    assert (answer["refused"]["digest"], answer["refused"]["version"]) == (bad, "v3")
    assert answer["refused"]["reason"].startswith("golden: ")
    assert answer["sync"]["champion"] == bad
    assert (answer["sync"]["outbox"], answer["sync"]["set_aside"]) == (1, 0)


def test_metrics_tell_model_refusals_and_outbox(client: FlaskClient, puller: Puller, site: Site) -> None:
    site.publish("v2", golden_lean=2.0)
    puller.step()
    client.post("/v1/predict", json={"texts": ["good", "bad"]})
    client.post("/v1/feedback", json={"text": "a", "label": "positive"})
    text = client.get("/metrics").text
    assert 'millpond_edge_model_info{digest="sha256:' in text
    assert 'millpond_edge_model_refused_total{reason="golden"} 1.0' in text
    assert "millpond_edge_outbox_waiting 1.0" in text
    assert "millpond_edge_corrections_total 1.0" in text
    assert 'millpond_edge_predictions_total{label="positive",version="v1"}' in text
    assert 'route="/v1/predict",status="200"' in text


def test_all_addresses_are_in_openapi(client: FlaskClient) -> None:
    paths = body(client.get("/openapi.json"))["paths"]
    assert set(paths) == {"/v1/predict", "/v1/feedback", "/v1/model", "/healthz", "/readyz"}
    assert set(paths["/v1/feedback"]) == {"get", "post"}
    assert {"507", "202"} <= set(paths["/v1/feedback"]["post"]["responses"])


def test_with_a_token_all_but_health_needs_it(make_app: MakeApp, settings: EdgeSettings) -> None:
    client, _ = make_app(dataclasses.replace(settings, token="a-token"))
    for method, path in (
        ("POST", "/v1/predict"), ("POST", "/v1/feedback"), ("GET", "/v1/feedback"), ("GET", "/v1/model"),
        ("GET", "/metrics"),
    ):  # fmt: skip
        assert client.open(path, method=method, json={}).status_code == 401, path
    assert client.get("/").headers["Location"].startswith("/login")
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert client.get("/v1/model", headers={"Authorization": "Bearer a-token"}).status_code == 200


def test_the_page_has_no_inline_script_or_style(client: FlaskClient) -> None:
    page = client.get("/").text
    assert "edge-1" in page
    assert "<script src=" in page
    assert page.count("<script") == 1
    assert "style=" not in page
    assert " on" + "click" not in page
