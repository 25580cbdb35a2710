"""A real edge with real processes: swaps under load, outages, kill -9 of each process, what the commands say."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from edge_site import EdgeProcess, Site, StandInHub, score
from millpond.edge.console import NoEdgeHere, print_outbox, read_status, roll_back
from millpond.settings import EdgeSettings
from waiting import wait_for

MakeEdge = Callable[..., EdgeProcess]


class Hammer:
    """Callers that never stop asking; each answer must be that of the model that it names."""

    def __init__(self, edge: EdgeProcess, site: Site, callers: int = 4) -> None:
        self.edge, self.site = edge, site
        self.faults: list[str] = []
        self.answers: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(index,)) for index in range(callers)]

    def __enter__(self) -> Hammer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, index: int) -> None:
        texts = ["the film", "a film", "good", "bad film"]
        with httpx.Client(base_url=self.edge.url, timeout=20) as http:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                try:
                    if (index + number) % 2:
                        text = texts[number % 4]
                        answer = http.post("/v1/predict", json={"text": text}).raise_for_status().json()
                        rows, asked = [answer], [text]
                    else:
                        answer = http.post("/v1/predict", json={"texts": texts}).raise_for_status().json()
                        rows, asked = answer["predictions"], texts
                except httpx.HTTPError as error:
                    self.faults.append(repr(error))
                    continue
                digest = answer["model"]["digest"]
                self.answers[digest] += 1
                for row, text in zip(rows, asked, strict=True):
                    positive = score(text, self.site.lean[digest])
                    label = "positive" if positive > 0.5 else "negative"
                    if abs(row["scores"]["positive"] - positive) > 1e-5 or (
                        row["label"] != label and abs(positive - 0.5) > 1e-6
                    ):
                        self.faults.append(f"{text!r}: {row} is not what {digest} says")


def test_models_swap_under_load_without_a_failed_or_mixed_answer(
    make_edge: MakeEdge, site: Site, hub: StandInHub
) -> None:
    first = site.publish("v1", lean=1.0)
    edge = make_edge()
    wait_for(lambda: edge.serving() == first, what="v1")
    with Hammer(edge, site) as hammer:
        wait_for(lambda: hammer.answers[first] > 20, what="traffic on v1")
        for number in range(2, 6):
            digest = site.publish(f"v{number}", lean=-1.0 if number % 2 == 0 else 1.0)
            wait_for(lambda digest=digest: hammer.answers[digest] > 20, what=f"traffic on v{number}")
    assert hammer.faults == []
    assert len(hammer.answers) == 5
    assert [ref["version"] for ref in edge.get("/v1/model")["previous"]] == ["v4", "v3"]


def test_a_refused_model_changes_nothing_for_callers_and_everybody_hears_of_it(
    make_edge: MakeEdge, site: Site, hub: StandInHub
) -> None:
    first = site.publish("v1", lean=1.0)
    edge = make_edge()
    wait_for(lambda: edge.serving() == first, what="v1")
    with Hammer(edge, site, callers=2) as hammer:
        bad = site.publish("v2", golden_lean=2.0)
        wait_for(lambda: edge.get("/v1/model")["refused"], what="the refusal")
        wait_for(lambda: hub.reports and hub.reports[-1].refused, what="the report")
    assert hammer.faults == []
    assert set(hammer.answers) == {first}
    assert hub.reports[-1].refused is not None
    assert hub.reports[-1].refused.digest == bad
    assert 'millpond_edge_model_refused_total{reason="golden"} 1.0' in edge.http.get(f"{edge.url}/metrics").text


@pytest.mark.slow
def test_it_starts_and_works_without_the_hub_and_delivers_when_the_hub_is_back(
    make_edge: MakeEdge, site: Site, hub: StandInHub
) -> None:
    first = site.publish("v1")
    edge = make_edge()
    wait_for(lambda: edge.serving() == first, what="v1")
    edge.stop()
    hub.stop()
    edge.start()
    assert edge.serving() == first
    prediction = edge.post("/v1/predict", {"text": "good"}).json()
    accepted = edge.post("/v1/feedback", {"id": prediction["id"], "label": "negative"}).json()["id"]
    wait_for(lambda: edge.get("/v1/model")["sync"]["errors"], what="the trouble to be told")
    edge.stop()
    edge.start()
    assert edge.get("/v1/model")["sync"]["outbox"] == 1
    hub.start()
    wait_for(lambda: hub.received, what="the delivery")
    assert hub.received == [(accepted, "negative")]
    wait_for(lambda: edge.get("/v1/model")["sync"]["outbox"] == 0, what="the empty outbox")


def processes(edge: EdgeProcess) -> tuple[list[psutil.Process], psutil.Process]:
    """Return web workers and the sync process: it is the one that does not hold the port."""
    assert edge.process is not None
    children = psutil.Process(edge.process.pid).children(recursive=True)
    listens = {child: any(c.status == "LISTEN" for c in child.net_connections()) for child in children}
    (sync,) = [child for child, does in listens.items() if not does]
    return [child for child, does in listens.items() if does], sync


def test_kill_9_of_the_master_leaves_nothing_and_the_same_port_serves_again(
    make_edge: MakeEdge, site: Site, hub: StandInHub
) -> None:
    first = site.publish("v1")
    edge = make_edge()
    wait_for(lambda: edge.serving() == first, what="v1")
    prediction = edge.post("/v1/predict", {"text": "good"}).json()["id"]
    workers, sync = processes(edge)
    edge.kill()
    assert psutil.wait_procs([*workers, sync], timeout=5)[1] == []
    edge.start()
    assert edge.serving() == first
    assert edge.post("/v1/feedback", {"id": prediction, "label": "negative"}).status_code == 202


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_sync_are_started_again(make_edge: MakeEdge, site: Site, hub: StandInHub) -> None:
    first = site.publish("v1")
    edge = make_edge()
    wait_for(lambda: edge.serving() == first, what="v1")
    workers, sync = processes(edge)
    workers[0].kill()
    sync.kill()
    second = site.publish("v2", lean=1.0)
    wait_for(lambda: edge.serving() == second, what="v2 through the new sync process")
    accepted = edge.post("/v1/feedback", {"text": "good", "label": "negative"}).json()["id"]
    wait_for(lambda: hub.received, what="the delivery")
    assert hub.received == [(accepted, "negative")]
    wait_for(lambda: len(processes(edge)[0]) == 2, what="both workers")


def test_two_edges_do_not_share_a_home(make_edge: MakeEdge, site: Site) -> None:
    edge = make_edge()
    second = EdgeProcess(edge.home, public_key=site.public_key)
    said = second.cli("serve", "--port", "0")
    assert said.returncode == 2
    assert "Another edge runs on" in said.stderr
    second.http.close()


def test_a_damaged_outbox_is_left_alone_and_told(tmp_path: Path, site: Site) -> None:
    edge = EdgeProcess(tmp_path / "home", public_key=site.public_key)
    damaged = tmp_path / "home/edge/outbox.db"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no database at all" * 1000)
    said = edge.cli("serve")
    assert said.returncode == 2
    assert "keep it (corrections may be in it)" in said.stderr
    assert "Traceback" not in said.stderr
    assert damaged.read_bytes() == b"no database at all" * 1000
    edge.http.close()


@pytest.mark.slow
def test_the_commands_tell_and_change_a_running_edge(make_edge: MakeEdge, site: Site, hub: StandInHub) -> None:
    first = site.publish("v1")
    edge = make_edge()
    wait_for(lambda: edge.serving() == first, what="v1")
    second = site.publish("v2", lean=1.0)
    wait_for(lambda: edge.serving() == second, what="v2")
    hub.refuse = lambda correction: "a reason"
    edge.post("/v1/feedback", {"text": "good", "label": "negative"})
    wait_for(lambda: edge.get("/v1/model")["sync"]["set_aside"] == 1, what="the refusal")

    status = json.loads(edge.cli("status", "--json").stdout)
    assert (status["running"], status["serving"]["version"], status["set_aside"]) == (True, "v2", 1)
    assert "sentiment v2" in edge.cli("status").stdout
    listed = json.loads(edge.cli("outbox", "--json").stdout)
    assert [(entry["state"], entry["reason"]) for entry in listed["corrections"]] == [("refused", "a reason")]

    hub.refuse = lambda correction: None
    assert "1 corrections that the hub had refused wait again" in edge.cli("outbox", "--retry").stdout
    wait_for(lambda: len(hub.received) == 1, what="the delivery")

    assert "v1" in edge.cli("rollback").stdout
    wait_for(lambda: edge.serving() == first, what="v1 again")
    assert edge.get("/v1/model")["pinned"] == second
    again = edge.cli("rollback")
    assert again.returncode == 2
    assert "no earlier version" in again.stderr
    third = site.publish("v3", lean=2.0)
    wait_for(lambda: edge.serving() == third, what="v3, which ends the pin")
    edge.stop()
    assert json.loads(edge.cli("status", "--json").stdout)["running"] is False


def test_the_commands_say_when_no_edge_was_ever_here(tmp_path: Path) -> None:
    settings = EdgeSettings(home=tmp_path / "none")
    for command in (read_status, roll_back):
        with pytest.raises(NoEdgeHere, match="No edge has run"):
            command(settings)
    with pytest.raises(NoEdgeHere):
        print_outbox(settings, json=False, retry=False, limit=1)
    assert not (tmp_path / "none").exists()


def send_until(edge: EdgeProcess, key: str, text: str, label: str) -> str:
    """Send feedback as a patient client does: again under the same key, until there is a 202."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            response = edge.post("/v1/feedback", {"text": text, "label": label}, **{"Idempotency-Key": key})
        except httpx.TransportError:
            time.sleep(0.02)
            continue
        if response.status_code == 202:
            return str(response.json()["id"])
        assert response.status_code == 503, response.text
    raise AssertionError("the edge did not take the feedback in")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_correction_is_lost_or_doubled_and_no_half_model_served_over_many_kills(
    make_edge: MakeEdge, site: Site, hub: StandInHub
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    site.publish("v1", padding=3_000_000)
    edge = make_edge()
    accepted: dict[str, str] = {}
    stop = threading.Event()

    def traffic() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            label = dice.choice(["negative", "positive"])
            accepted[send_until(edge, f"k{number}", f"text {number}", label)] = label

    sender = threading.Thread(target=traffic)
    sender.start()
    kills: Counter[str] = Counter()
    version = 1
    try:
        while kills.total() < 60:
            time.sleep(dice.uniform(0.02, 0.5))
            if dice.random() < 0.35:
                version += 1
                site.publish(f"v{version}", lean=dice.uniform(-2, 2), padding=3_000_000)
            victim = dice.choice(["master", "worker", "sync", "hub"])
            if victim == "hub":
                hub.stop()
                time.sleep(dice.uniform(0, 0.2))
                hub.start()
            elif victim == "master":
                edge.kill()
                edge.start()
            else:
                try:
                    workers, sync = processes(edge)
                    os.kill((sync if victim == "sync" else dice.choice(workers)).pid, signal.SIGKILL)
                except (ValueError, IndexError, psutil.Error, ProcessLookupError):
                    continue  # not all of them are up yet
            kills[victim] += 1
    finally:
        stop.set()
        sender.join()
    last = site.store.resolve("sentiment:champion")
    wait_for(lambda: edge.serving() == last, 90, what="the last model")
    wait_for(lambda: edge.get("/v1/model")["sync"]["outbox"] == 0, 90, what="the empty outbox")
    assert Counter(hub.received) == Counter(accepted.items())
    assert edge.get("/v1/model")["refused"] is None
    answer = edge.post("/v1/predict", {"text": "the film"}).json()
    assert answer["scores"]["positive"] == pytest.approx(score("the film", site.lean[last]), abs=1e-5)
    print(f"{len(accepted)} corrections, {version} models, kills {dict(kills)}")
