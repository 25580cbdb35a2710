"""Hostile callers of a real edge: each gets a clear error, nothing dies, memory does not grow, others are served."""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from edge_site import EdgeProcess, Site, StandInHub
from waiting import wait_for

MIB = 1024 * 1024
JSON = {"Content-Type": "application/json"}
POST = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeProcess]:
    site = Site(tmp_path_factory.mktemp("site"))
    digest = site.publish("v1")
    hub = StandInHub(site.store)
    hub.start()
    edge = EdgeProcess(tmp_path_factory.mktemp("edge"), public_key=site.public_key, hub=hub.url, max_outbox=50)
    with edge.running():
        wait_for(lambda: edge.serving() == digest, what="the model")
        wait_for(lambda: len(children(edge)) == 3, what="all processes")
        yield edge
    hub.stop()


@pytest.fixture(autouse=True)
def nothing_dies(edge: EdgeProcess) -> Iterator[None]:
    before = children(edge)
    yield
    assert children(edge) == before
    assert edge.post("/v1/predict", {"text": "good"}).json()["label"] == "positive"


def children(edge: EdgeProcess) -> set[int]:
    assert edge.process is not None
    return {child.pid for child in psutil.Process(edge.process.pid).children()}


def memory_mib(edge: EdgeProcess) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in children(edge)) / MIB


def send(edge: EdgeProcess, path: str, content: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    return edge.http.post(edge.url + path, content=content, headers=headers)


def check(response: httpx.Response, status: int, code: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert all(isinstance(error[part], str) and error[part] for part in ("code", "message", "next"))
    assert "Traceback" not in response.text
    if code:
        assert error["code"] == code


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/feedback"])
@pytest.mark.parametrize("size", [2 * MIB, 10 * MIB, 50 * MIB])
def test_a_huge_text_is_told_its_limit(edge: EdgeProcess, path: str, size: int) -> None:
    body = json.dumps({"text": "x" * size, "label": "positive"}).encode()
    check(send(edge, path, body), 413)


def test_an_endless_chunked_body_is_cut(edge: EdgeProcess) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * MIB

    response = edge.http.post(f"{edge.url}/v1/predict", content=endless(), headers=JSON)
    check(response, 413, "request_too_large")


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/feedback"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"null",
        b"5",
        b'"text"',
        b"[]",
        b'{"text": {"text": "x"}}',
        b'{"text": ["x"]}',
        b'{"texts": {"0": "x"}}',
        b'{"texts": [["x"]]}',
        b'{"text": 1e999}',
        b'{"text": "\xc3"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\udc00\\ud800"}',
        b"\xff\xfe{\x00",
        b"[" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        pickle.dumps({"text": "x"}),
    ],
)
def test_bodies_that_are_not_requests(edge: EdgeProcess, path: str, content: bytes) -> None:
    check(send(edge, path, content), 400)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/octet-stream"]
)
def test_wrong_content_types(edge: EdgeProcess, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    check(send(edge, "/v1/predict", b'{"text": "x"}', headers), 415, "unsupported_media_type")


def test_a_compressed_bomb_is_not_unpacked(edge: EdgeProcess) -> None:
    import gzip

    bomb = gzip.compress(b" " * (64 * MIB))
    check(send(edge, "/v1/predict", bomb, JSON | {"Content-Encoding": "gzip"}), 415, "unsupported_encoding")


@pytest.mark.parametrize("text", ["\x00", "\x00good\x00", "\u202egood", "👩 good", "\x1b[2J good", "good\u0000" * 1000])
def test_strange_texts_are_classified_and_taken_in_where_the_hub_would_take_them(edge: EdgeProcess, text: str) -> None:
    answer = edge.post("/v1/predict", {"text": text})
    assert answer.status_code == 200
    feedback = edge.post("/v1/feedback", {"id": answer.json()["id"], "label": "negative"})
    if "\x00" in text:
        check(feedback, 400, "nul")
    else:
        assert feedback.status_code == 202


@pytest.mark.parametrize(
    "name", ["0" * 32, "a", "x" * 128, "1.2:3-4_5", "nothing; DROP TABLE predictions"], ids=lambda name: name[:8]
)
def test_unknown_ids(edge: EdgeProcess, name: str) -> None:
    response = edge.post("/v1/feedback", {"id": name, "label": "positive"})
    check(response, 400 if " " in name else 404)


@pytest.mark.parametrize("label", ["neutral", "POSITIVE", "positive ", "__proto__", "<script>", "\x00"])
def test_unknown_labels(edge: EdgeProcess, label: str) -> None:
    check(edge.post("/v1/feedback", {"text": "x", "label": label}), 400, "unknown_label")


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/web/..%2f..%2fsettings.py", "/static//etc/passwd", "/v1/x"]
)
def test_no_file_but_the_pages_own_is_given_out(edge: EdgeProcess, path: str) -> None:
    with socket.create_connection(address(edge), timeout=10) as connection:  # a client library would tidy the path
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"])
def test_other_methods(edge: EdgeProcess, method: str) -> None:
    check(edge.http.request(method, f"{edge.url}/v1/predict", content=b"{}", headers=JSON), 405, "method_not_allowed")


