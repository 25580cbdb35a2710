"""MLPerf's log: lines as `mlperf_logging` writes them, read back as its checker and its summarizer read them.

A log is the record of one run: the time that counts is between its `run_start` and its `run_stop`. The rules are those
of the checker's ruleset 6.1.0 that hold for every benchmark. Knows no model and no data.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

import millpond
from millpond import MillpondError

PREFIX = ":::MLLOG "
EXACTLY_ONE = frozenset(
    {
        *("submission_benchmark", "submission_division", "submission_org", "submission_platform"),
        *("init_stop", "run_start", "run_stop", "train_samples", "eval_samples", "global_batch_size"),
        *("gradient_accumulation_steps", "micro_batch_size", "config_filename"),
        *("tensor_parallelism", "pipeline_parallelism", "context_parallelism", "expert_parallelism"),
        *(f"lowest_numerical_precision_in_{where}" for where in ("linear", "attn", "comm")),
    }
)
AT_LEAST_ONE = frozenset(
    {"cache_clear", "init_start", "epoch_start", "epoch_stop", "eval_start", "eval_stop", "eval_accuracy"}
)
NUMBERED = frozenset({"epoch_start", "epoch_stop", "eval_start", "eval_stop", "eval_accuracy"})
"""Keys whose metadata name the epoch."""
DROPPED = 2
"""The fastest and the slowest run, which do not count."""


class LogError(MillpondError):
    """A log cannot be read, or is not the log of a whole run."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line."""

    namespace: str
    time_ms: int
    """Since 1970."""
    event_type: Literal["INTERVAL_START", "INTERVAL_END", "POINT_IN_TIME"]
    key: str
    value: str | int | float | bool | dict[str, Any] | None
    metadata: dict[str, Any]

    def line(self) -> str:
        """Return the line, without its end."""
        return PREFIX + msgspec.json.encode(self).decode()


class EpochLog(msgspec.Struct, frozen=True, kw_only=True):
    """An epoch that was trained and evaluated."""

    epoch: int
    train_s: float
    eval_s: float
    accuracy: float
    at_s: float
    """Since `run_start`, when the accuracy was known."""


class RunLog(msgspec.Struct, frozen=True, kw_only=True):
    """What a log tells of its run."""

    status: Literal["success", "aborted"]
    seconds: float
    epochs: list[EpochLog]
    values: dict[str, Any]
    """What was said once, by key: the seed, the hyperparameters, the system."""
    why: str
    """Why it was aborted."""


