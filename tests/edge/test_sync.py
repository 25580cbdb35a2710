"""Sync, step by step: what becomes current, what is refused and remembered, what the hub gets and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge_site import Site, StandInHub
from millpond.edge import sync as sync_module
from millpond.edge.hub_client import HubRefused, HubUnreachable
from millpond.edge.outbox import Outbox
from millpond.edge.predictions import PredictionLog
from millpond.edge.sync import BATCH_BYTES, MAX_PAUSE_S, Courier, pause
from millpond.registry import RegistryError, generate_key_pair
from millpond.schema import MAX_BATCH, Correction
from millpond.settings import EdgeSettings

if TYPE_CHECKING:
    from conftest import Puller


def blobs_asked(hub: StandInHub) -> int:
    return sum("/blobs/" in request for request in hub.requests)


# --- models in --------------------------------------------------------------------------------------------------------


def test_a_hub_without_a_model_is_no_trouble(puller: Puller) -> None:
    assert puller.step() is None


def test_the_champion_is_fetched_once_and_becomes_current(puller: Puller, site: Site, hub: StandInHub) -> None:
    digest = site.publish("v1")
    assert puller.step() == digest
    asked = blobs_asked(hub)
    assert asked == 6
    assert puller.step() == digest
    assert blobs_asked(hub) == asked
    assert sorted(path.name for path in puller.shelf.path(digest).iterdir()) == [
        "config.json",
        "golden.jsonl",
        "manifest.json",
        "model.onnx",
        "model.sig",
        "tokenizer.json",
        "weights.safetensors",
    ]


def test_a_newer_champion_replaces_it_and_going_back_at_the_hub_costs_no_download(
    puller: Puller, site: Site, hub: StandInHub
) -> None:
    first = site.publish("v1")
    puller.step()
    second = site.publish("v2", lean=1.0)
    assert puller.step() == second
    asked = blobs_asked(hub)
    site.store.tag("sentiment", first, "champion")
    assert puller.step() == first
    assert blobs_asked(hub) == asked


def change_byte(site: Site, digest: str) -> None:
    from millpond.registry import parse_manifest

    blob = parse_manifest(site.store.manifest_bytes("sentiment", digest)).files()["model.onnx"].digest
    path = site.store.blob_path("sentiment", blob)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def other_key(site: Site) -> Path:
    generate_key_pair(site.root / "other.key", site.root / "other.pub")
    return site.root / "other.key"


BAD: dict[str, tuple[str, Callable[[Site], str]]] = {
    "another key": ("signature", lambda site: site.publish("v2", key=other_key(site))),
    "a wrong golden answer": ("golden", lambda site: site.publish("v2", golden_lean=0.5)),
    "wrong labels": ("labels", lambda site: site.publish("v2", config_labels=["negative", "neutral", "positive"])),
    "other labels in the golden answers": ("labels", lambda site: site.publish("v2", config_labels=["no", "yes"])),
}


def check_refused(puller: Puller, hub: StandInHub, first: str, bad: str, code: str) -> None:
    assert puller.step() == first
    asked = blobs_asked(hub)
    assert puller.step() == first
    assert blobs_asked(hub) == asked  # not downloaded again at every look
    refusal = puller.state.state.refusal(bad)
    assert refusal is not None
    assert (refusal.code, refusal.model.version) == (code, "v2")
    assert refusal.model.reason.startswith(f"{code}: ")
    assert refusal.model.at.endswith("Z")
    assert puller.state.state.refused == {code: 1}
    assert not puller.shelf.has(bad)
    assert list((puller.shelf.root / "incoming").iterdir()) == []


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_model_is_refused_and_the_old_one_goes_on(
    puller: Puller, site: Site, hub: StandInHub, fault: str
) -> None:
    first = site.publish("v1")
    assert puller.step() == first
    code, publish = BAD[fault]
    check_refused(puller, hub, first, publish(site), code)


def test_one_changed_byte_is_refused_and_the_old_model_goes_on(puller: Puller, site: Site, hub: StandInHub) -> None:
    first = site.publish("v1")
    assert puller.step() == first
    bad = site.publish("v2", lean=1.0)
    change_byte(site, bad)
    check_refused(puller, hub, first, bad, "digest")


def test_one_byte_changed_with_matching_digests_is_refused_by_its_signature(
    puller: Puller, site: Site, hub: StandInHub
) -> None:
    from edge_site import write_model

    first = site.publish("v1")
    assert puller.step() == first
    directory = write_model(site.root / "tampered", "v2", lean=1.0, key=site.key)
    with (directory / "weights.safetensors").open("r+b") as file:
        file.seek(500)
        file.write(b"!")
    bad = site.store.push(directory, ["champion"]).digest
    check_refused(puller, hub, first, bad, "signature")


def test_another_model_under_the_followed_name_is_refused(
    puller: Puller, site: Site, hub: StandInHub, settings: EdgeSettings, make_puller: Callable[[EdgeSettings], Puller]
) -> None:
    site.publish("v1", name="topics")
    raw = site.store.manifest_bytes("topics", site.store.resolve("topics"))

    def serve_topics(request: BaseHTTPRequestHandler) -> bool:
        request.path = request.path.replace("/sentiment/", "/topics/")
        return False

    hub.before = serve_topics
    assert raw
    assert puller.step() is None
    (refusal,) = puller.state.state.refusals
    assert refusal.code == "config"
    assert "'topics'" in refusal.model.reason


def test_a_manifest_that_is_none_is_refused(puller: Puller, site: Site, hub: StandInHub) -> None:
    first = site.publish("v1")
    puller.step()

    def nonsense(request: BaseHTTPRequestHandler) -> bool:
        request.answer(200, b'{"schemaVersion": 2, "layers": []}')  # type: ignore[attr-defined]
        return True

    hub.before = nonsense
    assert puller.step() == first
    assert puller.state.state.refused == {"manifest": 1}


def test_a_refusal_is_remembered_through_a_restart_and_a_good_model_follows(
    puller: Puller, site: Site, hub: StandInHub, settings: EdgeSettings, make_puller: Callable[[EdgeSettings], Puller]
) -> None:
    first = site.publish("v1")
    puller.step()
    bad = site.publish("v2", golden_lean=1.0)
    puller.step()
    asked = blobs_asked(hub)
    again = make_puller(settings)
    assert again.step() == first
    assert blobs_asked(hub) == asked
    assert again.state.state.refusal(bad) is not None
    third = site.publish("v3", lean=0.5)
    assert again.step() == third
    assert again.state.state.refusal(again.state.state.champion) is None


def test_a_refused_model_gets_another_look_after_an_hour_and_after_a_change_of_keys(
    puller: Puller, site: Site, hub: StandInHub, settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_key = settings.public_key_path.read_bytes()
    generate_key_pair(site.root / "other.key", site.root / "other.pub")
    settings.public_key_path.write_bytes((site.root / "other.pub").read_bytes())
    digest = site.publish("v1")
    assert puller.step() is None
    assert puller.state.state.refused == {"signature": 1}
    monkeypatch.setattr(sync_module, "REFUSED_AGAIN_S", 0.0)
    assert puller.step() is None
    assert puller.state.state.refused == {"signature": 2}
    monkeypatch.setattr(sync_module, "REFUSED_AGAIN_S", 1e9)
    settings.public_key_path.write_bytes(good_key)
    assert puller.step() == digest


def test_without_the_public_key_nothing_is_believed(puller: Puller, site: Site, settings: EdgeSettings) -> None:
    settings.public_key_path.unlink()
    site.publish("v1")
    with pytest.raises(RegistryError, match="public key"):
        puller.step()
    assert puller.shelf.current() is None


def test_a_rolled_back_champion_stays_away_until_the_hub_names_another(puller: Puller, site: Site) -> None:
    first = site.publish("v1")
    puller.step()
    second = site.publish("v2", lean=1.0)
    assert puller.step() == second
    puller.shelf.roll_back()
    assert puller.step() == first
    third = site.publish("v3", lean=2.0)
    assert puller.step() == third
    current = puller.shelf.current()
    assert current is not None
    assert current.pinned is None


def test_a_pin_ends_when_the_hub_itself_goes_back(puller: Puller, site: Site) -> None:
    first = site.publish("v1")
    puller.step()
    second = site.publish("v2", lean=1.0)
    puller.step()
    puller.shelf.roll_back()
    site.store.tag("sentiment", first, "champion")
    assert puller.step() == first
    site.store.tag("sentiment", second, "champion")
    assert puller.step() == second


def test_a_model_that_the_disk_damaged_is_fetched_again(
    puller: Puller, site: Site, settings: EdgeSettings, make_puller: Callable[[EdgeSettings], Puller]
) -> None:
    digest = site.publish("v1")
    puller.step()
    with (puller.shelf.path(digest) / "model.onnx").open("r+b") as file:
        file.write(b"!")
    again = make_puller(settings)
    assert again.step() == digest
    assert (again.shelf.path(digest) / "model.onnx").read_bytes()[:1] != b"!"


def test_a_verified_model_goes_on_although_the_key_was_exchanged(
    puller: Puller, site: Site, settings: EdgeSettings, make_puller: Callable[[EdgeSettings], Puller]
) -> None:
    first = site.publish("v1")
    puller.step()
    generate_key_pair(site.root / "other.key", site.root / "other.pub")
    settings.public_key_path.write_bytes((site.root / "other.pub").read_bytes())
    again = make_puller(settings)
    assert again.step() == first
    site.publish("v2", lean=1.0)
    assert again.step() == first
    third = site.publish("v3", lean=2.0, key=site.root / "other.key")
    assert again.step() == third


def test_a_download_that_was_cut_goes_on(puller: Puller, site: Site, hub: StandInHub) -> None:
    digest = site.publish("v1", padding=200_000)

    def cut(request: BaseHTTPRequestHandler) -> bool:
        if "/blobs/" in request.path and blobs_asked(hub) > 3:
            raise ConnectionAbortedError
        return False

    hub.before = cut
    with pytest.raises(HubUnreachable):
        puller.step()
    assert puller.shelf.current() is None
    asked = blobs_asked(hub)
    hub.before = lambda request: False
    assert puller.step() == digest
    assert blobs_asked(hub) - asked <= 4


def test_too_little_room_is_said_before_the_download(
    puller: Puller, site: Site, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.publish("v1")
    monkeypatch.setattr(sync_module, "SPARE_BYTES", 2**60)
    with pytest.raises(OSError, match="make room"):
        puller.step()
    assert blobs_asked(hub) == 0


# --- corrections and reports out --------------------------------------------------------------------------------------


def make(number: int, text: str = "a text") -> Correction:
    return Correction(id=f"c{number}", text=text, label="positive", created="2026-01-02T03:04:05Z")


@pytest.fixture
def outbox(puller: Puller, settings: EdgeSettings) -> Iterator[Outbox]:
    outbox = Outbox(puller.files.outbox, settings.max_outbox)
    yield outbox
    outbox.close()


@pytest.fixture
def courier(puller: Puller, settings: EdgeSettings, outbox: Outbox) -> Iterator[Courier]:
    predictions = PredictionLog(puller.files.predictions, 10)
    yield Courier(settings, puller.client, outbox, predictions, puller.shelf, puller.state)
    predictions.close()


def test_all_that_waits_is_sent_in_order_and_once(courier: Courier, outbox: Outbox, hub: StandInHub) -> None:
    count = MAX_BATCH + 30
    for number in range(count):
        outbox.put(make(number))
    courier.step()
    courier.step()
    assert [identifier for identifier, _ in hub.received] == [f"c{number}" for number in range(count)]
    assert outbox.count("waiting") == 0


def test_a_lost_answer_does_not_double_a_correction(courier: Courier, outbox: Outbox, hub: StandInHub) -> None:
    outbox.put(make(1))

    def lose_the_answer(request: BaseHTTPRequestHandler) -> bool:
        if request.path.endswith("/corrections"):
            hub.corrections["c1"] = make(1)
            hub.received.append(("c1", "positive"))
            raise ConnectionAbortedError
        return False

    hub.before = lose_the_answer
    with pytest.raises(HubUnreachable):
        courier.step()
    assert outbox.count("waiting") == 1
    hub.before = lambda request: False
    courier.step()
    assert outbox.count("waiting") == 0
    assert hub.received == [("c1", "positive")]


def test_what_the_hub_refuses_is_set_aside_and_the_rest_goes(courier: Courier, outbox: Outbox, hub: StandInHub) -> None:
    hub.refuse = lambda correction: "no such label" if correction.id == "c1" else None
    for number in range(3):
        outbox.put(make(number))
    courier.step()
    assert [identifier for identifier, _ in hub.received] == ["c0", "c2"]
    (refused,) = outbox.latest(10, "refused")
    assert (refused.correction.id, refused.reason) == ("c1", "no such label")
    assert hub.reports[-1].set_aside == 1


def test_one_that_the_hub_cannot_read_does_not_hold_up_the_others(
    courier: Courier, outbox: Outbox, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stumble = hub.store_batch

    def refuse_whole_batches(batch: object) -> object:
        if any(correction.id == "c5" for correction in batch.corrections):  # type: ignore[attr-defined]
            raise ValueError
        return stumble(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "store_batch", refuse_whole_batches)
    handler_post = hub._server.RequestHandlerClass.do_POST  # type: ignore[union-attr, attr-defined]

    def do_post(request: BaseHTTPRequestHandler) -> None:
        try:
            handler_post(request)
        except ValueError:
            request.answer(400, b'{"error": {"code": "invalid_request"}}')  # type: ignore[attr-defined]

    monkeypatch.setattr(hub._server.RequestHandlerClass, "do_POST", do_post)  # type: ignore[union-attr]
    for number in range(10):
        outbox.put(make(number))
    courier.step()
    assert {identifier for identifier, _ in hub.received} == {f"c{number}" for number in range(10)} - {"c5"}
    (refused,) = outbox.latest(10, "refused")
    assert refused.correction.id == "c5"
    assert "invalid_request" in refused.reason


def test_a_wrong_token_sets_nothing_aside(courier: Courier, outbox: Outbox, hub: StandInHub) -> None:
    hub.token = "another"
    outbox.put(make(1))
    with pytest.raises(HubRefused):
        courier.step()
    assert outbox.count("waiting") == 1


def test_a_receipt_that_names_nothing_of_ours_settles_nothing(
    courier: Courier, outbox: Outbox, hub: StandInHub
) -> None:
    def other_receipt(request: BaseHTTPRequestHandler) -> bool:
        request.answer(200, b'{"stored": ["c99"], "known": [], "refused": []}')  # type: ignore[attr-defined]
        return True

    hub.before = other_receipt
    outbox.put(make(1))
    with pytest.raises(HubUnreachable, match="names none"):
        courier.step()
    assert outbox.count("waiting") == 1


def test_long_texts_go_in_several_batches(courier: Courier, outbox: Outbox, hub: StandInHub) -> None:
    for number in range(5):
        outbox.put(make(number, "x" * (BATCH_BYTES // 2 - 200)))
    courier.step()
    assert len(hub.received) == 5
    assert sum(request.endswith("/corrections") for request in hub.requests) == 3


def test_the_hub_hears_what_is_served_and_what_was_refused_at_once(
    courier: Courier, puller: Puller, hub: StandInHub, site: Site
) -> None:
    courier.step()
    assert (hub.reports[-1].edge, hub.reports[-1].serving) == ("edge-1", None)
    first = site.publish("v1")
    puller.step()
    courier.step()
    assert hub.reports[-1].serving is not None
    assert hub.reports[-1].serving.digest == first
    bad = site.publish("v2", golden_lean=1.0)
    puller.step()
    courier.step()
    report = hub.reports[-1]
    assert report.serving is not None
    assert report.serving.digest == first
    assert report.refused is not None
    assert report.refused.digest == bad
    count = len(hub.reports)
    courier.step()
    assert len(hub.reports) == count  # nothing new to say


def test_pauses_double_stay_bounded_and_are_scattered() -> None:
    assert pause(0, 5.0) == 5.0
    assert {pause(1, 1.0) for _ in range(20)} != {pause(1, 1.0)}
    for failures in range(1, 200):
        assert 0 < pause(failures, 5.0) <= MAX_PAUSE_S
    assert pause(50, 5.0) >= MAX_PAUSE_S / 2
    assert pause(50, 100.0) <= 100.0
