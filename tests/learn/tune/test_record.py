"""The record of a search: what is written is read, a torn end goes, anything else that is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from millpond.learn.tune.record import FORMAT, Begun, Ended, Record, Reported, Started, TuneError, read_trials

BEGUN = Begun(format=FORMAT, search={"seed": 0, "tune": {"metric": "loss"}}, data="rows")


def reported(number: int, epoch: int, loss: float, accuracy: float = 0.5) -> Reported:
    return Reported(
        number=number, epoch=epoch, loss=loss, accuracy=accuracy, training_loss=loss, seconds=1.0, at_s=float(epoch)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A trial that has finished, and one that was cut off in its second epoch."""
    path = tmp_path / "search/trials.jsonl"
    record = Record.create(path, BEGUN)
    for line in (
        Started(number=0, parameters={"start": 0.1, "max_ngram": 2, "schedule": "linear", "by_length": True}, at_s=0.5),
        reported(0, 1, 0.5, 0.8),
        reported(0, 2, 0.4, 0.7),
        Ended(number=0, how="finished", at_s=3.0),
        Started(number=1, parameters={"start": 0.2}, at_s=3.0),
        reported(1, 1, 0.3),
    ):
        record.add(line)
    record.close()
    return path


def test_what_was_written_is_read(path: Path) -> None:
    record = Record.open(path)
    assert record.begun == BEGUN
    assert [(trial.number, trial.state, len(trial.epochs)) for trial in record.trials] == [
        (0, "finished", 2),
        (1, "running", 1),
    ]
    first = record.trials[0]
    assert first.parameters == {"start": 0.1, "max_ngram": 2, "schedule": "linear", "by_length": True}
    assert (first.objective("loss"), first.objective("accuracy")) == (0.4, pytest.approx(0.2))
    assert record.spent_s == 3.0
    record.close()
    assert len(read_trials(path)) == 2


def test_a_trial_that_was_cut_off_begins_anew(path: Path) -> None:
    record = Record.open(path)
    record.add(Started(number=1, parameters={"start": 0.2}, at_s=4.0))
    assert record.trials[1].epochs == []
    record.add(reported(1, 1, 0.35))
    record.add(Ended(number=1, how="failed", error="why", at_s=5.0))
    record.close()
    again = read_trials(path)[1]
    assert (again.state, again.objective("loss"), again.ended and again.ended.error) == ("failed", 0.35, "why")


def test_a_line_that_was_cut_off_by_a_kill_goes_and_the_next_one_is_whole(path: Path) -> None:
    raw = path.read_bytes()
    for length in range(1, 60, 7):
        path.write_bytes(raw[:-length])
        record = Record.open(path)
        record.add(Ended(number=1, how="stopped", at_s=9.0))
        record.close()
        assert read_trials(path)[1].state == "stopped"


@pytest.mark.parametrize(
    "damage",
    [
        b"nonsense\n",
        b"\xff\xfe\n",
        b"\n",
        b'{"kind":"started","number":7,"parameters":{},"at_s":1}\n',
        b'{"kind":"started","number":1,"parameters":{"start":0.3},"at_s":1}\n',
        b'{"kind":"started","number":-1,"parameters":{},"at_s":1}\n',
        b'{"kind":"ended","number":0,"how":"finished","at_s":1}\n',
        b'{"kind":"ended","number":1,"how":"vanished","at_s":1}\n',
        b'{"kind":"epoch","number":1,"epoch":3,"loss":1,"accuracy":1,"training_loss":1,"seconds":1,"at_s":1}\n',
        b'{"kind":"epoch","number":1,"epoch":2,"loss":null,"accuracy":1,"training_loss":1,"seconds":1,"at_s":1}\n',
        b'{"kind":"begun","format":1,"search":{},"data":""}\n',
        b'{"kind":"other"}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_damaged_line_is_named(path: Path, damage: bytes) -> None:
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(damage)
    with pytest.raises(TuneError, match="line 8 is damaged"):
        Record.open(path)
    path.write_bytes(whole)
    Record.open(path).close()


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b"{}\n", "line 1 is damaged"), (b"cut", "is empty")])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "trials.jsonl").write_bytes(content)
    with pytest.raises(TuneError, match=says):
        Record.open(tmp_path / "trials.jsonl")


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_bytes(b'{"kind":"begun","format":2,"search":{},"data":""}\n')
    with pytest.raises(TuneError, match="format 2, which is not 1"):
        Record.open(tmp_path / "trials.jsonl")


def test_two_searches_do_not_share_a_record(path: Path) -> None:
    record = Record.open(path)
    with pytest.raises(TuneError, match="another search is at work"):
        Record.open(path)
    record.close()
    Record.open(path).close()
    with pytest.raises(TuneError, match="is there already"):
        Record.create(path, BEGUN)


def test_another_search_does_not_go_on_with_it(path: Path) -> None:
    record = Record.open(path)
    record.check(BEGUN)
    other = Begun(format=FORMAT, search={"seed": 1, "tune": {"metric": "accuracy"}}, data="others")
    with pytest.raises(TuneError, match=r"seed is 0 there and 1 here; tune.metric is 'loss' there.*rows are others"):
        record.check(other)
    record.close()


def test_a_search_that_is_not_there_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(TuneError, match="no search to resume"):
        Record.open(tmp_path / "none/trials.jsonl")
