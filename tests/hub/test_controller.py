"""Training driven by the controller: real processes, a real registry, real signatures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from millpond.hub import jobs, promotions
from millpond.hub.controller import Controller

GOOD = {"right": 900, "of": 1000}


def start(client: FlaskClient) -> str:
    answer = client.post("/api/v1/jobs", json={"by": "ada"})
    assert answer.status_code == 202, answer.text
    return str(answer.json["id"])


def job(client: FlaskClient, job_id: str = "job-1") -> dict[str, Any]:
    return dict(client.get(f"/api/v1/jobs/{job_id}").json or {})


def records(client: FlaskClient) -> list[dict[str, Any]]:
    return list(client.get("/api/v1/promotions").json["promotions"])


def finish(bench: Any, client: FlaskClient, job_id: str = "job-1") -> dict[str, Any]:
    bench.turn(lambda: job(client, job_id)["state"] in ("succeeded", "failed"))
    return job(client, job_id)


def accept(client: FlaskClient, sent: Callable[..., dict[str, Any]], numbers: range) -> None:
    client.post("/api/v1/corrections", json={"edge": "e", "corrections": [sent(number) for number in numbers]})
    decisions = [{"id": f"c-{number}", "decision": "accept"} for number in numbers]
    client.post("/api/v1/reviews", json={"reviewer": "ada", "decisions": decisions})


def test_the_first_model_comes_from_a_job_started_by_hand(bench: Any, client: FlaskClient) -> None:
    assert client.get("/v2/sentiment/tags/list").status_code == 404
    done = finish(bench, client, start(client))
    assert (done["state"], done["version"], done["reason"]) == ("succeeded", "v1", "started by ada")
    assert done["progress"]["done"] == 3
    [record] = records(client)
    assert (record["promoted"], record["version"], record["champion"]) == (True, "v1", None)
    assert record["test"]["candidate_accuracy"] == 0.9
    assert bench.hub.tags() == {"v1": record["digest"], "candidate": record["digest"], "champion": record["digest"]}


def test_enough_accepted_corrections_train_by_themselves_and_only_once(
    bench: Any, client: FlaskClient, sent: Callable[..., dict[str, Any]]
) -> None:
    finish(bench, client, start(client))
    accept(client, sent, range(9))
    for _ in range(5):
        bench.controller.step(time.time())
    assert len(client.get("/api/v1/jobs").json["jobs"]) == 1
    accept(client, sent, range(9, 10))
    bench.turn(lambda: len(records(client)) == 2)
    for _ in range(5):
        bench.controller.step(time.time())
    done = client.get("/api/v1/jobs").json["jobs"]
    assert [found["reason"] for found in done] == [
        "10 corrections accepted since the last training",
        "started by ada",
    ]
    assert done[0]["training_rows"] + done[0]["heldout_rows"] == 10
    place = jobs.directory(bench.hub, 2, 1)
    lines = [line for name in ("corrections", "heldout") for line in (place / f"{name}.jsonl").read_text().splitlines()]
    ids = [json.loads(line)["id"] for line in lines]
    assert sorted(ids) == sorted(f"c-{number}" for number in range(10))
    assert records(client)[0]["champion"] == "v1"


def test_one_job_at_a_time_and_asking_again_names_it(bench: Any, client: FlaskClient) -> None:
    bench.plan(GOOD | {"act": "wait"})
    job_id = start(client)
    again = client.post("/api/v1/jobs", json={})
    assert (again.status_code, again.json["id"], again.json["already"]) == (200, job_id, True)
    bench.turn(lambda: job(client)["state"] == "running")
    assert client.post("/api/v1/jobs", json={}).json == {"id": job_id, "state": "running", "already": True}
    bench.recipe.with_name("go").touch()
    finish(bench, client)


def test_a_worse_candidate_is_refused_and_says_why(bench: Any, client: FlaskClient) -> None:
    finish(bench, client, start(client))
    champion = bench.hub.tags()["champion"]
    bench.plan({"right": 800, "of": 1000, "champion_right": 900})
    finish(bench, client, start(client))
    newest = records(client)[0]
    assert (newest["promoted"], newest["version"], newest["champion"]) == (False, "v2", "v1")
    assert newest["test"]["champion_accuracy"] == 0.9
    assert "not ruled out" in newest["reasons"][0]
    assert bench.hub.tags()["champion"] == champion
    assert bench.hub.tags()["candidate"] == newest["digest"]


def test_a_crash_is_tried_again_in_a_new_directory(bench: Any, client: FlaskClient) -> None:
    bench.plan({"act": "crash", **GOOD}, GOOD)
    done = finish(bench, client, start(client))
    assert (done["state"], done["attempt"], done["failures"]) == ("succeeded", 2, 1)
    assert "fails on purpose" in jobs.read_log(jobs.directory(bench.hub, 1, 1))
    assert "attempt 2" in client.get("/api/v1/jobs/job-1/log").text


def test_a_job_that_never_succeeds_fails_after_its_attempts_and_is_not_begun_again(
    bench: Any, client: FlaskClient, sent: Callable[..., dict[str, Any]]
) -> None:
    bench.plan({"act": "crash", **GOOD})
    accept(client, sent, range(10))
    bench.turn(lambda: client.get("/api/v1/jobs").json["jobs"])
    done = finish(bench, client)
    assert (done["state"], done["attempt"], done["failures"]) == ("failed", 3, 3)
    assert "ended with status 1" in done["error"]
    for _ in range(5):
        bench.controller.step(time.time())
    assert len(client.get("/api/v1/jobs").json["jobs"]) == 1


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("lie", "is not accepted"),
        ("garble", "cannot be used"),
        ("forge", "another key than ours"),
    ],
)
def test_a_result_that_is_not_what_it_must_be_is_a_failure(
    bench: Any, client: FlaskClient, act: str, said: str
) -> None:
    bench.plan({"act": act, **GOOD}, GOOD)
    job_id = start(client)
    bench.turn(lambda: job(client)["failures"] == 1)
    assert said in job(client)["error"]
    assert "champion" not in bench.hub.tags()
    assert finish(bench, client, job_id)["version"] == "v2"
    assert len(records(client)) == 1


def test_impossible_counts_are_a_failure(bench: Any, client: FlaskClient) -> None:
    bench.plan({"right": 1001, "of": 1000}, GOOD)
    start(client)
    bench.turn(lambda: job(client)["failures"] == 1)
    assert "contradict" in job(client)["error"]
    finish(bench, client)


def test_a_model_of_another_version_than_ordered_is_a_failure(bench: Any, client: FlaskClient) -> None:
    bench.plan({"version": "v9", **GOOD}, GOOD)
    start(client)
    bench.turn(lambda: job(client)["failures"] == 1)
    assert "v9" in job(client)["error"]
    assert finish(bench, client)["version"] == "v10"


def test_a_job_killed_after_its_result_has_still_succeeded(bench: Any, client: FlaskClient) -> None:
    bench.plan({"act": "die late", **GOOD})
    assert finish(bench, client, start(client))["attempt"] == 1


def test_a_job_over_its_time_is_stopped_with_all_it_started(bench: Any, client: FlaskClient) -> None:
    bench.controller.policy = Controller(bench.hub).policy.__class__(
        retrain_after=0, attempts=1, timeout_s=0.5, backoff_s=0.01
    )
    bench.plan({"act": "hang", **GOOD})
    done = finish(bench, client, start(client))
    assert done["state"] == "failed"
    assert "longer than 0.5 s" in done["error"]
    assert not list(jobs._marked(f"{jobs.MARK}={jobs.directory(bench.hub, 1, 1)}".encode()))


def test_a_job_interrupted_by_the_hubs_end_is_started_again(bench: Any, client: FlaskClient) -> None:
    bench.plan({"act": "hang", **GOOD}, GOOD)
    start(client)
    bench.turn(lambda: job(client)["progress"] is not None)
    bench.restart_controller()
    done = finish(bench, client)
    assert (done["state"], done["attempt"], done["failures"]) == ("succeeded", 2, 0)


def test_a_result_that_lay_there_when_the_hub_came_back_is_taken_in_once(bench: Any, client: FlaskClient) -> None:
    bench.plan({"act": "linger", **GOOD})
    start(client)
    place = jobs.directory(bench.hub, 1, 1)
    bench.turn(lambda: (place / jobs.RESULT).exists())
    bench.restart_controller()
    done = finish(bench, client)
    assert (done["state"], done["attempt"]) == ("succeeded", 1)
    bench.restart_controller()
    for _ in range(5):
        bench.controller.step(time.time())
    assert len(records(client)) == 1


def test_a_process_that_outlived_the_hub_is_ended_before_the_next_attempt(bench: Any, client: FlaskClient) -> None:
    bench.plan({"act": "hang", **GOOD}, GOOD)
    start(client)
    bench.turn(lambda: job(client)["progress"] is not None)
    survivor = bench.controller._process
    bench.controller = Controller(bench.hub, backoff_s=0.01)  # the old one's job is still alive
    finish(bench, client)
    assert survivor.exit_status == -9


def test_tags_that_were_not_moved_when_the_hub_died_are_moved_later(
    bench: Any, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(promotions, "move_tags", lambda hub: 0)  # as if it died between record and tags
        finish(bench, client, start(client))
        assert "champion" not in bench.hub.tags()
    bench.restart_controller()
    bench.controller.step(time.time())
    assert bench.hub.tags()["champion"] == records(client)[0]["digest"]
    assert promotions.move_tags(bench.hub) == 0


def test_rollback_is_one_call_and_leaves_a_record(bench: Any, client: FlaskClient) -> None:
    assert client.post("/api/v1/rollback", json={}).status_code == 409
    finish(bench, client, start(client))
    first = bench.hub.tags()["champion"]
    assert client.post("/api/v1/rollback", json={}).json["error"]["code"] == "nothing_to_roll_back"
    with bench.hub.database.write() as connection:  # a second promotion, without the rule in the way
        connection.execute(
            sa.text(
                "INSERT INTO promotions (kind, promoted, applied, digest, version, verdict, by, at) "
                "VALUES ('promotion', 1, 0, :digest, 'v2', '{\"reasons\": []}', 'job-2', 0)"
            ),
            {"digest": first},
        )
    answer = client.post("/api/v1/rollback", json={"by": "ada"})
    assert answer.status_code == 200, answer.text
    record = records(client)[0]
    assert (record["kind"], record["version"], record["by"]) == ("rollback", "v1", "ada")
    assert bench.hub.tags()["champion"] == first


def test_a_candidate_measured_against_a_former_champion_is_refused(
    bench: Any, client: FlaskClient, sent: Callable[..., dict[str, Any]]
) -> None:
    accept(client, sent, range(8))
    finish(bench, client, start(client))
    finish(bench, client, start(client))
    assert [record["promoted"] for record in records(client)] == [True, True]
    bench.plan(GOOD | {"act": "wait"})
    start(client)
    bench.turn(lambda: job(client, "job-3")["progress"] is not None)
    client.post("/api/v1/rollback", json={})
    bench.recipe.with_name("go").touch()
    finish(bench, client, "job-3")
    newest = records(client)[0]
    assert not newest["promoted"]
    assert newest["reasons"] == [
        "It was measured against v2, but the champion is v1 meanwhile: train again to compare with that."
    ]


def test_a_job_sees_no_token_of_the_hubs(bench: Any, client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_HUB_OPERATOR_TOKEN", "secret-word")
    bench.plan(GOOD | {"act": "wait"})
    start(client)
    bench.turn(lambda: job(client)["progress"] is not None)
    [pid] = jobs._marked(f"{jobs.MARK}={jobs.directory(bench.hub, 1, 1)}".encode())
    assert "secret-word" not in Path(f"/proc/{pid}/environ").read_text()
    assert os.getpgid(pid) == pid
    bench.recipe.with_name("go").touch()
    finish(bench, client)


@pytest.mark.parametrize("command", ["/no/such/program", "", "'unbalanced"])
def test_a_training_command_that_cannot_be_started_fails_the_job(bench: Any, client: FlaskClient, command: str) -> None:
    object.__setattr__(bench.settings, "train_command", command)
    done = finish(bench, client, start(client))
    assert done["state"] == "failed"
    assert "cannot be started" in done["error"]


def test_without_a_recipe_training_is_refused_and_corrections_wait(
    bench: Any, client: FlaskClient, sent: Callable[..., dict[str, Any]]
) -> None:
    bench.recipe.unlink()
    answer = client.post("/api/v1/jobs", json={})
    assert answer.status_code == 409
    assert "MILLPOND_HUB_RECIPE" in answer.json["error"]["next"]
    accept(client, sent, range(20))
    bench.controller.step(time.time())
    assert client.get("/api/v1/jobs").json["jobs"] == []
    bench.recipe.write_text("")
    finish(bench, client, start(client))


def test_the_directories_of_old_jobs_are_deleted(
    bench: Any, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "KEPT_JOBS", 2)
    for number in range(1, 4):
        start(client)
        finish(bench, client, f"job-{number}")
    assert sorted(place.name for place in (bench.hub.home / "jobs").iterdir()) == ["job-2", "job-3"]
    assert client.get("/api/v1/jobs/job-1/log").text == ""
    assert job(client, "job-1")["state"] == "succeeded"
    assert not list((bench.hub.home / "jobs").glob("*/*/candidate"))


def test_relative_paths_are_the_hubs(bench: Any, client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.home.parent)
    relative = Path(bench.home.name)
    object.__setattr__(bench.settings, "home", relative)
    object.__setattr__(bench.settings, "recipe", relative / "recipe/recipe.toml")
    object.__setattr__(bench.registry, "home", relative)
    assert finish(bench, client, start(client))["state"] == "succeeded"
    spec = json.loads((jobs.directory(bench.hub, 1, 1) / "job.json").read_text())
    assert all(Path(spec[name]).is_absolute() for name in ("recipe", "registry", "private_key"))