def test_many_texts_with_one_long_among_them_need_little_memory(edge: EdgeProcess) -> None:
    texts = ["bad"] * 255 + ["good " * 200_000]
    before = memory_mib(edge)
    for _ in range(3):
        answer = edge.post("/v1/predict", {"texts": texts})
        assert [row["label"] for row in answer.json()["predictions"]][-2:] == ["negative", "positive"]
    assert memory_mib(edge) - before < 200  # padded to the longest, the batch alone would be 390 MiB


def test_memory_does_not_grow_under_attack(edge: EdgeProcess) -> None:
    large = json.dumps({"text": "x" * (3 * MIB)}).encode()
    deep = b"[" * 200_000

    def attack() -> None:
        for _ in range(10):
            assert send(edge, "/v1/predict", large).status_code == 413
            assert send(edge, "/v1/predict", deep).status_code == 400
            assert send(edge, "/v1/feedback", b'{"id": "unknown", "label": "x"}').status_code == 404

    attack()
    before = memory_mib(edge)
    for _ in range(4):
        attack()
    assert memory_mib(edge) - before < 40


def test_a_flood_of_feedback_is_bounded(edge: EdgeProcess) -> None:
    answers = [edge.post("/v1/feedback", {"text": f"flood {number}", "label": "positive"}) for number in range(20)]
    assert {answer.status_code for answer in answers} <= {202, 507}


def address(edge: EdgeProcess) -> tuple[str, int]:
    parts = urlsplit(edge.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x04\x95\x00",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Type: application/json\r\nContent-Length: 99999\r\n\r\n{",
    ],
    ids=["pickle", "tls", "version", "line", "headers", "negative", "smuggling", "cut"],
)
def test_bytes_that_are_no_http(edge: EdgeProcess, raw: bytes) -> None:
    with socket.create_connection(address(edge), timeout=10) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # it may hang up at any point
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                answer += chunk
    assert b" 200 " not in answer[:20]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [POST, POST + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"])
def test_callers_that_stall_lose_their_connection_and_others_are_served(edge: EdgeProcess, sent: bytes) -> None:
    with contextlib.ExitStack() as stack:
        stalled = [
            stack.enter_context(socket.create_connection(address(edge), timeout=40))
            for _ in range(20)  # more than there are threads
        ]
        for connection in stalled:
            connection.sendall(sent)
        for _ in range(4):  # on new connections: both workers get some
            assert httpx.post(f"{edge.url}/v1/predict", json={"text": "good"}, timeout=60).status_code == 200
        for connection in stalled:  # an end or an error, within the time that the socket waits
            with contextlib.suppress(ConnectionResetError):
                assert b" 200 " not in connection.recv(65536)


def test_the_log_holds_no_text_of_callers(edge: EdgeProcess) -> None:
    edge.post("/v1/predict", {"text": "a very private sentence"})
    edge.post("/v1/feedback", {"text": "a very private sentence", "label": "positive"})
    assert "private" not in Path(edge.log).read_text()
