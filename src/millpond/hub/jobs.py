"""Training jobs: their rows, their directories, their processes.

A job is a program in its own process group with its own log. It finds its task in a directory, appends its progress
there, and writes `result.json` as its last act. Each attempt has a directory of its own, so that what an earlier
attempt left is never taken for the result of a later one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from millpond import MillpondError
from millpond.hub import corrections
from millpond.hub.db import Database, jobs, rfc3339
from millpond.hub.state import CHAMPION, Hub
from millpond.process import die_with_parent
from millpond.schema import JobProgress, JobResult, JobSpec, LabelledText, PairedCount

JobState = Literal["queued", "running", "succeeded", "failed"]

LOG = "log.txt"
RESULT = "result.json"
PROGRESS = "progress.jsonl"
MARK = "MILLPOND_JOB_DIR"
"""Variable in the environment of a job's processes, by which they are found wherever they went."""
STOP_S = 5.0
"""How long a job may take to end after SIGTERM before it is killed."""
KEPT_JOBS = 50
"""Newest jobs whose directories stay."""
MAX_RESULT_BYTES = 1024 * 1024
MAX_TAIL_BYTES = 256 * 1024
_ID = re.compile(r"job-([1-9][0-9]{0,9})")


class JobFailed(MillpondError):
    """An attempt of a training job came to nothing; the message says why."""


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A training job as the HTTP interface shows it; version, rows, times are those of its newest attempt."""

    id: str
    state: JobState
    reason: str
    created: str | None
    started: str | None
    finished: str | None
    attempt: int
    failures: int
    version: str | None
    champion: str | None
    training_rows: int | None
    heldout_rows: int | None
    progress: JobProgress | None
    error: str | None
    result: JobResult | None


# --- rows ---------------------------------------------------------------------------------------------------------


def create(database: Database, reason: str, now: float) -> tuple[int, bool]:
    """Queue a job and return (its number, True); or (the active job's number, False), for one runs at a time."""
    with database.write() as connection:
        number = connection.scalar(sa.select(jobs.c.number).where(jobs.c.state.in_(["queued", "running"])))
        if number is not None:
            return number, False
        row = {"state": "queued", "reason": reason, "created": now, "not_before": now, "attempt": 0, "failures": 0}
        return connection.scalars(sa.insert(jobs).values(row).returning(jobs.c.number)).one(), True


def update(connection: sa.Connection, number: int, **values: Any) -> None:
    """Change columns of a job."""
    connection.execute(sa.update(jobs).where(jobs.c.number == number).values(values))


def active(database: Database) -> sa.RowMapping | None:
    """Return the row of the job that is queued or running."""
    query = sa.select(jobs).where(jobs.c.state.in_(["queued", "running"])).order_by(jobs.c.number).limit(1)
    with database.read() as connection:
        return connection.execute(query).mappings().one_or_none()


def newest_review_seen(database: Database) -> int:
    """Return the number of the newest review that any finished training has seen; 0 without any."""
    with database.read() as connection:
        return connection.scalar(sa.select(sa.func.max(jobs.c.review))) or 0


def number_of(job_id: str) -> int | None:
    """Return the number in a job's id (`job-7`), None if it is none."""
    match = _ID.fullmatch(job_id)
    return int(match[1]) if match else None


def find(hub: Hub, number: int) -> JobView | None:
    """Return one job."""
    with hub.database.read() as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.number == number)).mappings().one_or_none()
    return _view(hub, row) if row else None


def newest(hub: Hub, limit: int = 50) -> list[JobView]:
    """Return jobs, newest first."""
    with hub.database.read() as connection:
        rows = connection.execute(sa.select(jobs).order_by(jobs.c.number.desc()).limit(limit)).mappings().all()
    return [_view(hub, row) for row in rows]


def count_states(database: Database) -> dict[str, int]:
    """Return how many jobs are in each state."""
    query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
    with database.read() as connection:
        return dict(connection.execute(query).all())


def _view(hub: Hub, row: sa.RowMapping) -> JobView:
    steps = read_progress(directory(hub, row["number"], row["attempt"])) if row["attempt"] else []
    return JobView(
        id=f"job-{row['number']}",
        state=row["state"],
        reason=row["reason"],
        created=rfc3339(row["created"]),
        started=rfc3339(row["started"]),
        finished=rfc3339(row["finished"]),
        attempt=row["attempt"],
        failures=row["failures"],
        version=row["version"],
        champion=row["champion"],
        training_rows=row["training_rows"],
        heldout_rows=row["heldout_rows"],
        progress=steps[-1] if steps else None,
        error=row["error"],
        result=msgspec.convert(row["result"], JobResult) if row["result"] else None,
    )


# --- directories --------------------------------------------------------------------------------------------------


def directory(hub: Hub, number: int, attempt: int) -> Path:
    """Return the directory of one attempt."""
    return hub.home / f"jobs/job-{number}/attempt-{attempt}"