class Log:
    """Writes the lines of one run; their times never go back, whatever is done to the machine's clock."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._began_ms, self._began_ns = time.time_ns() // 1_000_000, time.monotonic_ns()

    def event(self, key: str, value: Any = None, **metadata: Any) -> None:
        """Write that something is so."""
        self._log("POINT_IN_TIME", key, value, metadata)

    def start(self, key: str, **metadata: Any) -> None:
        """Write that something begins."""
        self._log("INTERVAL_START", key, None, metadata)

    def end(self, key: str, **metadata: Any) -> None:
        """Write that something has ended."""
        self._log("INTERVAL_END", key, None, metadata)

    def _log(
        self,
        kind: Literal["INTERVAL_START", "INTERVAL_END", "POINT_IN_TIME"],
        key: str,
        value: Any,
        about: dict[str, Any],
    ) -> None:
        caller = sys._getframe(2)
        file = Path(caller.f_code.co_filename)
        root = Path(millpond.__file__).parents[1]
        named = str(file.relative_to(root) if file.is_relative_to(root) else file.name)
        time_ms = self._began_ms + (time.monotonic_ns() - self._began_ns) // 1_000_000
        metadata = {"file": named, "lineno": caller.f_lineno, **about}
        event = Event(namespace="", time_ms=time_ms, event_type=kind, key=key, value=value, metadata=metadata)
        self._write(event.line() + "\n")


def parse(text: str) -> list[Event]:
    """Return the events of a log; lines of anything else may stand between them.

    Raises:
        LogError: a line that begins like one of MLPerf's is none.
    """
    events = []
    for number, line in enumerate(text.splitlines(), 1):
        _, prefix, rest = line.partition(PREFIX)
        if not prefix:
            continue
        try:
            events.append(msgspec.json.decode(rest, type=Event))
        except msgspec.MsgspecError as error:
            raise LogError(f"line {number} is not a line of MLPerf's log: {error}.") from error
    return events


def read(events: Sequence[Event]) -> RunLog:
    """Return what the log of a whole run tells.

    Raises:
        LogError: it breaks the rules (see `violations`).
    """
    if found := violations(events):
        raise LogError(f"this is not the log of a run by MLPerf's rules: {'; '.join(found[:5])}.")
    times: dict[tuple[str, int], int] = {}
    accuracies: dict[int, tuple[float, int]] = {}
    counts = Counter(event.key for event in events)
    start, stop = (next(event for event in events if event.key == key) for key in ("run_start", "run_stop"))
    for event in events:
        if event.key in NUMBERED:
            number = int(event.metadata["epoch_num"])
            times[event.key, number] = event.time_ms
            if event.key == "eval_accuracy":
                assert isinstance(event.value, int | float)  # `violations` has seen to it
                accuracies[number] = (float(event.value), event.time_ms)

    def span(what: str, number: int) -> float:
        return (times[f"{what}_stop", number] - times[f"{what}_start", number]) / 1000

    return RunLog(
        status="success" if stop.metadata["status"] == "success" else "aborted",
        seconds=(stop.time_ms - start.time_ms) / 1000,
        epochs=[
            EpochLog(
                epoch=number,
                train_s=span("epoch", number),
                eval_s=span("eval", number),
                accuracy=accuracy,
                at_s=(time_ms - start.time_ms) / 1000,
            )
            for number, (accuracy, time_ms) in accuracies.items()
        ],
        values={event.key: event.value for event in events if event.value is not None and counts[event.key] == 1},
        why=str(stop.metadata.get("why", "")),
    )


def violations(events: Sequence[Event]) -> list[str]:
    """Return in words which rules a log breaks: keys that lack or come twice, the order, the times, the numbers."""
    counts = Counter(event.key for event in events)
    aborted = any(event.key == "run_stop" and event.metadata.get("status") == "aborted" for event in events)
    wanted = AT_LEAST_ONE - NUMBERED if aborted else AT_LEAST_ONE
    found = [f"{key} is there {counts[key]} times, not once" for key in sorted(EXACTLY_ONE) if counts[key] != 1]
    found += [f"{key} is missing" for key in sorted(wanted) if not counts[key]]
    if found:
        return found
    place = {key: [i for i, event in enumerate(events) if event.key == key] for key in {*counts, *NUMBERED}}
    order = ("cache_clear", "init_start", "init_stop", "run_start", "epoch_start", "run_stop")
    for before, after in pairwise(order):
        if place[before] and place[after] and place[before][-1 if before == "init_start" else 0] > place[after][0]:
            found.append(f"{after} stands before {before}")
    if any(place["run_stop"][0] < i for key in NUMBERED for i in place[key]):
        found.append("the run goes on after run_stop")
    if any(after.time_ms < before.time_ms for before, after in pairwise(events)):
        found.append("a time goes back")
    stop = events[place["run_stop"][0]]
    if stop.metadata.get("status") not in ("success", "aborted"):
        found.append("run_stop has no status")
    for key in sorted(NUMBERED):
        numbers = [events[i].metadata.get("epoch_num") for i in place[key]]
        if numbers != list(range(1, len(numbers) + 1)):
            found.append(f"{key} does not count the epochs from 1: {numbers[:5]}")
    if any(not isinstance(events[i].value, int | float) for i in place["eval_accuracy"]):
        found.append("eval_accuracy is no number")
    if len({len(place[key]) for key in ("epoch_stop", "eval_start", "eval_stop", "eval_accuracy")}) > 1:
        found.append("an epoch was not evaluated, or an evaluation did not end")
    return found


def mean_result(seconds: Sequence[float]) -> float | None:
    """Return a benchmark's result: the mean of its runs without the fastest and the slowest; None of fewer than 3."""
    counted = sorted(seconds)[1:-1] if len(seconds) > DROPPED else []
    return sum(counted) / len(counted) if counted else None
