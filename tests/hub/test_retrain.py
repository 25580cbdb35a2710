"""The pure decisions of training; no clock, no process, no database."""

from __future__ import annotations

import pytest

from millpond.hub.retrain import (
    MAX_BACKOFF_S,
    MAX_INTERRUPTIONS,
    ActiveJob,
    ChampionChange,
    Enqueue,
    Fail,
    Policy,
    Retry,
    Start,
    Stop,
    TakeIn,
    Wait,
    after_failure,
    is_held_out,
    next_step,
    previous_champion,
    text_key,
)

POLICY = Policy(retrain_after=200, attempts=3, timeout_s=100.0, backoff_s=5.0)


def running(**changes: object) -> ActiveJob:
    values = {"number": 1, "state": "running", "attempt": 1, "started": 1000.0, "process": "alive"} | changes
    return ActiveJob(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("accepted", "starts"), [(0, False), (199, False), (200, True), (5000, True)])
def test_enough_accepted_corrections_start_a_training(accepted: int, starts: bool) -> None:
    assert isinstance(next_step(None, accepted, POLICY, 0.0), Enqueue) == starts


def test_zero_means_only_by_hand() -> None:
    by_hand = Policy(retrain_after=0, attempts=3, timeout_s=100.0)
    assert next_step(None, 10**6, by_hand, 0.0) == Wait()


def test_no_second_job_while_one_is_active() -> None:
    for job in (running(), ActiveJob(number=1, state="queued", not_before=50.0)):
        assert next_step(job, 10**6, POLICY, 0.0) == Wait()


def test_a_queued_job_waits_for_its_time() -> None:
    job = ActiveJob(number=1, state="queued", not_before=50.0)
    assert next_step(job, 0, POLICY, 49.9) == Wait()
    assert next_step(job, 0, POLICY, 50.0) == Start()


def test_a_result_counts_only_when_its_process_is_gone() -> None:
    assert next_step(running(has_result=True), 0, POLICY, 1001.0) == Wait()
    for process in ("ended", "lost"):
        assert next_step(running(process=process, has_result=True, exit_status=-9), 0, POLICY, 1001.0) == TakeIn()


def test_a_job_that_lingers_after_its_result_is_taken_in_at_its_limit() -> None:
    assert next_step(running(has_result=True), 0, POLICY, 1100.1) == TakeIn()


def test_a_job_over_its_time_is_stopped() -> None:
    step = next_step(running(), 0, POLICY, 1100.1)
    assert isinstance(step, Stop)
    assert "100 s" in step.error


@pytest.mark.parametrize(("status", "said"), [(0, "status 0"), (1, "status 1"), (-9, "signal 9")])
def test_a_job_that_ended_without_result_is_tried_again(status: int, said: str) -> None:
    step = next_step(running(process="ended", exit_status=status), 0, POLICY, 1001.0)
    assert isinstance(step, Retry)
    assert said in step.error
    assert step.failures == 1


def test_pauses_grow_and_attempts_end() -> None:
    policy = Policy(retrain_after=0, attempts=7, timeout_s=1.0, backoff_s=5.0)
    pauses = []
    failures = 0
    while isinstance(outcome := after_failure(running(failures=failures), "broken", policy, 0.0), Retry):
        pauses.append(outcome.not_before)
        failures = outcome.failures
    assert pauses == [5.0, 20.0, 80.0, 320.0, MAX_BACKOFF_S, MAX_BACKOFF_S]
    assert outcome == Fail("broken", 7)


def test_an_attempt_that_the_hub_took_down_is_not_the_jobs_failure() -> None:
    step = next_step(running(process="lost", failures=2), 0, POLICY, 1001.0)
    assert isinstance(step, Retry)
    assert (step.failures, step.not_before) == (2, 1001.0)


def test_even_interruptions_end() -> None:
    job = running(process="lost", attempt=POLICY.attempts + MAX_INTERRUPTIONS)
    assert isinstance(next_step(job, 0, POLICY, 1001.0), Fail)


def test_a_fifth_of_the_texts_is_held_out_for_ever() -> None:
    keys = [text_key(f"review {number}") for number in range(20_000)]
    share = sum(map(is_held_out, keys)) / len(keys)
    assert share == pytest.approx(0.2, abs=0.01)
    assert is_held_out(text_key("  review   1\n")) == is_held_out(text_key("review 1"))


def change(kind: str, version: str) -> ChampionChange:
    return ChampionChange(kind, f"sha256:{version}", version)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "target"),
    [
        ([], None),
        ([("promotion", "v1")], None),
        ([("promotion", "v1"), ("promotion", "v2")], "v1"),
        ([("promotion", "v1"), ("promotion", "v2"), ("promotion", "v4")], "v2"),
        ([("promotion", "v1"), ("promotion", "v2"), ("promotion", "v4"), ("rollback", "v2")], "v1"),
        ([("promotion", "v1"), ("promotion", "v2"), ("rollback", "v1")], None),
        ([("promotion", "v1"), ("promotion", "v2"), ("rollback", "v1"), ("promotion", "v3")], "v1"),
    ],
)
def test_rollbacks_go_back_one_promotion_each(history: list[tuple[str, str]], target: str | None) -> None:
    found = previous_champion([change(*step) for step in history])
    assert (found.version if found else None) == target
