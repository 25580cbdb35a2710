"""MLPerf's log lines, and the rules of its checker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from millpond.learn.mllog import EXACTLY_ONE, Event, Log, LogError, mean_result, parse, read, violations

ONCE = {key: 1 for key in EXACTLY_ONE if key not in ("init_stop", "run_start", "run_stop")}


@dataclass
class Written:
    """A log in memory."""

    text: str = ""
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        self.log = Log(self.write)

    def write(self, line: str) -> None:
        self.text += line


def whole_log(accuracies: tuple[float, ...] = (0.8, 0.91), *, seconds: float = 20.0, **values: Any) -> list[Event]:
    """Return the log of a run whose epochs take equal times."""
    written = Written()
    log = written.log
    log.event("cache_clear", True)
    log.start("init_start")
    for key, value in (ONCE | values).items():
        log.event(key, value)
    log.end("init_stop")
    log.start("run_start")
    for number, accuracy in enumerate(accuracies, 1):
        log.start("epoch_start", epoch_num=number)
        log.end("epoch_stop", epoch_num=number)
        log.start("eval_start", epoch_num=number)
        log.event("eval_accuracy", accuracy, epoch_num=number)
        log.end("eval_stop", epoch_num=number)
    log.end("run_stop", status="success" if accuracies[-1] > 0.906 else "aborted", why="")
    events = parse(written.text)
    start = next(i for i, event in enumerate(events) if event.key == "run_start")
    step_ms = 1000 * seconds / (len(events) - 1 - start)
    return [
        msgspec.structs.replace(event, time_ms=1_000_000 + round(step_ms * max(0, i - start)))
        for i, event in enumerate(events)
    ]


def test_a_line_is_as_mlperf_logging_writes_it() -> None:
    written = Written()
    written.log.start("epoch_start", epoch_num=1)
    prefix, _, rest = written.text.partition(" ")
    line = msgspec.json.decode(rest)
    assert prefix == ":::MLLOG"
    assert list(line) == ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
    assert (line["event_type"], line["key"], line["value"]) == ("INTERVAL_START", "epoch_start", None)
    assert line["metadata"]["file"] == "test_mllog.py"
    assert line["metadata"]["epoch_num"] == 1
    assert written.text.endswith("}\n")


def test_a_whole_log_breaks_no_rule_and_tells_its_run() -> None:
    events = whole_log((0.8, 0.91), seconds=20.0, seed=7)
    assert violations(events) == []
    run = read(events)
    assert (run.status, run.seconds, run.values["seed"]) == ("success", 20.0, 7)
    assert [(epoch.epoch, epoch.accuracy) for epoch in run.epochs] == [(1, 0.8), (2, 0.91)]
    assert run.epochs[0].at_s < run.epochs[1].at_s < run.seconds
    assert read(whole_log((0.8,))).status == "aborted"


def _drop(key: str) -> Callable[[list[Event]], list[Event]]:
    return lambda events: [event for event in events if event.key != key]


def _twice(key: str) -> Callable[[list[Event]], list[Event]]:
    return lambda events: [again for event in events for again in ([event, event] if event.key == key else [event])]


def _last(key: str) -> Callable[[list[Event]], list[Event]]:
    return lambda events: sorted(events, key=lambda event: event.key == key)


def _change(key: str, **changes: Any) -> Callable[[list[Event]], list[Event]]:
    return lambda events: [msgspec.structs.replace(event, **changes) if event.key == key else event for event in events]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_drop("cache_clear"), "cache_clear is missing"),
        (_drop("eval_accuracy"), "eval_accuracy is missing"),
        (_drop("train_samples"), "train_samples is there 0 times"),
        (_twice("run_start"), "run_start is there 2 times"),
        (_last("init_stop"), "run_start stands before init_stop"),
        (_last("cache_clear"), "init_start stands before cache_clear"),
        (_last("eval_accuracy"), "the run goes on after run_stop"),
        (_change("epoch_start", time_ms=5), "a time goes back"),
        (_change("run_stop", metadata={}), "run_stop has no status"),
        (_change("eval_start", metadata={"epoch_num": 2}), "eval_start does not count the epochs from 1"),
        (_change("eval_accuracy", value="good"), "eval_accuracy is no number"),
        (lambda events: [event for event in events if event != events[-2]], "an evaluation did not end"),
    ],
)
def test_a_broken_rule_is_told(damage: Callable[[list[Event]], list[Event]], told: str) -> None:
    events = damage(whole_log())
    assert any(told in found for found in violations(events)), violations(events)
    with pytest.raises(LogError, match="not the log of a run by MLPerf's rules"):
        read(events)


def test_a_run_aborted_before_its_first_evaluation_is_told_as_aborted() -> None:
    unmeasured = [event for event in whole_log((0.5,)) if not event.key.startswith("eval_a")]
    without = [event for event in unmeasured if event.key not in ("epoch_stop", "eval_start", "eval_stop")]
    assert (read(without).status, read(without).epochs) == ("aborted", [])


def test_other_lines_stand_between_and_a_broken_one_is_named() -> None:
    text = "\n".join(f"rank 0: {event.line()}\nloss 0.3" for event in whole_log())
    assert len(parse(text)) == len(whole_log())
    with pytest.raises(LogError, match="line 2 is not"):
        parse('hello\n:::MLLOG {"key": "seed"}\n')


def test_the_result_is_the_mean_without_the_fastest_and_the_slowest() -> None:
    assert mean_result([9.0, 1.0, 4.0, 100.0, 5.0]) == 6.0
    assert mean_result([3.0, 1.0, 2.0]) == 2.0
    assert mean_result([3.0, 1.0]) is None
