"""Hostile HTTP against a real hub: clear errors, nothing dies, memory does not grow."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from millpond.registry import generate_key_pair

MIB = 1024 * 1024
GROWTH_LIMIT = 64 * MIB


class Hub:
    """A real hub process, with tokens."""

    def __init__(self, home: Path):
        generate_key_pair(home / "keys/signing.key", home / "keys/signing.pub")
        recipe = home / "recipe.toml"
        recipe.write_text("")
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")} | {
            "MILLPOND_HOME": str(home),
            "MILLPOND_HUB_PORT": "0",
            "MILLPOND_HUB_RECIPE": str(recipe),
            "MILLPOND_HUB_TRAIN_COMMAND": "false",
            "MILLPOND_HUB_EDGE_TOKEN": "e-token",
            "MILLPOND_HUB_REVIEWER_TOKEN": "r-token",
            "MILLPOND_HUB_OPERATOR_TOKEN": "o-token",
        }
        self.log = home / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "millpond", "hub", "serve"]
            self.process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while b"listening on " not in (text := self.log.read_bytes()):
            assert time.monotonic() < deadline, text.decode()
            time.sleep(0.05)
        self.url = text.split(b"listening on ")[1].split()[0].decode()
        self.http = httpx.Client(base_url=self.url, timeout=30, headers={"Authorization": "Bearer o-token"})
        self.family = {process.pid for process in self.processes()}

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def memory(self) -> int:
        return sum(process.memory_info().rss for process in self.processes())

    def works(self) -> None:
        """Assert that all of its processes are the ones that were there, and that it answers."""
        assert self.http.get("/readyz").status_code == 200
        assert {process.pid for process in self.processes()} == self.family
        assert "Traceback" not in self.log.read_text()

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    served = Hub(tmp_path_factory.mktemp("hub"))
    served.http.get("/api/v1/state")
    yield served
    served.close()


POSTS = ["/api/v1/corrections", "/api/v1/edges", "/api/v1/reviews", "/api/v1/jobs", "/api/v1/rollback"]

BODIES = {
    "nothing": b"",
    "no JSON": b"\x80\x81\xfe\xff" * 100,
    "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x04eval\x94\x93\x94.",
    "a number": b"7",
    "null": b"null",
    "a list": b"[]",
    "wrong types": b'{"edge": 7, "corrections": "all", "reviewer": [], "decisions": {}, "by": 7}',
    "deep": b'{"edge": ' + b"[" * 100_000 + b"]" * 100_000 + b', "by": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep inside a correction": b'{"edge": "e", "reviewer": 1, "by": 1, "corrections": [{"id": '
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}], ",
    "cut off": b'{"edge": "e", "corrections": [{"id": "a", "te',
    "half a surrogate": b'{"edge": "\\ud800", "reviewer": "\\ud800", "by": "\\ud800", "corrections": 1}',
    "not UTF-8": b'{"edge": "\xff\xfe", "reviewer": "\xff", "by": "\xff", "corrections": [], "decisions": []}',
    "huge numbers": b'{"edge": "e", "serving": null, "outbox": 1' + b"0" * 5000 + b', "by": 1e999, "reviewer": 1}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("address", POSTS)
def test_bodies_that_are_not_what_they_must_be_get_a_clear_error(hub: Hub, address: str, body: bytes) -> None:
    answer = hub.http.post(address, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["next"]
    hub.works()


@pytest.mark.parametrize("address", POSTS)
@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json-seq"]
)
def test_other_content_types_are_refused(hub: Hub, address: str, kind: str) -> None:
    answer = hub.http.post(address, content=b"{}", headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == 415
    assert answer.json()["error"]["next"]


def test_a_body_over_the_limit_is_refused_whether_or_not_its_length_is_told(hub: Hub) -> None:
    body = b'{"edge": "e", "corrections": [{"id": "a", "label": "b", "text": "' + b"x" * (10 * MIB) + b'"}]}'
    headers = {"Content-Type": "application/json", "Authorization": "Bearer o-token"}
    for content in (body, iter([body[: 5 * MIB], body[5 * MIB :]])):
        with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            answer = httpx.post(f"{hub.url}/api/v1/corrections", content=content, headers=headers, timeout=30)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
    hub.works()


def test_a_text_over_the_limit_within_the_bodys_is_refused_alone(hub: Hub) -> None:
    body = {"edge": "e", "corrections": [{"id": "big", "label": "b", "text": "x" * (MIB + 1)}]}
    receipt = hub.http.post("/api/v1/corrections", json=body).json()
    assert receipt["stored"] == []
    assert "1,048,576" in receipt["refused"][0]["reason"]


@pytest.mark.parametrize(
    "address",
    [
        "/api/v1/jobs/job-999",
        "/api/v1/jobs/999",
        "/api/v1/jobs/job-99999999999999999999",
        "/api/v1/jobs/job-1%2f..%2f..%2f..",
        "/api/v1/jobs/..%2f..%2fkeys/log",
        "/api/v1/jobs/job-1'%20OR%20'1'='1/log",
        "/jobs/%00",
        "/promotions/99999999999999999999",
        "/promotions/-1",
        "/promotions/1%20OR%201=1",
        "/v2/..%2f..%2fkeys/manifests/signing.key",
        "/v2/sentiment/manifests/..%2f..%2f..%2fkeys%2fsigning.key",
        "/v2/sentiment/blobs/sha256:..%2f..%2f..%2f..%2fkeys%2fsigning.key",
        "/v2/sentiment/blobs/sha512:" + "0" * 64,
        "/v2/%2e%2e/tags/list",
        "/v2/" + "a" * 3000 + "/tags/list",
        "/static/..%2f..%2fsettings.py",
        "/web/..%2f..%2f..%2fsettings.py",
        "/static/%2e%2e/%2e%2e/settings.py",
    ],
)
def test_names_that_are_none_lead_nowhere(hub: Hub, address: str) -> None:
    answer = hub.http.get(address)
    assert answer.status_code == 404, answer.text
    assert "PRIVATE KEY" not in answer.text
    assert "class HubSettings" not in answer.text
    hub.works()


@pytest.mark.parametrize(
    "query",
    [
        "state=pending'%20OR%20'1'='1",
        "edge=';DROP%20TABLE%20corrections;--",
        "after=';DELETE%20FROM%20corrections;--",
        "edge=%00",
        "limit=1;%20DROP%20TABLE%20corrections",
        "after=" + "x" * 5000,
    ],
)
def test_sql_in_a_parameter_is_a_string(hub: Hub, query: str) -> None:
    stored = {"id": "sql-1", "label": "'); DROP TABLE corrections; --", "text": "'; DROP TABLE corrections; --"}
    hub.http.post("/api/v1/corrections", json={"edge": "e", "corrections": [stored]})
    answer = hub.http.get(f"/api/v1/corrections?{query}")
    assert answer.status_code in (200, 400, 414)
    found = hub.http.get("/api/v1/corrections?limit=1000").json()["corrections"]
    assert [c["text"] for c in found if c["id"] == "sql-1"] == ["'; DROP TABLE corrections; --"]
    hub.works()


def test_an_edges_token_opens_no_operators_address(hub: Hub) -> None:
    headers = {"Authorization": "Bearer e-token"}
    for method, address in (
        ("POST", "/api/v1/jobs"),
        ("POST", "/api/v1/rollback"),
        ("GET", "/api/v1/state"),
        ("POST", "/api/v1/reviews"),
    ):
        answer = httpx.request(method, hub.url + address, headers=headers, json={} if method == "POST" else None)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "role_too_low"
    for wrong in ("", "Bearer", "Bearer x", "Basic !!!", "Negotiate abc"):
        assert httpx.get(f"{hub.url}/v2/", headers={"Authorization": wrong.encode()} if wrong else {}).status_code in (
            400,
            401,
        )


def test_another_web_site_cannot_use_the_operators_browser(hub: Hub) -> None:
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        answer = hub.http.post("/api/v1/rollback", json={}, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "cross_origin"


def test_the_same_bad_request_many_times_does_not_grow_memory(hub: Hub) -> None:
    headers = {"Content-Type": "application/json"}
    bodies = [*list(BODIES.values()), b'{"edge": "e", "corrections": ["' + b"x" * (6 * MIB) + b'"]}']

    def attack(times: int) -> None:
        for _ in range(times):
            for body in bodies:
                hub.http.post("/api/v1/corrections", content=body, headers=headers)

    attack(3)  # pools, arenas and caches fill once
    before = hub.memory()
    attack(12)
    assert hub.memory() - before < GROWTH_LIMIT
    hub.works()


@pytest.mark.slow
def test_a_thousand_connections_that_send_nothing_keep_nobody_out(hub: Hub) -> None:
    address = ("127.0.0.1", int(hub.url.rpartition(":")[2]))
    before = hub.memory()
    silent: list[socket.socket] = []
    try:
        for _ in range(1000):
            connection = socket.create_connection(address, timeout=5)
            silent.append(connection)
        began = time.monotonic()
        for _ in range(20):
            assert httpx.get(f"{hub.url}/healthz", timeout=30).status_code == 200
        assert time.monotonic() - began < 10
        assert hub.memory() - before < GROWTH_LIMIT
    finally:
        for connection in silent:
            connection.close()
    hub.works()


@pytest.mark.slow
def test_a_request_that_comes_a_byte_at_a_time_keeps_nobody_out(hub: Hub) -> None:
    address = ("127.0.0.1", int(hub.url.rpartition(":")[2]))
    slow = [socket.create_connection(address, timeout=5) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"POST /api/v1/corrections HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n")
        began = time.monotonic()
        assert httpx.get(f"{hub.url}/healthz", timeout=30).status_code == 200
        assert time.monotonic() - began < 10
    finally:
        for connection in slow:
            connection.close()
    hub.works()


def test_half_a_request_that_ends_is_dropped_at_once_and_costs_nothing(hub: Hub) -> None:
    address = ("127.0.0.1", int(hub.url.rpartition(":")[2]))
    spent = sum(sum(process.cpu_times()[:2]) for process in hub.processes())
    for head in (b"GET / HT", b"", b"POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1000):
                pass
    assert sum(sum(process.cpu_times()[:2]) for process in hub.processes()) - spent < 1.0
    hub.works()


def test_a_head_that_comes_in_pieces_is_answered(hub: Hub) -> None:
    address = ("127.0.0.1", int(hub.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n":
            connection.sendall(bytes([byte]))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def garbage() -> list[Any]:
    return [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 1000,
        b"A" * 100_000,
    ]


@pytest.mark.parametrize("number", range(len(garbage())))
def test_what_is_not_http_is_dropped(hub: Hub, number: int) -> None:
    address = ("127.0.0.1", int(hub.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=1) as connection, contextlib.suppress(OSError):
        connection.sendall(garbage()[number])
        connection.recv(1000)
    hub.works()
