"""Inspecting data: figures that are known of made-up rows, and those that are published of IMDB."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from millpond.cli.learn import app
from millpond.learn import corpora
from millpond.learn.datasets import Dataset, from_rows
from millpond.learn.duplicates import near_duplicates
from millpond.learn.gather import read_files
from millpond.learn.inspect import inspect
from millpond.learn.inspection_page import write_page
from millpond.learn.suspects import confident_joint, find_suspects
from millpond.learn.texts import Texts
from millpond.settings import LearnSettings, load

from .conftest import make_rows, write_jsonl

ODD = [
    ("caf\u00c3\u00a9", "a"),
    ("<b>bold</b> &amp; so on", "b"),
    ("control \x07 and nul \x00", "a"),
    ("\u05e9\u05dc\u05d5\u05dd", "b"),
    ("lost \ufffd", "a"),
    ("naïve 🙂", "b"),
]


def make_leaky() -> Dataset:
    train = [*make_rows(100), ("twice", "positive"), ("twice", "positive"), ("twice", "negative")]
    test = [*make_rows(30, seed=1), train[0], train[1], train[1]]
    return from_rows("leaky", {"train": train, "test": test})


def test_repeats_leaks_and_conflicts_are_counted() -> None:
    found = inspect(make_leaky(), quick=True)
    assert (found.splits["train"].rows, found.splits["train"].repeated) == (103, 2)
    assert (found.splits["test"].rows, found.splits["test"].repeated) == (33, 1)
    assert [(leak.split, leak.of, leak.texts, leak.rows) for leak in found.leaks] == [("test", "train", 2, 3)]
    assert found.conflicting == 1
    assert found.splits["train"].labels == {"negative": 51, "positive": 52}
    assert found.near_duplicates is found.label_errors is None
    assert inspect(make_leaky().without_leaks(), quick=True).leaks[0].texts == 0


def test_lengths_are_of_words_and_bytes() -> None:
    rows = [("é " * count, "ab"[count % 2]) for count in range(1, 102)]
    lengths = inspect(from_rows("d", {"train": rows, "test": rows}), quick=True).splits["test"]
    assert (lengths.words.least, lengths.words.median, lengths.words.most) == (1, 51, 101)
    assert (lengths.bytes.least, lengths.bytes.median, lengths.bytes.most) == (3, 153, 303)
    assert sum(lengths.words.counts) == sum(lengths.bytes.counts) == 101


def test_odd_characters_are_named() -> None:
    traits = inspect(from_rows("d", {"train": ODD, "test": ODD[:2]}), quick=True).traits
    assert traits == {
        "beyond ASCII": 5,
        "markup": 2,
        "decoded wrongly": 2,
        "replacement characters": 1,
        "control characters": 1,
        "right to left": 1,
    }


def test_languages_are_told() -> None:
    english = ("The weather was so lovely that we walked all the way home through the park.", "a")
    german = ("Das Wetter war so schön, dass wir den ganzen Weg durch den Park nach Hause gingen.", "b")
    languages = inspect(from_rows("d", {"train": [english, german], "test": [german]}), quick=True).languages
    assert languages == {"de": 2, "en": 1}


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(0)
    texts = [" ".join(f"word{rng.randrange(500)}" for _ in range(100)) for _ in range(200)]
    near = [f"{texts[7]} indeed", texts[8].upper(), texts[9].replace("word1", "other")]
    found = near_duplicates(Texts.of([*texts, *near]), np.arange(203))
    assert {(pair.one, pair.two) for pair in found} >= {(7, 200), (8, 201)}
    assert all(pair.one == pair.two - 193 for pair in found)
    assert all(pair.similarity >= 0.8 for pair in found)


def test_the_confident_joint_is_that_of_the_paper() -> None:
    # Thresholds 0.7 and 0.65. Row 2, labelled 0, is over that of 1; row 5, labelled 1, is over none and keeps its own.
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.3, 0.7], [0.65, 0.35]], np.float32)
    joint, suggested = confident_joint(probability, np.array([0, 0, 0, 1, 1, 1]))
    assert suggested.tolist() == [0, 0, 1, 1, 1, 1]
    assert joint == pytest.approx(np.array([[2 / 6, 1 / 6], [0, 3 / 6]]))


@pytest.mark.slow
def test_flipped_labels_are_suspected() -> None:
    rows = make_rows(400)
    flipped = {10, 111, 222, 333}
    other = {"negative": "positive", "positive": "negative"}
    wrong = [(text, other[label] if i in flipped else label) for i, (text, label) in enumerate(rows)]
    dataset = from_rows("d", {"train": wrong, "test": rows[:20]})
    found = find_suspects(dataset, np.arange(400))
    assert flipped <= {suspect.row for suspect in found.suspects[:8]}
    assert all(suspect.label != suspect.suggested for suspect in found.suspects)
    assert found.joint.sum() == pytest.approx(1)


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(tmp_path: Path) -> None:
    hostile = [("<script>alert(1)</script> $x^2$", "<img src=x> $\\frac$"), ("fine words", "fine")] * 10
    write_page(inspect(from_rows("<b>", {"train": hostile, "test": hostile}), quick=True), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<svg ") == 2
    assert "url(http" not in page
    assert 'src="' not in page


def test_the_page_counts_one_row_as_one_and_its_letters_are_letters(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(40))
    with path.open("a") as file:
        file.write("broken\n")
    write_page(inspect(read_files("d", path), quick=True), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 row cannot be used:" in page
    assert ">bad row, not used<" in page
    assert page.count("<text") > 10


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)


def test_people_see_tables_and_programs_json(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [*make_rows(60), ("[bold]\x1b[31m escape", "negative")]
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join([*lines, "broken"]))
    shown = invoke(path, "--quick", "--html", tmp_path / "page.html")
    assert shown.exit_code == 0
    assert "d.jsonl line 62: not JSON" in shown.stdout
    assert (tmp_path / "page.html").is_file()
    found = json.loads(invoke(path, "--quick", "--json").stdout)
    assert found["bad_rows"] == 1
    assert sum(split["rows"] for split in found["splits"].values()) == 61


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MILLPOND_DATA"), reason="MILLPOND_DATA does not say where IMDB lies")
def test_imdb_has_the_repeats_and_leaks_that_are_known_of_it() -> None:
    found = inspect(corpora.load("imdb", load(LearnSettings), may_fetch=False), quick=True)
    assert (found.splits["train"].repeated, found.splits["test"].repeated) == (96, 199)
    assert found.leaks[0].texts == 123
    assert found.splits["train"].labels == {"negative": 12_500, "positive": 12_500}
    assert found.languages is not None
    assert found.languages["en"] > 1900
