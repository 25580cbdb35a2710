"""Runs of MLPerf's benchmark in turn, each a process of its own, and the record that follows from their logs.

Whatever is finished is on disk: `DIRECTORY/MODEL/PLACE/result_SEED.txt` is written when its run has ended, the record
after each. Interrupted runs leave no result, and are made anew when the submission goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from millpond import MillpondError
from millpond.learn.checkpoint import dotted
from millpond.learn.mllog import Log, LogError, RunLog, mean_result, parse, read
from millpond.learn.mlperf import BENCHMARK, DEVIATIONS, RULES, TARGET, Plan, run
from millpond.learn.pictures import save, target_figure
from millpond.process import die_with_parent
from millpond.settings import LearnSettings

Place = Literal["local", "pool"]
PLAN, RECORD, PICTURE = "plan.json", "record.json", "accuracy.png"
STOP_S = 15.0
"""How long a run may take to end when it is asked to, before it is killed; on the pool it gives its lease back."""
MAX_FILE_BYTES = 16 * 1024 * 1024


class SubmissionError(MillpondError):
    """The runs cannot go on; the message says why and what to do."""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as its log tells."""

    seed: int
    log: str
    run: RunLog


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a model in a place, and what they come to."""

    model: str
    place: Place
    runs: list[RunRecord]
    result_s: float | None
    """Mean of the runs without the fastest and the slowest, in seconds; None: there is none."""
    why_none: str
    epochs: float | None
    """Mean number of epochs of the runs that reached the target."""
    step_s: float | None
    """Seconds a step took, over all runs."""
    full_epoch_s: float | None
    """Seconds that an epoch over the whole splits takes with its evaluation; of a rehearsal, by its rate."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`record.json`."""

    benchmark: str
    division: str
    target: float
    rehearsal: int | None
    created: str
    rules: list[str]
    deviations: list[str]
    entries: list[Entry]
    pool_to_local: dict[str, float]
    """By model: the result on the pool over that without it; below 1 the pool is faster."""
    systems: dict[str, dict[str, Any]]
    """Hardware and software, by place."""


def open_submission(directory: Path, plan: Plan, *, resume: bool) -> None:
    """Make the directory of a submission, or see that the one to go on with is of the same plan.

    Raises:
        SubmissionError: something else is there, or with `resume` there is nothing to go on with.
    """
    path = directory / PLAN
    if directory.exists() and any(directory.iterdir()):
        if not resume:
            hint = " Or go on with the runs in it: --resume." if path.is_file() else ""
            raise SubmissionError(f"{directory} is not empty; a submission has a directory of its own.{hint}")
        before, now = (dotted(msgspec.to_builtins(each)) for each in (read_plan(directory), plan))
        if changed := [key for key in sorted(before | now) if before.get(key) != now.get(key)]:
            of = ", ".join(f"{key} {before.get(key)!r}" for key in changed[:5])
            raise SubmissionError(f"the runs in {directory} were made with {of}. Give the same, or another --out.")
    elif resume:
        raise SubmissionError(f"there is nothing in {directory} to go on with. Leave --resume out.")
    directory.mkdir(parents=True, exist_ok=True)
    _write(path, msgspec.json.format(msgspec.json.encode(plan)))


def read_plan(directory: Path) -> Plan:
    """Return the plan of a submission.

    Raises:
        SubmissionError: there is none, or it cannot be read.
    """
    try:
        with (directory / PLAN).open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=Plan)
    except (OSError, msgspec.MsgspecError) as error:
        raise SubmissionError(f"{directory} holds no submission that can be read: {error}.") from error


