"""Tokens, roles, the login cookie, and requests that other web sites make."""

from __future__ import annotations

import time
from collections.abc import Callable

import flask
import pytest
from werkzeug.test import TestResponse

from millpond.web import access as access_module

TOKENS = {"edge": "edge-token-1", "reviewer": "reviewer-token-2", "operator": "operator-token-3"}
ORDER = {"item": "a"}


def bearer(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[role]}"}


def code(response: TestResponse) -> str:
    assert response.json is not None
    return str(response.json["error"]["code"])


def test_without_any_token_everybody_is_allowed_everything(open_app: flask.Flask) -> None:
    client = open_app.test_client()
    assert client.post("/orders", json=ORDER).status_code == 200
    assert client.get("/reviews/1").status_code == 200
    assert client.get("/page").status_code == 200


@pytest.mark.parametrize("role", TOKENS)
def test_a_token_allows_its_role_and_the_lower_ones(guarded: flask.Flask, role: str) -> None:
    client = guarded.test_client()
    assert client.post("/orders", json=ORDER, headers=bearer(role)).status_code == 200
    assert client.get("/reviews/1", headers=bearer(role)).status_code == (403 if role == "edge" else 200)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Basic ZWRnZS10b2tlbi0x", "edge-token-1", "Bearer edge-token-1x"],
)
def test_anything_but_a_known_token_is_refused(guarded: flask.Flask, header: str) -> None:
    response = guarded.test_client().post("/orders", json=ORDER, headers={"Authorization": header} if header else {})
    assert (response.status_code, code(response)) == (401, "token_required")
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_role_without_a_token_cannot_be_had_by_an_empty_one(
    build_app: Callable[[dict[str, str]], flask.Flask],
) -> None:
    client = build_app(TOKENS | {"reviewer": ""}).test_client()
    assert client.get("/reviews/1", headers={"Authorization": "Bearer "}).status_code == 401
    assert client.get("/reviews/1", headers=bearer("operator")).status_code == 200


def test_a_person_logs_in_once_and_the_cookie_holds_no_token(guarded: flask.Flask) -> None:
    client = guarded.test_client()
    refused = client.get("/page?x=1")
    assert (refused.status_code, refused.headers["Location"]) == (302, "/login?next=/page?x%3D1")
    response = client.post("/login", data={"token": TOKENS["reviewer"], "next": "/page?x=1"})
    assert (response.status_code, response.headers["Location"]) == (303, "/page?x=1")
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert not any(token in cookie for token in TOKENS.values())
    assert client.get("/page").status_code == 200
    assert client.get("/reviews/1").status_code == 200
    client.post("/logout")
    assert client.get("/page").status_code == 302


def test_the_login_page_says_when_a_token_is_wrong(guarded: flask.Flask) -> None:
    response = guarded.test_client().post("/login", data={"token": "nonsense"})
    assert response.status_code == 401
    assert "not known here" in response.text
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize("target", ["https://evil.example/", "//evil.example", "/\\evil.example", "evil", "/a\nb", ""])
def test_the_login_never_sends_people_to_another_site(guarded: flask.Flask, target: str) -> None:
    response = guarded.test_client().post("/login", data={"token": TOKENS["edge"], "next": target})
    assert response.headers["Location"] == "/"


@pytest.mark.parametrize("change", ["operator", "later", "garbage", "unknown"])
def test_a_changed_cookie_is_no_login(guarded: flask.Flask, change: str) -> None:
    client = guarded.test_client()
    client.post("/login", data={"token": TOKENS["edge"]})
    stored = client.get_cookie("millpond_hub")
    assert stored is not None
    role, expires, mac = stored.value.split(".")
    value = {
        "operator": f"operator.{expires}.{mac}",
        "later": f"{role}.{int(expires) + 1}.{mac}",
        "garbage": "é.²..",
        "unknown": f"nobody.{expires}.{mac}",
    }[change]
    client.set_cookie("millpond_hub", value)
    assert client.get("/page").status_code == 302


def test_a_login_ends_with_its_time_and_with_its_token(
    guarded: flask.Flask, build_app: Callable[[dict[str, str]], flask.Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = guarded.test_client()
    client.post("/login", data={"token": TOKENS["edge"]})
    stored = client.get_cookie("millpond_hub")
    assert stored is not None
    other = build_app(TOKENS | {"edge": "a-new-token"}).test_client()
    other.set_cookie("millpond_hub", stored.value)
    assert other.get("/page").status_code == 302
    now = time.time()
    monkeypatch.setattr(access_module.time, "time", lambda: now + access_module.LOGIN_S + 1)
    assert client.get("/page").status_code == 302


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_other_web_sites_cannot_write_even_without_tokens(open_app: flask.Flask, headers: dict[str, str]) -> None:
    response = open_app.test_client().post("/orders", json=ORDER, headers=headers)
    assert (response.status_code, code(response)) == (403, "cross_origin")
    assert open_app.test_client().get("/page", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Origin": "http://localhost"}],
)
def test_own_pages_and_programs_can_write(open_app: flask.Flask, headers: dict[str, str]) -> None:
    assert open_app.test_client().post("/orders", json=ORDER, headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7090", "127.0.0.1.evil.example", "10.0.0.5"])
def test_an_open_service_does_not_answer_to_foreign_names(open_app: flask.Flask, host: str) -> None:
    response = open_app.test_client().get("/page", headers={"Host": host})
    assert (response.status_code, code(response)) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1:7090", "[::1]:7090"])
def test_an_open_service_answers_to_loopback_names(open_app: flask.Flask, host: str) -> None:
    assert open_app.test_client().get("/page", headers={"Host": host}).status_code == 200


def test_a_guarded_service_answers_to_any_name(guarded: flask.Flask) -> None:
    response = guarded.test_client().get("/page", headers={"Host": "hub.example"} | bearer("edge"))
    assert response.status_code == 200
