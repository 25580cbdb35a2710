"""Measures against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from millpond.learn.datasets import Split
from millpond.learn.evaluate import evaluate, paired, paired_by_source, wilson
from millpond.learn.pictures import draw_evaluation, draw_training
from millpond.learn.progress import Epoch

LABELS = ["a", "b", "c"]
PROBABILITY = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.1, 0.85, 0.05], [0, 0.5, 0.5]], np.float32)
TRUTH = Split(["t0", "t1", "t2", "t3", "x" * 2000], np.array([0, 1, 1, 0, 2]))


def test_accuracy_confusion_and_f1() -> None:
    found = evaluate(PROBABILITY, TRUTH, LABELS)
    assert found.accuracy == pytest.approx(2 / 5)
    assert found.confusion == [[1, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert [score.precision for score in found.classes] == pytest.approx([1 / 2, 1 / 3, 0])
    assert [score.recall for score in found.classes] == pytest.approx([1 / 2, 1 / 2, 0])
    assert [score.f1 for score in found.classes] == pytest.approx([1 / 2, 2 / 5, 0])
    assert found.macro_f1 == pytest.approx((1 / 2 + 2 / 5) / 3)
    assert found.log_loss == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.1, 0.5]).mean(), rel=1e-5)


def test_the_worst_mistakes_are_the_surest_and_long_texts_are_cut() -> None:
    found = evaluate(PROBABILITY, TRUTH, LABELS)
    assert [(mistake.row, mistake.predicted) for mistake in found.worst] == [(3, "b"), (1, "a"), (4, "b")]
    assert len(found.worst[2].text) == 500


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    probability = np.array([[0.9, 0.1]] * 10, np.float32)
    split = Split(["t"] * 10, np.array([0] * 7 + [1] * 3))
    assert evaluate(probability, split, ["a", "b"]).calibration_error == pytest.approx(0.2, abs=1e-6)


def test_answers_that_are_sure_and_right_have_no_calibration_error() -> None:
    split = Split(["t"] * 4, np.zeros(4, np.int64))
    found = evaluate(np.array([[1.0, 0.0]] * 4, np.float32), split, ["a", "b"])
    assert (found.accuracy, found.calibration_error, found.worst) == (1.0, 0.0, [])
    assert found.macro_f1 == 1.0  # a label without rows does not count


def test_accuracy_is_divided_by_source_the_largest_first() -> None:
    names = ("few", "many", "none")
    split = Split(TRUTH.texts, TRUTH.labels, np.array([1, 1, 0, 1, 0], np.int16), names)
    found = evaluate(PROBABILITY, split, LABELS).by_source  # right are the first and the third
    assert [(source.name, source.rows, source.accuracy) for source in found] == [("many", 3, 1 / 3), ("few", 2, 1 / 2)]
    right = PROBABILITY.argmax(1) == split.labels
    counts = paired_by_source(split, right, ~right)
    assert {name: (count.rows, count.only_candidate_right) for name, count in counts.items()} == {
        "few": (2, 1),
        "many": (3, 1),
    }
    assert paired_by_source(split, right, None)["many"] == paired(right[[0, 1, 3]], None)


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.5, 10, 0.2366, 0.7634), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.9, 1000, 0.8799, 0.9171)],
)
def test_the_range_of_chance_is_wilsons(share: float, rows: int, low: float, high: float) -> None:
    assert wilson(share, rows) == pytest.approx((low, high), abs=1e-4)


def test_pairs_are_counted() -> None:
    candidate, champion = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    count = paired(candidate, champion)
    assert (count.rows, count.both_right, count.only_champion_right, count.only_candidate_right) == (5, 1, 1, 2)


def test_without_a_champion_the_candidate_is_counted_alone() -> None:
    count = paired(np.array([1, 1, 0], bool), None)
    assert (count.both_right, count.only_champion_right, count.only_candidate_right) == (0, 0, 2)
    assert count.candidate_accuracy == pytest.approx(2 / 3)


def test_pictures_are_drawn_with_few_labels_and_many(tmp_path: Path) -> None:
    draw_evaluation(evaluate(PROBABILITY, TRUTH, LABELS), tmp_path / "few.png")
    many = np.eye(60, dtype=np.float32)
    split = Split(["t"] * 60, np.arange(60))
    draw_evaluation(evaluate(many, split, [f"label {i}" for i in range(60)]), tmp_path / "many.png")
    epochs = [Epoch(1, 0.5, 0.8, None, None, 1.0), Epoch(2, 0.3, 0.9, 0.4, 0.85, 1.0)]
    draw_training(epochs, tmp_path / "training.png")
    for name in ("few.png", "many.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
