"""The OCI pull API, as a client of the distribution specification sees it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
from flask.testing import FlaskClient

from millpond.hub import create_app, jobs, promotions
from millpond.registry import parse_manifest
from millpond.registry.manifest import MANIFEST_TYPE
from millpond.settings import HubSettings


def pull(client: FlaskClient, address: str, method: str = "GET", **headers: str) -> Any:
    """Return an answer whose file is closed again."""
    answer = client.open(address, method=method, headers=headers)
    assert answer.data is not None
    answer.close()
    return answer


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, make_bench: Callable[..., Any]) -> Iterator[Any]:
    """One hub with one champion for all these tests: they only read."""
    made = make_bench(tmp_path_factory.mktemp("registry") / "home")
    jobs.create(made.hub.database, "for the tests", 0.0)
    made.turn(lambda: promotions.newest(made.hub))
    yield made
    made.close()


@pytest.fixture
def digest(bench: Any) -> str:
    return str(bench.hub.tags()["champion"])


def test_it_says_that_it_is_a_registry(client: FlaskClient) -> None:
    for address in ("/v2/", "/v2"):
        answer = client.get(address, follow_redirects=True)
        assert answer.status_code == 200
        assert answer.headers["Docker-Distribution-API-Version"] == "registry/2.0"


def test_a_manifest_comes_by_tag_and_by_digest(client: FlaskClient, digest: str) -> None:
    by_tag = client.get("/v2/sentiment/manifests/champion", headers={"Accept": MANIFEST_TYPE})
    by_digest = client.get(f"/v2/sentiment/manifests/{digest}")
    assert by_tag.data == by_digest.data
    assert "sha256:" + hashlib.sha256(by_tag.data).hexdigest() == digest == by_tag.headers["Docker-Content-Digest"]
    assert by_tag.mimetype == MANIFEST_TYPE == json.loads(by_tag.data)["mediaType"]
    assert "immutable" in by_digest.headers["Cache-Control"]
    assert "no-cache" in by_tag.headers["Cache-Control"]


def test_a_manifest_that_the_client_has_is_not_sent_again(client: FlaskClient, digest: str) -> None:
    etag = client.get("/v2/sentiment/manifests/champion").headers["ETag"]
    again = client.get("/v2/sentiment/manifests/champion", headers={"If-None-Match": etag})
    assert (again.status_code, again.data) == (304, b"")
    other = client.get("/v2/sentiment/manifests/champion", headers={"If-None-Match": '"sha256:other"'})
    assert other.status_code == 200


def test_every_file_of_a_model_can_be_pulled(client: FlaskClient, digest: str) -> None:
    manifest = parse_manifest(client.get("/v2/sentiment/manifests/champion").data)
    for descriptor in manifest.files().values():
        answer = pull(client, f"/v2/sentiment/blobs/{descriptor.digest}")
        assert "sha256:" + hashlib.sha256(answer.data).hexdigest() == descriptor.digest
        assert len(answer.data) == descriptor.size


def test_a_pull_is_resumed_by_range(client: FlaskClient, digest: str) -> None:
    descriptor = parse_manifest(client.get("/v2/sentiment/manifests/champion").data).files()["model.sig"]
    address = f"/v2/sentiment/blobs/{descriptor.digest}"
    first = pull(client, address, Range="bytes=0-99")
    rest = pull(client, address, Range="bytes=100-")
    assert (first.status_code, rest.status_code) == (206, 206)
    assert rest.headers["Content-Range"] == f"bytes 100-{descriptor.size - 1}/{descriptor.size}"
    assert "sha256:" + hashlib.sha256(first.data + rest.data).hexdigest() == descriptor.digest
    assert pull(client, address, Range=f"bytes={descriptor.size}-").status_code == 416


def test_head_gives_the_size_without_the_content(client: FlaskClient, digest: str) -> None:
    for address in ("/v2/sentiment/manifests/champion", f"/v2/sentiment/blobs/{digest}"):
        whole = pull(client, address)
        head = pull(client, address, "HEAD")
        assert (head.status_code, head.data) == (200, b"")
        assert int(head.headers["Content-Length"]) == len(whole.data)
        assert head.headers["Docker-Content-Digest"] == digest


def test_tags_are_listed_in_order_page_by_page(client: FlaskClient, digest: str) -> None:
    assert client.get("/v2/sentiment/tags/list").json == {"name": "sentiment", "tags": ["candidate", "champion", "v1"]}
    page = client.get("/v2/sentiment/tags/list?n=2")
    assert page.json["tags"] == ["candidate", "champion"]
    following = page.headers["Link"].split(">")[0].lstrip("<")
    assert client.get(following).json["tags"] == ["v1"]
    assert "Link" not in client.get(following).headers


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("/v2/sentiment/manifests/v99", "MANIFEST_UNKNOWN"),
        ("/v2/sentiment/manifests/sha256:" + "0" * 64, "MANIFEST_UNKNOWN"),
        ("/v2/sentiment/manifests/sha256:nonsense", "MANIFEST_UNKNOWN"),
        ("/v2/nobody/manifests/champion", "MANIFEST_UNKNOWN"),
        ("/v2/nobody/tags/list", "NAME_UNKNOWN"),
        ("/v2/library/nobody/manifests/champion", "NAME_UNKNOWN"),
        ("/v2/sentiment/blobs/sha256:" + "0" * 64, "BLOB_UNKNOWN"),
        ("/v2/sentiment/blobs/../../../../etc/passwd", "NAME_UNKNOWN"),
        ("/v2/sentiment/blobs/sha256:..%2f..%2findex.json", "NAME_UNKNOWN"),
        ("/v2/..%2f..%2fkeys/blobs/sha256:" + "0" * 64, "NAME_UNKNOWN"),
    ],
)
def test_what_is_not_there_is_said_as_the_specification_says_it(
    client: FlaskClient, digest: str, address: str, code: str
) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert [error["code"] for error in answer.json["errors"]] == [code]
    assert answer.json["errors"][0]["message"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_pushing_is_refused(client: FlaskClient, method: str) -> None:
    answer = client.open("/v2/sentiment/blobs/uploads/", method=method)
    assert answer.status_code == 405
    assert answer.json["errors"][0]["code"] == "UNSUPPORTED"


@pytest.fixture
def guarded(bench: Any) -> Any:
    tokens = {"edge_token": "e-token", "reviewer_token": "r-token", "operator_token": "o-token"}
    settings = HubSettings(home=bench.home, recipe=bench.recipe, **tokens)  # type: ignore[arg-type]
    app: flask.Flask = create_app(settings, bench.registry)
    yield app.test_client()
    app.extensions["millpond.hub"].database.close()


def test_pulling_needs_the_edges_token(guarded: FlaskClient) -> None:
    refused = guarded.get("/v2/")
    assert refused.status_code == 401
    assert refused.json["errors"][0]["code"] == "UNAUTHORIZED"
    assert guarded.get("/v2/", headers={"Authorization": "Bearer e-token"}).status_code == 200
    assert guarded.get("/v2/", headers={"Authorization": "Bearer x-token"}).status_code == 401


def test_ordinary_clients_log_in_with_a_token_as_password(guarded: FlaskClient) -> None:
    assert guarded.get("/v2/").headers["WWW-Authenticate"].startswith("Basic ")
    for user_and_password, status in (("edge:e-token", 200), (":o-token", 200), ("edge:wrong", 401), ("edge", 401)):
        encoded = base64.b64encode(user_and_password.encode()).decode()
        assert guarded.get("/v2/", headers={"Authorization": f"Basic {encoded}"}).status_code == status
    assert guarded.get("/v2/", headers={"Authorization": "Basic §§§".encode().decode("latin-1")}).status_code == 401
