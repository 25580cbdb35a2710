"""JSON in and out, errors, headers, and what `/openapi.json` says."""

from __future__ import annotations

import flask
import pytest
from werkzeug.test import TestResponse


def error(response: TestResponse) -> dict[str, str]:
    assert response.json is not None
    assert set(response.json) == {"error"}
    assert all(response.json["error"].values())
    detail: dict[str, str] = response.json["error"]
    return detail


def post(app: flask.Flask, body: bytes, kind: str | None = "application/json", **headers: str) -> TestResponse:
    return app.test_client().post("/orders", data=body, content_type=kind, headers=headers)


def test_json_comes_in_typed_and_goes_out(open_app: flask.Flask) -> None:
    response = post(open_app, '{"item": "ä", "unknown": 1}'.encode(), "application/json; charset=utf-8")
    assert response.json == {"item": "ä", "count": 1}


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
def test_another_content_type_is_415(open_app: flask.Flask, kind: str | None) -> None:
    response = post(open_app, b'{"item": "a"}', kind)
    assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")


def test_a_compressed_body_is_415(open_app: flask.Flask) -> None:
    response = post(open_app, b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert (response.status_code, error(response)["code"]) == (415, "unsupported_encoding")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"item": "a"} x', b"\xff\xfe", b'{"item": "\xff"}', b'{"item": "\\ud800"}', b'{"item": NaN}',
        b"[" * 900, b'{"x":' * 150, b"\x80\x04\x95.",
    ],
)  # fmt: skip
def test_what_is_not_json_is_400(open_app: flask.Flask, body: bytes) -> None:
    response = post(open_app, body)
    assert response.status_code == 400
    assert error(response)["code"] in ("invalid_json", "invalid_request")


@pytest.mark.parametrize(
    ("body", "field"),
    [(b'{"item": 5}', "$.item"), (b'{"item": "a", "count": "2"}', "$.count"), (b"{}", "item"), (b"[]", "object")],
)
def test_a_wrong_type_is_400_and_names_the_field(open_app: flask.Flask, body: bytes, field: str) -> None:
    response = post(open_app, body)
    assert (response.status_code, error(response)["code"]) == (400, "invalid_request")
    assert field in error(response)["message"]


def test_a_body_over_the_limit_is_413(open_app: flask.Flask) -> None:
    response = post(open_app, b'{"item": "' + b"a" * 1000 + b'"}')
    assert (response.status_code, error(response)["code"]) == (413, "request_too_large")
    assert "1,000 bytes" in error(response)["message"]


def test_errors_carry_their_headers(open_app: flask.Flask) -> None:
    response = open_app.test_client().get("/busy")
    assert (response.status_code, error(response)["code"], response.headers["Retry-After"]) == (503, "busy", "7")
    assert set(open_app.test_client().get("/orders").headers["Allow"].split(", ")) == {"OPTIONS", "POST"}


def test_an_unexpected_error_tells_the_log_and_not_the_caller(
    open_app: flask.Flask, caplog: pytest.LogCaptureFixture
) -> None:
    response = open_app.test_client().get("/broken")
    assert (response.status_code, error(response)["code"]) == (500, "internal_error")
    assert "secret detail" not in response.text
    assert "secret detail" in caplog.text


def test_a_browser_gets_errors_as_a_page(open_app: flask.Flask) -> None:
    response = open_app.test_client().get("/nowhere", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert response.status_code == 404
    assert response.mimetype == "text/html"
    assert "nothing at this address" in response.text
    assert open_app.test_client().get("/nowhere", headers={"Accept": "*/*"}).is_json


@pytest.mark.parametrize("path", ["/page", "/nowhere", "/broken", "/healthz"])
def test_every_answer_has_the_security_headers(open_app: flask.Flask, path: str) -> None:
    headers = open_app.test_client().get(path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


def test_pages_need_nothing_from_elsewhere(open_app: flask.Flask) -> None:
    client = open_app.test_client()
    page = client.get("/page").text
    assert "http://" not in page
    assert "https://" not in page
    assert "<style" not in page
    with client.get("/web/millpond.css") as style:
        assert style.status_code == 200
        assert "prefers-color-scheme: dark" in style.text
        assert "url(" not in style.text


def test_openapi_describes_the_views(open_app: flask.Flask) -> None:
    document = open_app.test_client().get("/openapi.json").json
    assert document is not None
    assert document["openapi"] == "3.1.0"
    order = document["paths"]["/orders"]["post"]
    assert order["summary"] == "Take an order."
    assert order["security"] == [{"token": []}]
    assert order["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Order"}
    assert set(order["responses"]) == {"200", "400"}
    assert document["components"]["schemas"]["Order"]["required"] == ["item"]
    assert document["paths"]["/reviews/{number}"]["get"]["parameters"][0]["name"] == "number"
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "/page" not in document["paths"]
