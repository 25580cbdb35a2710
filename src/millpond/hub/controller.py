"""The loop that trains: one process beside the hub's web workers, with one thread.

It asks `retrain` what to do, does it, and asks again. Promises that whatever dies when, a job that was running is
started again or its finished result is taken in, once.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from typing import Literal

import sqlalchemy as sa

from millpond import MillpondError
from millpond.hub import corrections, jobs, promotions
from millpond.hub.jobs import JobFailed, JobProcess
from millpond.hub.retrain import (
    ActiveJob,
    Enqueue,
    Fail,
    Policy,
    Retry,
    Start,
    Stop,
    TakeIn,
    Wait,
    after_failure,
    next_step,
)
from millpond.hub.state import Hub
from millpond.settings import HubSettings, RegistrySettings

POLL_S = 0.25
TROUBLE_S = 5.0
"""Pause after an unexpected error, such as a database that is away."""

log = logging.getLogger(__name__)


def run(settings: HubSettings, registry: RegistrySettings) -> None:
    """Control training until SIGTERM; the main function of the controller's process."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    hub = Hub.open(settings, registry)
    controller = Controller(hub)
    try:
        while not stopping.is_set():
            stopping.wait(POLL_S if controller.step_safely() else TROUBLE_S)
    finally:
        controller.close()
        hub.database.close()


class Controller:
    """Does what `retrain` decides; at most one of it runs on a hub's state."""

    def __init__(self, hub: Hub, backoff_s: float = 5.0):
        self.hub = hub
        settings = hub.settings
        self.policy = Policy(
            retrain_after=settings.retrain_after,
            attempts=settings.job_attempts,
            timeout_s=settings.job_timeout_s,
            backoff_s=backoff_s,
        )
        self._process: JobProcess | None = None

    def close(self) -> None:
        """End the job's process, if one runs; its job is started again by the next controller."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def step_safely(self) -> bool:
        """Do one step; return False, and say so in the log, if it met something unexpected."""
        try:
            self.step(time.time())
        except (MillpondError, sa.exc.SQLAlchemyError, OSError) as error:
            log.error("training is held up: %s", error)
            return False
        except Exception:
            log.exception("training is held up by an error of ours")
            return False
        return True

    def step(self, now: float) -> None:
        """Move tags that wait for it, then do the one thing that is due."""
        promotions.move_tags(self.hub)
        row = jobs.active(self.hub.database)
        if row is None:
            policy = (
                self.policy if not self.hub.why_no_training() else dataclasses.replace(self.policy, retrain_after=0)
            )
            seen = jobs.newest_review_seen(self.hub.database)
            step = next_step(None, corrections.count_accepted_since(self.hub.database, seen), policy, now)
            if isinstance(step, Enqueue):
                jobs.create(self.hub.database, step.reason, now)
            return
        job = self._look(row)
        match next_step(job, 0, self.policy, now):
            case Start():
                self._start(job, now)
            case TakeIn():
                self._take_in(job, now)
            case Stop(error):
                self.close()
                self._settle(job, after_failure(job, error, self.policy, now), now)
            case Retry() | Fail() as outcome:
                self.close()
                jobs.kill_left(jobs.directory(self.hub, job.number, job.attempt))
                self._settle(job, outcome, now)
            case Wait() | Enqueue():
                pass

    def _look(self, row: sa.RowMapping) -> ActiveJob:
        place = jobs.directory(self.hub, row["number"], row["attempt"])
        status = self._process.exit_status if self._process else None
        process: Literal["none", "alive", "ended", "lost"] = "none"
        if row["state"] == "running":
            process = "lost" if self._process is None else "alive" if status is None else "ended"
        return ActiveJob(
            number=row["number"],
            state=row["state"],
            attempt=row["attempt"],
            failures=row["failures"],
            not_before=row["not_before"],
            started=row["started"] or 0.0,
            process=process,
            exit_status=status or 0,
            has_result=(place / jobs.RESULT).exists(),
        )

    def _start(self, job: ActiveJob, now: float) -> None:
        self.close()
        jobs.forget_old(self.hub, job.number)
        try:
            place = jobs.prepare(self.hub, job.number, job.attempt + 1, now)
            self._process = JobProcess(self.hub.settings.train_command, place)
        except JobFailed as error:
            self._settle(job, after_failure(job, str(error), self.policy, now), now)

    def _take_in(self, job: ActiveJob, now: float) -> None:
        self.close()
        jobs.kill_left(jobs.directory(self.hub, job.number, job.attempt))
        try:
            verdict = promotions.take_in(self.hub, job.number, job.attempt, now)
        except JobFailed as error:
            self._settle(job, after_failure(job, str(error), self.policy, now), now)
            return
        word = "promoted" if verdict.promoted else "refused"
        log.info("job-%d: %s %s: %s", job.number, verdict.facts.candidate, word, " ".join(verdict.reasons))
        promotions.move_tags(self.hub)

    def _settle(self, job: ActiveJob, outcome: Retry | Fail, now: float) -> None:
        log.warning("job-%d: %s", job.number, outcome.error)
        values: dict[str, object] = {"error": outcome.error, "failures": outcome.failures}
        if isinstance(outcome, Retry):
            values |= {"state": "queued", "not_before": outcome.not_before}
        else:
            values |= {"state": "failed", "finished": now}
        with self.hub.database.write() as connection:
            jobs.update(connection, job.number, **values)
