"""When to train, and what becomes of a training job: pure decisions.

Facts in, one step out; time is an argument, in seconds. Promises that one job runs at a time, that a failed job is
tried again no more than its policy allows, and that a finished result is taken in before anything else happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HELD_OUT_PERCENT = 20
"""Share of the corrections that never train: promotion is measured on them."""
MAX_INTERRUPTIONS = 10
"""Times that a job may be started again because the hub went away under it, beyond its attempts."""
MAX_BACKOFF_S = 600.0


def text_key(text: str) -> str:
    """Return the same key for texts that differ in white space alone."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def is_held_out(key: str) -> bool:
    """Return whether corrections of the text with this key never train; the same for ever.

    By the text, not by the correction's id: else a text that two people correct could train and measure at once.
    """
    return int(key[:8], 16) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the hub's settings say about training."""

    retrain_after: int
    """Accepted corrections that start a training; 0: only by hand."""
    attempts: int
    timeout_s: float
    backoff_s: float = 5.0
    """Pause after the first failure; each further one is four times as long."""


@dataclass(frozen=True, kw_only=True)
class ActiveJob:
    """The job that is queued or running, and what is known of its process."""

    number: int
    state: Literal["queued", "running"]
    attempt: int = 0
    failures: int = 0
    not_before: float = 0.0
    started: float = 0.0
    process: Literal["none", "alive", "ended", "lost"] = "none"
    """`lost`: it should run, but it is no child of this controller: the hub was restarted."""
    exit_status: int = 0
    has_result: bool = False


@dataclass(frozen=True)
class Wait:
    """Nothing to do now."""


@dataclass(frozen=True)
class Enqueue:
    """Make a job."""

    reason: str


@dataclass(frozen=True)
class Start:
    """Start the job's next attempt."""


@dataclass(frozen=True)
class TakeIn:
    """Take the job's result in."""


@dataclass(frozen=True)
class Stop:
    """End the job's process; it then counts as failed."""

    error: str


@dataclass(frozen=True)
class Retry:
    """Queue the job again, not before a time."""

    error: str
    not_before: float
    failures: int


@dataclass(frozen=True)
class Fail:
    """Give the job up."""

    error: str
    failures: int


Step = Wait | Enqueue | Start | TakeIn | Stop | Retry | Fail


def next_step(job: ActiveJob | None, accepted_since: int, policy: Policy, now: float) -> Step:
    """Return what to do now; `accepted_since` counts the corrections accepted since the last training began."""
    if job is None:
        if 0 < policy.retrain_after <= accepted_since:
            return Enqueue(f"{accepted_since:,} corrections accepted since the last training")
        return Wait()
    if job.state == "queued":
        return Start() if now >= job.not_before else Wait()
    if job.process == "alive":
        if now - job.started > policy.timeout_s:
            if job.has_result:
                return TakeIn()
            return Stop(f"The job ran longer than {policy.timeout_s:g} s and was stopped.")
        return Wait()
    if job.has_result:  # it is the job's last act: how its process ended after it says nothing
        return TakeIn()
    if job.process == "ended":
        how = f"ended with status {job.exit_status}" if job.exit_status >= 0 else f"died of signal {-job.exit_status}"
        return after_failure(job, f"The job {how} and left no result.", policy, now)
    return after_interruption(job, policy, now)


def after_failure(job: ActiveJob, error: str, policy: Policy, now: float) -> Retry | Fail:
    """Return what follows a failed attempt: another after a pause, or the end."""
    failures = job.failures + 1
    if failures >= policy.attempts:
        return Fail(error, failures)
    pause_s = min(MAX_BACKOFF_S, policy.backoff_s * 4 ** (failures - 1))
    return Retry(error, now + pause_s, failures)


def after_interruption(job: ActiveJob, policy: Policy, now: float) -> Retry | Fail:
    """Return what follows an attempt that ended with the hub: at once another, for it was not the job's fault."""
    if job.attempt >= policy.attempts + MAX_INTERRUPTIONS:
        return Fail("The hub was restarted under this job too often.", job.failures)
    return Retry("The hub was restarted while the job ran.", now, job.failures)


@dataclass(frozen=True)
class ChampionChange:
    """A promotion or a rollback that took effect: it made `digest` the champion."""

    kind: Literal["promotion", "rollback"]
    digest: str
    version: str


def previous_champion(changes: Sequence[ChampionChange]) -> ChampionChange | None:
    """Return what a rollback goes back to, given all changes, oldest first; None where there is nothing.

    A rollback takes the newest promotion off, so that repeated ones go further back.
    """
    stack: list[ChampionChange] = []
    for change in changes:
        if change.kind == "promotion":
            stack.append(change)
        elif stack:
            stack.pop()
    return stack[-2] if len(stack) > 1 else None
