"""Predictions are found again, in other processes too, and are bounded in number and in bytes."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from millpond.edge.predictions import Prediction, PredictionLog
from millpond.schema import ModelRef

MODEL = ModelRef(name="sentiment", version="v1", digest="sha256:" + "0" * 64)


def make(number: int, text: str = "a text") -> Prediction:
    return Prediction(id=f"p{number}", text=text, label="a", scores={"a": 0.75, "b": 0.25}, model=MODEL)


def test_a_prediction_is_found_through_another_connection_and_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "predictions.db"
    one, other = PredictionLog(path, keep=10), PredictionLog(path, keep=10)
    one.add([make(1, "with \x00 and ü")])
    assert other.get("p1") == make(1, "with \x00 and ü")
    assert other.get("p2") is None
    one.close()
    other.close()
    again = PredictionLog(path, keep=10)
    assert again.get("p1") is not None
    again.close()


def test_the_oldest_are_forgotten_and_the_total_goes_on(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "predictions.db", keep=10)
    for number in range(0, 30, 5):
        log.add([make(number + offset) for offset in range(5)])
    assert [log.get(f"p{number}") is not None for number in (0, 19, 20, 29)] == [False, False, True, True]
    assert log.total() == 30
    log.close()


def test_the_file_does_not_grow_past_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "predictions.db"
    log = PredictionLog(path, keep=1_000_000, max_bytes=1024 * 1024)
    for number in range(100):
        log.add([make(number, "x" * 50_000)])
    assert log.get("p99") is not None
    assert log.get("p0") is None
    assert path.stat().st_size <= 1024 * 1024
    log.close()


def test_a_batch_is_remembered_whole_or_not_at_all(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "predictions.db", keep=10)
    log.add([make(1)])
    with pytest.raises(sqlite3.IntegrityError):
        log.add([make(2), make(1)])
    assert log.get("p2") is None
    log.add([make(3)])
    assert log.get("p3") is not None
    log.close()


def test_a_damaged_file_is_begun_anew_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "predictions.db"
    path.write_bytes(b"no database at all" * 1000)
    PredictionLog.clear_if_damaged(path)
    log = PredictionLog(path, keep=10)
    log.add([make(1)])
    log.close()
    PredictionLog.clear_if_damaged(path)
    log = PredictionLog(path, keep=10)
    assert log.get("p1") is not None
    log.close()
