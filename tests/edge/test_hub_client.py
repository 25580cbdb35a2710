"""Downloads go on where they ended, and nothing is believed that does not have its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from edge_site import Site, StandInHub
from millpond.edge.hub_client import BlobDamaged, HubClient, HubRefused, HubUnreachable
from millpond.registry import Descriptor, parse_manifest
from millpond.schema import CorrectionBatch


@pytest.fixture
def client(hub: StandInHub) -> Iterator[HubClient]:
    client = HubClient(hub.url, "")
    yield client
    client.close()


@pytest.fixture
def weights(site: Site) -> Descriptor:
    digest = site.publish("v1", padding=300_000)
    return parse_manifest(site.store.manifest_bytes("sentiment", digest)).files()["weights.safetensors"]


def content(site: Site, blob: Descriptor) -> bytes:
    return site.store.blob_path("sentiment", blob.digest).read_bytes()


def test_a_blob_arrives_whole(client: HubClient, site: Site, weights: Descriptor, tmp_path: Path) -> None:
    client.download("sentiment", weights, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == content(site, weights)
    assert not (tmp_path / "w.part").exists()


def test_an_interrupted_download_goes_on_where_it_ended(
    client: HubClient, hub: StandInHub, site: Site, weights: Descriptor, tmp_path: Path
) -> None:
    def cut(request: BaseHTTPRequestHandler) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", str(weights.size))
        request.end_headers()
        request.wfile.write(content(site, weights)[:100_000])
        raise ConnectionAbortedError

    hub.before = cut
    with pytest.raises(HubUnreachable):
        client.download("sentiment", weights, tmp_path / "w")
    assert 0 < (tmp_path / "w.part").stat().st_size <= 100_000
    had = (tmp_path / "w.part").stat().st_size
    hub.before = lambda request: False
    client.download("sentiment", weights, tmp_path / "w")
    assert hub.blob_bytes == weights.size - had
    assert (tmp_path / "w").read_bytes() == content(site, weights)


def test_a_hub_that_knows_no_ranges_sends_all_of_it(
    client: HubClient, hub: StandInHub, site: Site, weights: Descriptor, tmp_path: Path
) -> None:
    (tmp_path / "w.part").write_bytes(b"x" * 1000)

    def whole(request: BaseHTTPRequestHandler) -> bool:
        request.answer(200, content(site, weights))  # type: ignore[attr-defined]
        return True

    hub.before = whole
    client.download("sentiment", weights, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == content(site, weights)


def test_a_damaged_beginning_is_found_and_the_next_attempt_is_whole(
    client: HubClient, weights: Descriptor, tmp_path: Path
) -> None:
    (tmp_path / "w.part").write_bytes(b"x" * 1000)
    with pytest.raises(BlobDamaged):
        client.download("sentiment", weights, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    client.download("sentiment", weights, tmp_path / "w")
    assert (tmp_path / "w").exists()


def test_one_changed_byte_is_damage(client: HubClient, site: Site, weights: Descriptor, tmp_path: Path) -> None:
    path = site.store.blob_path("sentiment", weights.digest)
    raw = bytearray(path.read_bytes())
    raw[1234] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BlobDamaged, match="the manifest names"):
        client.download("sentiment", weights, tmp_path / "w")
    assert list(tmp_path.glob("w*")) == []


def test_more_bytes_than_announced_never_reach_the_disk(
    client: HubClient, hub: StandInHub, weights: Descriptor, tmp_path: Path
) -> None:
    def endless(request: BaseHTTPRequestHandler) -> bool:
        request.answer(200, b"x" * (weights.size + 5_000_000))  # type: ignore[attr-defined]
        return True

    hub.before = endless
    with pytest.raises(BlobDamaged, match="more than"):
        client.download("sentiment", weights, tmp_path / "w")
    assert list(tmp_path.glob("w*")) == []


def test_an_endless_manifest_is_not_read_to_its_end(client: HubClient, hub: StandInHub) -> None:
    def endless(request: BaseHTTPRequestHandler) -> bool:
        request.answer(200, b" " * 50_000_000)  # type: ignore[attr-defined]
        return True

    hub.before = endless
    with pytest.raises(HubUnreachable, match="was not read"):
        client.manifest("sentiment", "champion", None)


def test_an_unchanged_tag_costs_no_body(client: HubClient, site: Site) -> None:
    digest = site.publish("v1")
    answer = client.manifest("sentiment", "champion", None)
    assert answer is not None
    raw, etag = answer
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == digest
    assert client.manifest("sentiment", "champion", etag) is None


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_hub_in_trouble_is_tried_again_later(client: HubClient, hub: StandInHub, status: int) -> None:
    def trouble(request: BaseHTTPRequestHandler) -> bool:
        request.answer(status, b"")  # type: ignore[attr-defined]
        return True

    hub.before = trouble
    with pytest.raises(HubUnreachable, match=str(status)):
        client.manifest("sentiment", "champion", None)


def test_a_redirect_is_not_followed(client: HubClient, hub: StandInHub) -> None:
    def elsewhere(request: BaseHTTPRequestHandler) -> bool:
        request.answer(302, b"", {"Location": f"{hub.url}/trap"})  # type: ignore[attr-defined]
        return True

    hub.before = elsewhere
    with pytest.raises(HubRefused):
        client.manifest("sentiment", "champion", None)
    assert not any("trap" in request for request in hub.requests)


def test_a_missing_or_wrong_token_is_refused_and_never_shown(hub: StandInHub) -> None:
    hub.token = "right"
    client = HubClient(hub.url, "a-wrong-secret")
    with pytest.raises(HubRefused) as caught:
        client.manifest("sentiment", "champion", None)
    assert caught.value.status == 401
    assert "a-wrong-secret" not in str(caught.value)
    client.close()


def test_what_is_no_hub_is_told_so(client: HubClient, hub: StandInHub) -> None:
    def page(request: BaseHTTPRequestHandler) -> bool:
        request.answer(200, b"<html>log in to the wireless network</html>")  # type: ignore[attr-defined]
        return True

    hub.before = page
    with pytest.raises(HubUnreachable, match="no hub of ours"):
        client.send(CorrectionBatch(edge="edge-1", corrections=[]))


def test_a_hub_that_is_away_is_told_so() -> None:
    client = HubClient("http://127.0.0.1:9", "")
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        client.manifest("sentiment", "champion", None)
    client.close()