def make_run(
    directory: Path, model: str, seed: int, place: Place, settings: LearnSettings, report: Callable[..., None]
) -> bool:
    """Make one run in this process and leave its log; return whether it reached the target.

    Raises:
        SubmissionError: there is no such plan or model.
        DataError: the data cannot be used.
    """
    plan = read_plan(directory)
    if model not in plan.recipes:
        raise SubmissionError(f"{model} is not in the plan of {directory}.")
    path = log_path(directory, model, place, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            reached = run(plan, model, seed, settings, Log(file.write), pooled=place == "pool", report=report)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return reached


def log_path(directory: Path, model: str, place: Place, seed: int) -> Path:
    """Return where the log of a run lies; MLPerf's tools look for this name."""
    return directory / model / place / f"result_{seed}.txt"


def make_runs(
    directory: Path,
    plan: Plan,
    seeds: int,
    places: Sequence[Place],
    *,
    on_run: Callable[[str, Place, int, RunLog | None], None] = lambda model, place, seed, log: None,
) -> Record:
    """Make the runs that are not there yet, one after the other, and return the record.

    The places take turns, so that both see the same machine. `on_run` is told of a run before (None) and after.

    Raises:
        SubmissionError: a run could not be made.
    """
    for model in plan.recipes:
        for seed in range(seeds):
            for place in places:
                path = log_path(directory, model, place, seed)
                if not path.exists():
                    on_run(model, place, seed, None)
                    _start(directory, model, place, seed)
                    _write(directory / RECORD, msgspec.json.format(msgspec.json.encode(record(directory, plan))))
                on_run(model, place, seed, _read_log(path))
    found = record(directory, plan)
    _write(directory / RECORD, msgspec.json.format(msgspec.json.encode(found)))
    runs = {f"{entry.model}, {entry.place}": [made.run for made in entry.runs] for entry in found.entries}
    save(target_figure(runs, TARGET), directory / PICTURE)
    return found


def record(directory: Path, plan: Plan) -> Record:
    """Return what the logs in a submission's directory come to."""
    entries, systems = [], dict[str, dict[str, Any]]()
    for model in plan.recipes:
        for place in ("local", "pool"):
            runs = list(_runs(directory, model, place))
            if runs:
                entries.append(_entry(model, place, runs, plan))
                systems.setdefault(place, runs[0].run.values.get("system", {}))
    results = {(entry.model, entry.place): entry.result_s for entry in entries}
    ratios = {}
    for model in plan.recipes:
        local, pool = results.get((model, "local")), results.get((model, "pool"))
        if local and pool:
            ratios[model] = pool / local
    return Record(
        benchmark=BENCHMARK,
        division=plan.division,
        target=TARGET,
        rehearsal=plan.rehearsal,
        created=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
        rules=list(RULES),
        deviations=list(DEVIATIONS) if plan.division == "closed" else [],
        entries=entries,
        pool_to_local=ratios,
        systems=systems,
    )


def _runs(directory: Path, model: str, place: Place) -> Iterator[RunRecord]:
    found = (directory / model / place).glob("result_*.txt")
    for path in sorted(found, key=lambda path: (len(path.name), path.name)):
        with contextlib.suppress(ValueError):
            seed = int(path.stem.removeprefix("result_"))
            yield RunRecord(seed=seed, log=str(path.relative_to(directory)), run=_read_log(path))


def _entry(model: str, place: Place, runs: list[RunRecord], plan: Plan) -> Entry:
    logs = [made.run for made in runs]
    failed = [made.seed for made in runs if made.run.status != "success"]
    result = None if failed or plan.rehearsal else mean_result([log.seconds for log in logs])
    if plan.rehearsal:
        why = f"a rehearsal on {plan.rehearsal:,} rows"
    elif failed:
        of = ", ".join(map(str, failed[:10]))
        why = f"{len(failed)} of {len(runs)} runs did not reach {TARGET:.1%} (seed {of})"
    else:
        why = "" if result is not None else f"{len(runs)} of at least 3 runs"
    epochs = [epoch for log in logs for epoch in log.epochs]
    reached = [len(log.epochs) for log in logs if log.status == "success"]
    steps = sum(len(log.epochs) * -(-log.values["train_samples"] // log.values["global_batch_size"]) for log in logs)
    train_s, eval_s = sum(epoch.train_s for epoch in epochs), sum(epoch.eval_s for epoch in epochs)
    return Entry(
        model=model,
        place=place,
        runs=runs,
        result_s=result,
        why_none=why,
        epochs=sum(reached) / len(reached) if reached else None,
        step_s=train_s / steps if steps else None,
        full_epoch_s=_full_epoch_s(logs, train_s, eval_s) if epochs else None,
    )


def _full_epoch_s(logs: Sequence[RunLog], train_s: float, eval_s: float) -> float:
    """Return what an epoch over all rows takes with its evaluation, by the rates of these runs."""
    trained = sum(len(log.epochs) * log.values["train_samples"] for log in logs)
    tested = sum(len(log.epochs) * log.values["eval_samples"] for log in logs)
    rows = logs[0].values["rows"]
    return float(train_s / trained * rows["train"] + eval_s / tested * rows["test"])


def _read_log(path: Path) -> RunLog:
    try:
        with path.open("rb") as file:
            return read(parse(file.read(MAX_FILE_BYTES).decode("utf-8", "replace")))
    except (OSError, LogError) as error:
        raise SubmissionError(f"{path} cannot be used: {error} Delete it, and go on with --resume.") from error


def _start(directory: Path, model: str, place: Place, seed: int) -> None:
    """Make a run in a process of its own and wait for it; whatever ends this process ends that one.

    Raises:
        SubmissionError: it left no log.
    """
    ours = [sys.executable, "-m", "millpond"]
    command = [*ours, "learn", "mlperf-run", str(directory), model, str(seed), "--place", place]
    if place == "pool":
        command = [*ours, "pool", "run", "-n", "1", "--", *command]
    parent = os.getpid()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: die_with_parent(parent))
    try:
        code = process.wait()
    finally:
        if process.poll() is None:  # Ctrl-C; on a terminal the run has heard of it too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S / 3)
            _stop(process)
    path = log_path(directory, model, place, seed)
    if code or not path.exists():
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        raise SubmissionError(
            f"the run of {model} with seed {seed} ({place}) ended with exit code {code}, without a result; it said why "
            f"above. The runs before it are kept: go on with --resume --out {directory}."
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, limit_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)


def _write(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.replace(path)
