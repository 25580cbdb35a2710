"""Who may do what, how edges report, what is served beside the interface, and the whole service as a process."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from flask.testing import FlaskClient

from millpond.hub import corrections, create_app, edges
from millpond.hub.db import Database, default_url
from millpond.settings import HubSettings

TOKENS = {"edge": "e-token", "reviewer": "r-token", "operator": "o-token"}
ROLES = list(TOKENS)
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def guarded(bench: Any) -> Iterator[FlaskClient]:
    tokens = {f"{role}_token": token for role, token in TOKENS.items()}
    app = create_app(HubSettings(home=bench.home, recipe=bench.recipe, **tokens), bench.registry)  # type: ignore[arg-type]
    yield app.test_client()
    app.extensions["millpond.hub"].database.close()


ADDRESSES = [
    ("GET", "/v2/", "edge"),
    ("POST", "/api/v1/corrections", "edge"),
    ("POST", "/api/v1/edges", "edge"),
    ("GET", "/metrics", "edge"),
    ("GET", "/api/v1/corrections", "reviewer"),
    ("GET", "/api/v1/reviews", "reviewer"),
    ("POST", "/api/v1/reviews", "reviewer"),
    ("GET", "/review", "reviewer"),
    ("GET", "/", "reviewer"),
    ("GET", "/api/v1/edges", "operator"),
    ("GET", "/api/v1/state", "operator"),
    ("GET", "/api/v1/jobs", "operator"),
    ("POST", "/api/v1/jobs", "operator"),
    ("GET", "/api/v1/jobs/job-1", "operator"),
    ("GET", "/api/v1/jobs/job-1/log", "operator"),
    ("GET", "/api/v1/jobs/job-1/progress", "operator"),
    ("GET", "/api/v1/promotions", "operator"),
    ("POST", "/api/v1/rollback", "operator"),
    ("GET", "/models", "operator"),
    ("GET", "/jobs/job-1", "operator"),
    ("GET", "/promotions/1", "operator"),
]


@pytest.mark.parametrize(("method", "address", "least"), ADDRESSES)
def test_each_address_asks_for_its_role(guarded: FlaskClient, method: str, address: str, least: str) -> None:
    body = {"json": {}} if method == "POST" else {}
    nobody = guarded.open(address, method=method, **body)
    assert nobody.status_code in (401, 302), "without a token"
    for role in ROLES:
        headers = {"Authorization": f"Bearer {TOKENS[role]}"}
        answer = guarded.open(address, method=method, headers=headers, **body)
        if ROLES.index(role) < ROLES.index(least):
            assert answer.status_code == 403, role
        else:
            assert answer.status_code not in (401, 403), (role, answer.text)


def test_every_address_of_the_interface_is_described_and_guarded(guarded: FlaskClient) -> None:
    described = guarded.get("/openapi.json").json["paths"]
    known = {(method.lower(), address.replace("job-1", "{job_id}")) for method, address, _ in ADDRESSES}
    for path, operations in described.items():
        for method, operation in operations.items():
            if operation["security"]:
                is_v2 = path.startswith("/v2/") and path != "/v2/"
                assert is_v2 or (method, path) in known, f"{method} {path} is not in the table of roles"


def test_the_reference_names_every_address(guarded: FlaskClient) -> None:
    reference = (DOCS / "reference/http-hub.md").read_text() + (DOCS / "reference/http.md").read_text()
    for path, operations in guarded.get("/openapi.json").json["paths"].items():
        for method in operations:
            assert f"`{method.upper()} {path}`" in reference, f"{method.upper()} {path}"


def test_the_rule_in_the_how_to_runs(
    bench: Any, serve: Callable[..., Any], sent: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    likely, unlikely = (
        sent(1, scores={"negative": 0.45, "positive": 0.55}),
        sent(2, scores={"negative": 0.01, "positive": 0.99}),
    )
    httpx.post(f"{served.url}/api/v1/corrections", json={"edge": "e", "corrections": [likely, unlikely]})
    monkeypatch.setenv("HUB", served.url)
    monkeypatch.setenv("TOKEN", "none is set here")
    [rule] = re.findall(r"^```python\n(.*?)^```", (DOCS / "how-to/review-corrections.md").read_text(), re.M | re.S)
    code = f"{rule}\nhub.close()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    found = httpx.get(f"{served.url}/api/v1/corrections").json()["corrections"]
    assert {c["id"]: (c["state"], c["reviewer"]) for c in found} == {
        "c-1": ("accepted", "rule:likely"),
        "c-2": ("pending", None),
    }


def test_health_needs_no_token(guarded: FlaskClient) -> None:
    assert guarded.get("/healthz").json == {"status": "ok"}
    assert guarded.get("/readyz").json == {"status": "ready"}


def test_a_hub_whose_database_is_gone_is_not_ready(bench: Any, tmp_path: Path) -> None:
    settings = HubSettings(home=bench.home, database=default_url(tmp_path / "nowhere"))
    app = create_app(settings, bench.registry)
    answer = app.test_client().get("/readyz")
    assert answer.status_code == 503
    assert answer.json["error"]["code"] == "database_unavailable"
    assert answer.headers["Retry-After"]


def test_a_full_disk_is_said_before_anything_is_acknowledged(bench: Any, sent: Callable[..., dict[str, Any]]) -> None:
    with bench.hub.database.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    app = create_app(bench.settings, bench.registry)
    hub = app.extensions["millpond.hub"]

    def limit(connection: Any, record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    import sqlalchemy as sa

    sa.event.listen(hub.database.engine, "connect", limit)
    body = {"edge": "e", "corrections": [sent(1, text="x" * 500_000)]}
    answer = app.test_client().post("/api/v1/corrections", json=body)
    assert answer.status_code == 507
    assert answer.json["error"]["code"] == "disk_full"
    assert corrections.count_states(bench.hub.database)["pending"] == 0
    hub.database.close()


# --- edges --------------------------------------------------------------------------------------------------------


def test_an_edge_reports_and_learns_of_the_champion(bench: Any, client: FlaskClient) -> None:
    report = {"edge": "berlin", "serving": None, "outbox": 4, "software": "millpond 0.1.0"}
    assert client.post("/api/v1/edges", json=report).json == {"champion": None}
    client.post("/api/v1/jobs", json={})
    bench.turn(lambda: bench.hub.champion())
    champion = client.post("/api/v1/edges", json=report | {"outbox": 0}).json["champion"]
    assert champion == {"name": "sentiment", "version": "v1", "digest": bench.hub.tags()["champion"]}
    [edge] = client.get("/api/v1/edges").json["edges"]
    assert (edge["name"], edge["report"]["outbox"]) == ("berlin", 0)
    assert edge["first_seen"] < edge["last_seen"]


def test_the_number_of_edges_is_bounded(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "MAX_EDGES", 3)
    from millpond.schema import EdgeReport

    for number in range(5):
        edges.keep(bench.hub.database, EdgeReport(edge=f"e-{number}", serving=None), float(number))
    assert [edge.name for edge in edges.listed(bench.hub.database, 10.0)] == ["e-2", "e-3", "e-4"]


def test_a_report_that_is_too_long_is_refused(client: FlaskClient) -> None:
    report = {"edge": "berlin", "serving": None, "url": "x" * 20_000}
    assert client.post("/api/v1/edges", json=report).status_code == 413
    assert client.get("/api/v1/edges").json == {"edges": []}


def test_metrics_tell_the_state_of_the_loop(client: FlaskClient, sent: Callable[..., dict[str, Any]]) -> None:
    client.post("/api/v1/corrections", json={"edge": "e", "corrections": [sent(1), sent(2)]})
    client.post("/api/v1/edges", json={"edge": "berlin", "serving": None, "outbox": 4})
    text = client.get("/metrics").text
    assert 'millpond_hub_corrections{state="pending"} 2.0' in text
    assert 'millpond_hub_edge_outbox{edge="berlin"} 4.0' in text


# --- the service as a process -------------------------------------------------------------------------------------


def test_a_served_hub_trains_promotes_and_rolls_back_from_the_command_line(
    bench: Any, serve: Callable[..., Any]
) -> None:
    served = serve()

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "millpond", "hub", *words]
        return subprocess.run(line, env=served.environ, capture_output=True, text=True, timeout=60)

    assert "job-1 is queued." in command("retrain").stdout
    served.wait(lambda: httpx.get(f"{served.url}/api/v1/state").json()["champion"])
    shown = command("status").stdout
    assert "sentiment v1" in shown
    assert "v1 promoted" in shown
    assert '"champion"' in command("status", "--json").stdout
    refused = command("rollback")
    assert refused.returncode == 2
    assert "No champion came before" in refused.stderr
    assert "no token is set" in served.log.read_text()


def test_a_second_hub_on_the_same_state_is_refused(bench: Any, serve: Callable[..., Any]) -> None:
    served = serve()
    line = [sys.executable, "-m", "millpond", "hub", "serve", "--port", "0"]
    second = subprocess.run(line, env=served.environ, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "Another hub works on" in second.stderr


def test_a_hub_beyond_loopback_without_tokens_is_refused(bench: Any) -> None:
    line = [sys.executable, "-m", "millpond", "hub", "serve", "--bind", "0.0.0.0", "--port", "0"]
    refused = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "MILLPOND_HUB_OPERATOR_TOKEN" in refused.stderr


def test_stopping_the_hub_ends_its_job_and_starting_it_again_resumes_it(bench: Any, serve: Callable[..., Any]) -> None:
    bench.plan({"right": 900, "of": 1000, "act": "hang"}, {"right": 900, "of": 1000})
    served = serve()
    httpx.post(f"{served.url}/api/v1/jobs", json={})
    served.wait(lambda: httpx.get(f"{served.url}/api/v1/jobs/job-1").json()["progress"])
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert any("fake_job.py" in " ".join(child.cmdline()) for child in family)
    served.stop()
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    served.start()
    served.wait(lambda: httpx.get(f"{served.url}/api/v1/state").json()["champion"])
    job = httpx.get(f"{served.url}/api/v1/jobs/job-1").json()
    assert (job["attempt"], job["failures"]) == (2, 0)


@pytest.mark.parametrize("when", ["while it trains", "when the result lies there"])
def test_a_killed_hub_leaves_nothing_running_and_finishes_its_job_later(
    bench: Any, serve: Callable[..., Any], when: str
) -> None:
    act = "hang" if when == "while it trains" else "linger"
    bench.plan({"right": 900, "of": 1000, "act": act}, {"right": 900, "of": 1000})
    served = serve()
    httpx.post(f"{served.url}/api/v1/jobs", json={})
    place = bench.home / "hub/jobs/job-1/attempt-1"
    served.wait(lambda: (place / ("progress.jsonl" if act == "hang" else "result.json")).exists())
    family = psutil.Process(served.process.pid).children(recursive=True)
    served.kill()
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    served.start()
    served.wait(lambda: httpx.get(f"{served.url}/api/v1/state").json()["champion"])
    state = httpx.get(f"{served.url}/api/v1/state").json()
    assert state["jobs"][0]["attempt"] == (2 if act == "hang" else 1)
    assert len(state["promotions"]) == 1


def test_a_controller_that_dies_is_started_again(bench: Any, serve: Callable[..., Any]) -> None:
    bench.plan({"right": 900, "of": 1000, "act": "hang"}, {"right": 900, "of": 1000})
    served = serve()
    httpx.post(f"{served.url}/api/v1/jobs", json={})
    served.wait(lambda: httpx.get(f"{served.url}/api/v1/jobs/job-1").json()["progress"])
    [job] = [p for p in psutil.Process(served.process.pid).children(True) if "fake_job.py" in " ".join(p.cmdline())]
    job.parent().kill()
    served.wait(lambda: httpx.get(f"{served.url}/api/v1/state").json()["champion"])
    assert httpx.get(f"{served.url}/api/v1/jobs/job-1").json()["attempt"] == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_acknowledged_correction_is_lost_or_doubled_over_kills(bench: Any, serve: Callable[..., Any]) -> None:
    """Kill -9 at random points of the intake; the sender repeats what was not receipted, as an edge does."""
    kills = 25
    chance = random.Random(7)
    served = serve()
    acknowledged: set[str] = set()
    stopping = threading.Event()

    def send(sender: int) -> None:
        number = 0
        with httpx.Client(timeout=10) as http:
            while not stopping.is_set():
                batch = [
                    {"id": f"s{sender}-{number + n}", "text": f"Text {sender} {number + n}", "label": "negative"}
                    for n in range(20)
                ]
                while not stopping.is_set():
                    try:
                        answer = http.post(
                            f"{served.url}/api/v1/corrections", json={"edge": f"e{sender}", "corrections": batch}
                        )
                    except httpx.TransportError:
                        time.sleep(0.01)  # the hub is away: try again
                        continue
                    if answer.status_code == 200:
                        receipt = answer.json()
                        assert receipt["refused"] == []
                        acknowledged.update(receipt["stored"] + receipt["known"])
                        break
                number += 20

    senders = [threading.Thread(target=send, args=(sender,)) for sender in range(3)]
    for sender in senders:
        sender.start()
    try:
        for _ in range(kills):
            before = len(acknowledged)
            served.wait(lambda before=before: len(acknowledged) > before)
            time.sleep(chance.uniform(0.0, 0.15))  # a random point of the intake
            served.kill()
            served.start()
    finally:
        stopping.set()
        for sender in senders:
            sender.join()
    served.stop()
    database = Database(default_url(bench.home))
    stored: list[str] = []
    after = None
    while page := corrections.list_page(database, None, None, after, 1000):
        stored += [found.id for found in page]
        after = page[-1].id
    database.close()
    assert len(stored) == len(set(stored))
    assert acknowledged <= set(stored)
    assert len(acknowledged) > kills * 20
