import json
from typing import Any

import pytest

from millpond.demo.summary import Corrections, MeasuredModel, Summary


def summary(**changes: Any) -> Summary:
    fields: dict[str, Any] = {
        "corpus": "imdb",
        "corpus_why": "found below MILLPOND_DATA",
        "official_test": True,
        "rows": {"train": 12_000, "traffic": 13_000, "test": 25_000},
        "v1": MeasuredModel(version="v1", test_accuracy=0.898, corrections_accuracy=0.0),
        "v2": MeasuredModel(version="v2", test_accuracy=0.911, corrections_accuracy=0.4),
        "promoted": True,
        "reasons": ["It is better."],
        "served": "v2",
        "target": 0.906,
        "target_reached": True,
        "corrections": Corrections(sent=1300, accepted=1300, held_out=260),
        "failed_requests": 0,
        "seconds": {"train_v1": 30.0, "total": 120.0},
    }
    return Summary(**fields | changes)


def test_json_holds_what_programs_rely_on() -> None:
    written = json.loads(summary().as_json())
    assert {"corpus", "official_test", "v1", "v2", "promoted", "target", "target_reached"} <= written.keys()
    assert {"version", "test_accuracy", "corrections_accuracy"} <= written["v1"].keys() & written["v2"].keys()
    assert {"sent", "accepted"} <= written["corrections"].keys()
    assert written["seconds"]["total"] == 120.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "90.6% test accuracy (MLPerf Training sentiment benchmark): reached"),
        ({"target_reached": False}, "NOT reached"),
        ({"official_test": False, "target_reached": None}, "not judged"),
        ({"target": None, "target_reached": None}, "none is set"),
    ],
)
def test_target_is_judged_on_the_official_split_alone(changes: dict[str, Any], words: str) -> None:
    assert words in dict(summary(**changes).lines())["target"]


def test_sizes_say_that_a_held_out_part_is_not_the_official_split() -> None:
    assert "NOT the official test split" in dict(summary(official_test=False).lines())["sizes"]


def test_a_person_reads_about_a_dozen_lines() -> None:
    assert 8 <= len(summary().lines()) <= 14