def prepare(hub: Hub, number: int, attempt: int, now: float) -> Path:
    """Write the directory of a job's next attempt and mark the job as running; the process is started after that.

    Raises:
        JobFailed: the directory cannot be written, or there is no recipe or key.
    """
    if why := hub.why_no_training():
        raise JobFailed(why)
    place = directory(hub, number, attempt)
    with hub.database.write() as connection:
        training = corrections.labelled_texts(connection, held_out=False)
        heldout = corrections.labelled_texts(connection, held_out=True)
        spec = JobSpec(
            id=f"job-{number}",
            model=hub.settings.model,
            version=hub.store.next_version(hub.settings.model),
            recipe=str(Path(hub.settings.recipe or "").absolute()),
            registry=str(hub.store.root.absolute()),
            private_key=str(hub.registry.private_key_path.absolute()),
            champion=hub.tags().get(CHAMPION),
            checkpoints="../checkpoints",  # beside the attempts: the next one resumes where this one ended
        )
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            _write_lines(place / spec.corrections, training)
            _write_lines(place / spec.heldout, heldout)
            (place / "job.json").write_bytes(msgspec.json.format(msgspec.json.encode(spec)))
        except OSError as error:
            raise JobFailed(f"The job's directory {place} cannot be written: {error}. Make room.") from error
        update(
            connection,
            number,
            state="running",
            attempt=attempt,
            started=now,
            version=spec.version,
            champion=spec.champion,
            training_rows=len(training),
            heldout_rows=len(heldout),
            review=corrections.newest_review(connection),
            error=None,
        )
    return place


def forget_old(hub: Hub, number: int) -> None:
    """Delete the directories of jobs long before `number`; their rows stay."""
    for place in (hub.home / "jobs").glob("job-*"):
        found = number_of(place.name)
        if found is not None and found <= number - KEPT_JOBS:
            shutil.rmtree(place, ignore_errors=True)


def read_progress(place: Path) -> list[JobProgress]:
    """Return what the job last said of its progress, oldest first; lines that are no progress are left out."""
    steps = []
    for line in _tail(place / PROGRESS).split(b"\n"):
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            steps.append(msgspec.json.decode(line, type=JobProgress))
    return steps


def read_log(place: Path) -> str:
    """Return the end of a job's log."""
    return _tail(place / LOG).decode(errors="replace")


def read_result(place: Path) -> JobResult:
    """Return the job's result.

    Raises:
        JobFailed: it is too long, not JSON, not of the type, or its counts cannot be.
    """
    try:
        with (place / RESULT).open("rb") as file:
            raw = file.read(MAX_RESULT_BYTES + 1)
        if len(raw) > MAX_RESULT_BYTES:
            raise JobFailed(f"The job's {RESULT} has over {MAX_RESULT_BYTES:,} bytes; it is not read.")
        result = msgspec.json.decode(raw, type=JobResult)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise JobFailed(f"The job's {RESULT} cannot be used: {str(error)[:300]}.") from error
    for name, count in (("test", result.test), ("heldout", result.heldout), *result.by_source.items()):
        if not _is_possible(count):
            raise JobFailed(f"The job's {RESULT} cannot be used: the counts of {name[:100]} contradict each other.")
    return result


def _is_possible(count: PairedCount) -> bool:
    parts = (count.both_right, count.only_champion_right, count.only_candidate_right)
    return min(parts) >= 0 and sum(parts) <= count.rows


def _write_lines(path: Path, rows: list[LabelledText]) -> None:
    with path.open("wb") as file:
        file.writelines(msgspec.json.encode(row) + b"\n" for row in rows)


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_TAIL_BYTES))
            return file.read(MAX_TAIL_BYTES)
    except OSError:
        return b""


# --- processes ----------------------------------------------------------------------------------------------------


class JobProcess:
    """The process of one attempt; a child of the controller, and dead when the controller is."""

    def __init__(self, command: str, place: Path):
        self.place = place
        parent = os.getpid()
        hidden = ("MILLPOND_HUB_", "PROMETHEUS_")  # the hub's tokens are no business of the job's
        environ = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        try:
            with (place / LOG).open("ab") as log:
                self._process = subprocess.Popen(
                    [*shlex.split(command), str(place)],
                    env=environ | {MARK: str(place), "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    preexec_fn=lambda: die_with_parent(parent),  # safe: the controller has no other thread
                )
        except (OSError, ValueError) as error:
            raise JobFailed(
                f"The training command {command!r} cannot be started: {error}. See MILLPOND_HUB_TRAIN_COMMAND."
            ) from error

    @property
    def exit_status(self) -> int | None:
        """Return how the process ended; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End the job and all that it started; SIGTERM first."""
        if self._process.poll() is None:  # else its group's number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        kill_left(self.place)
        self._process.wait()


def kill_left(place: Path) -> None:
    """Kill every process that carries the mark of an attempt, whoever its parent is now."""
    deadline = time.monotonic() + STOP_S
    while left := list(_marked(f"{MARK}={place}".encode())):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _marked(mark: bytes) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
