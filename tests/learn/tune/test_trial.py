"""The process that trains trials: what it is asked, what it answers, and that no trial is its end."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millpond.learn.datasets import Dataset
from millpond.learn.recipes import DataTable, hold_back, read_recipe
from millpond.learn.tune.trial import ENCODINGS, serve
from millpond.learn.tune.trial_process import Answer, EpochDone, Go, Setup, Stop, Task, TrialEnded, TrialProcess
from millpond.learn.tune.tuning import share


def make_setup(directory: Path, dataset: Dataset, **changes: Any) -> Setup:
    given = {"data": {"corpus": "imdb"}, "validation": 0.2, "training": {"epochs": 3}}
    given["model"] = {"architecture": "ngram", "options": {"buckets": 1024, "min_count": 1}}
    recipe = read_recipe(None, given | changes)
    learned, held = hold_back(recipe, dataset, dataset.train)
    assert held is not None
    share(directory, dataset, learned, held, "rows")
    plain = msgspec.to_builtins(msgspec.structs.replace(recipe, data=DataTable(file="rows")))
    return Setup(recipe=plain, directory=str(directory), rows="rows", device="cpu", threads=1, memory_share=None)


def answers(setup: Setup, *said: Task | Go | Stop) -> list[Answer]:
    out = io.BytesIO()
    serve([msgspec.json.encode(what) + b"\n" for what in (setup, *said)], out)
    return [msgspec.json.decode(line, type=Answer) for line in out.getvalue().splitlines()]


def test_trials_follow_each_other_and_share_what_is_encoded_alike(small: Dataset, tmp_path: Path) -> None:
    setup = make_setup(tmp_path, small)
    task, other = Task(parameters={"smoothing": 1.0}), Task(parameters={"smoothing": 4.0, "max_ngram": 1})
    found = answers(setup, task, Go(), Go(), other, Stop(), task, Go(), Go())
    epochs = [(answer.epoch, answer.last) for answer in found if isinstance(answer, EpochDone)]
    assert epochs == [(1, False), (2, False), (3, True), (1, False), (1, False), (2, False), (3, True)]
    losses = [answer.loss for answer in found if isinstance(answer, EpochDone)]
    assert losses[:3] == losses[4:]  # the same values give the same trial
    assert losses[3] != losses[0]
    assert len(list((tmp_path / ENCODINGS).iterdir())) == 2


def test_a_trial_that_diverges_or_cannot_be_made_fails_alone(small: Dataset, tmp_path: Path) -> None:
    options = {"embedding": 8, "filters": 8, "min_count": 1}
    setup = make_setup(tmp_path, small, model={"architecture": "seqcnn", "options": options})
    bad, impossible = Task(parameters={"learning_rate": 1e30}), Task(parameters={"filters": 0})
    found = answers(setup, bad, impossible, Task(parameters={}), Go(), Go())
    assert isinstance(found[0], TrialEnded)
    assert "no longer a number" in found[0].error
    assert isinstance(found[1], TrialEnded)
    assert "filters" in found[1].error
    assert [type(answer) for answer in found[2:]] == [EpochDone] * 3


def test_a_trial_that_runs_out_of_memory_fails_alone(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(tmp_path, small)
    import millpond.learn.tune.trial as module

    real, left = module.fit, [MemoryError("no room"), RuntimeError("a bug\nin a library")]

    def fit(*arguments: Any, **named: Any) -> Any:
        if left:
            raise left.pop(0)
        return real(*arguments, **named)

    monkeypatch.setattr(module, "fit", fit)
    found = answers(setup, Task(parameters={}), Task(parameters={}), Task(parameters={}), Go(), Go())
    assert found[0] == TrialEnded(error="it ran out of memory")
    assert found[1] == TrialEnded(error="RuntimeError: a bug")
    assert len(found) == 5


def test_training_that_ends_early_is_a_trial_that_ended_well(small: Dataset, tmp_path: Path) -> None:
    """With such a learning rate the loss rises, and patience ends it."""
    setup = make_setup(tmp_path, small, training={"epochs": 50, "patience": 1})
    found = answers(setup, Task(parameters={"learning_rate": 100.0}), *[Go()] * 50)
    assert found[-1] == TrialEnded()
    assert 2 <= len(found) < 50


@pytest.fixture
def process(small: Dataset, tmp_path: Path) -> Iterator[TrialProcess]:
    process = TrialProcess(make_setup(tmp_path, small))
    yield process
    process.close()


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_failed_trial_and_the_next_gets_another(process: TrialProcess) -> None:
    process.start({"smoothing": 1.0})
    first = process.next_answer()
    assert isinstance(first, EpochDone)
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    ended = process.next_answer()
    assert isinstance(ended, TrialEnded)
    assert "SIGKILL" in ended.error
    process.start({"smoothing": 1.0})
    again = process.next_answer()
    assert isinstance(again, EpochDone)
    assert again.loss == first.loss


@pytest.mark.slow
def test_what_a_process_said_last_is_told_when_it_cannot_begin(small: Dataset, tmp_path: Path) -> None:
    process = TrialProcess(make_setup(tmp_path, small), prefix=("sh", "-c", "echo no such device >&2; exit 3", "--"))
    process.start({})
    assert process.next_answer() == TrialEnded(error="its process ended with status 3: no such device")
    process.close()
