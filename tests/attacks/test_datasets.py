"""Data that means harm or is merely odd: a clear error or the right result, in bounded memory and time."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millpond import MillpondError
from millpond.learn import corpora
from millpond.learn.datasets import DataError, Dataset, from_rows
from millpond.learn.export import read_model
from millpond.learn.fit import Stopwatch, answer, fit
from millpond.learn.gather import read_files
from millpond.learn.options import TrainOptions
from millpond.learn.prepared import PreparedSets
from millpond.learn.recipes import DataTable, ModelTable, Recipe, hold_back, read_recipe
from millpond.learn.run import run
from millpond.settings import LearnSettings

CPU = torch.device("cpu")
OPTIONS = {
    "ngram": {"buckets": 1024, "min_count": 1},
    "seqcnn": {"embedding": 8, "filters": 8, "min_count": 1},
    "lstm": {"embedding": 8, "width": 8, "hidden": 8, "min_count": 1, "max_words": 64},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_on(dataset: Dataset, architecture: str, epochs: int = 2) -> np.ndarray:
    recipe = Recipe(
        data=DataTable(corpus="odd"),
        model=ModelTable(architecture=architecture, options=OPTIONS[architecture]),
        training=TrainOptions(epochs=epochs, learning_rate=0.05),
    )
    trained = fit(recipe, dataset, dataset.train, CPU, lambda at: None, Stopwatch())
    return answer(trained.model, trained.encoder, dataset.test.texts, CPU)


ODD = [
    "a",
    "?",
    "🙂",
    "\u202eright to left",
    "a\x00b",
    "\x07\x1b[31m",
    "\ud800",
    "é" * 1000,
    "word " * 2000,
    "x" * 100_000,
    "a long text " * 90_000,
]


@pytest.mark.parametrize("architecture", OPTIONS)
def test_odd_texts_train_and_are_answered(architecture: str) -> None:
    rows = [(text, "ab"[i % 2]) for i, text in enumerate(ODD * 2)]
    answers = train_on(from_rows("odd", {"train": rows, "test": rows}), architecture)
    assert np.isfinite(answers).all()
    assert answers.sum(1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture", ["ngram", "seqcnn"])
def test_two_rows_are_enough_to_train_on(architecture: str) -> None:
    rows = [("good", "pos"), ("bad", "neg")]
    answers = train_on(from_rows("odd", {"train": rows, "test": rows}), architecture, epochs=60)
    assert answers.argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_odd_texts_come_out_of_every_format_as_they_went_in(tmp_path: Path, ending: str) -> None:
    texts = [text for text in ODD if text != "\ud800"]  # which no UTF-8 file can hold
    rows = [(text, "ab"[i % 2]) for i, text in enumerate(texts)]
    path = tmp_path / f"d{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": [label for _, label in rows]}), path)
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",")
            writer.writerows([("text", "label"), *rows])
    dataset = read_files("d", path)
    assert sorted([*dataset.train.texts, *dataset.test.texts]) == sorted(texts)
    assert dataset.bad_rows.count == 0


def test_a_label_is_the_same_as_a_number_and_as_text(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    labels = [0, "0", 0.0, " 0 ", 1, "1", 1.0, 1.5]
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": label}) + "\n" for i, label in enumerate(labels * 4)))
    assert read_files("d", path).labels == ["0", "1", "1.5"]


def test_two_rows_without_test_rows_are_refused_as_none_can_be_set_aside(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(DataError, match="none can be set aside"):
        read_files("d", tmp_path / "d.csv")


def test_odd_texts_go_through_a_whole_run_and_into_its_report(tmp_path: Path) -> None:
    """The test rows have the labels of training the wrong way round, so that the odd texts are the mistakes shown."""
    odd = [text for text in ODD if text != "\ud800" and len(text) <= 100_000]
    for name, labels in (("train", "ab"), ("test", "ba")):
        rows = [(text, labels[i % 2]) for i, text in enumerate(odd)]
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = {"file": str(tmp_path / "train.jsonl"), "test_file": str(tmp_path / "test.jsonl")}
    training = {"epochs": 30, "learning_rate": 0.05}
    recipe = read_recipe(None, {"data": data, "model": {"options": OPTIONS["ngram"]}, "training": training})
    where = tmp_path / "run"
    run(recipe, LearnSettings(home=tmp_path), device="cpu", name="odd", out=where, report=lambda at: None)
    mistakes = [json.loads(line)["text"] for line in (where / "mistakes.jsonl").read_bytes().splitlines()]
    assert {"🙂", "a\x00b", "\u202eright to left"} <= set(mistakes)
    assert max(map(len, mistakes)) == 500
    assert "🙂" in (where / "report.html").read_text(encoding="utf-8")
    read_model(where / "model")


@pytest.mark.slow
def test_a_thousand_classes_train() -> None:
    rows = [(f"word{i} and filler", f"class {i}") for i in range(1000)] * 2
    dataset = from_rows("odd", {"train": rows, "test": rows})
    answers = train_on(dataset, "ngram", epochs=10)
    assert answers.shape == (2000, 1000)
    assert (answers.argmax(1) == dataset.test.labels).mean() > 0.9


def test_one_class_with_three_rows_is_learned_beside_a_large_one() -> None:
    rows = [(f"plain text {i}", "many") for i in range(300)] + [(f"strange zebra {i}", "few") for i in range(3)]
    dataset = from_rows("odd", {"train": rows, "test": rows})
    answers = train_on(dataset, "ngram", epochs=10)
    assert (answers.argmax(1) == dataset.test.labels).all()


def test_one_class_with_three_rows_is_kept_to_train_on_when_test_and_validation_rows_are_set_aside(
    tmp_path: Path,
) -> None:
    rows = [(f"plain text {i}", "many") for i in range(100)] + [(f"strange zebra {i}", "few") for i in range(3)]
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    for seed in range(10):
        dataset = read_files("d", path, seed=seed)
        assert dataset.labels == ["few", "many"]
        learned, held = hold_back(
            Recipe(data=DataTable(file="d.csv"), seed=seed, validation=0.5), dataset, dataset.train
        )
        assert held is not None
        assert set(learned.labels.tolist()) == {0, 1}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=300), ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]))
def test_any_bytes_are_read_or_refused_with_a_message(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"d{ending}"
    path.write_bytes((b"text,label\n" if ending == ".csv" else b"") + content)
    with contextlib.suppress(DataError):
        read_files("d", path)


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text,label\n"never closed,pos\n' + "good,pos\nbad,neg\n" * 500_000)
    with pytest.raises(DataError, match="not readable as CSV"):
        read_files("d", path)


def test_a_field_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "a" * (5 * 1024 * 1024) + ",pos\nb,neg\n")
    with pytest.raises(DataError, match="field larger than field limit"):
        read_files("d", path)


def test_deeply_nested_json_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = "".join(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(4))
    path.write_text(good + '{"text": ' + "[" * 100_000 + "\n")
    assert read_files("d", path).bad_rows.first[0][0] == "d.jsonl line 5"


def test_a_line_longer_than_any_text_is_a_bad_row_and_not_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.learn.sources.MAX_LINE_BYTES", 100)
    path = tmp_path / "d.jsonl"
    short = [json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(4)]
    path.write_text("\n".join([*short, json.dumps({"text": "x" * 1000, "label": 1}), *short]) + "\n")
    dataset = read_files("d", path)
    assert dataset.bad_rows.first == [("d.jsonl line 5", "longer than 100 bytes")]
    assert len(dataset.train) + len(dataset.test) == 8


def test_labels_of_wrong_kinds_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    labels = [0, 1, 0, 1, 0, 1, 0, [], {}, None, "", "x" * 201]
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    dataset = read_files("d", path)
    assert dataset.bad_rows.count == 5
    assert dataset.labels == ["0", "1"]


def test_numbers_as_text_are_bad_rows_not_texts(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 3], "label": [0, 1, 0]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="not a string"):
        read_files("d", tmp_path / "d.parquet")


def test_a_text_of_parquet_that_is_not_utf_8_is_a_bad_row_and_the_others_are_read(tmp_path: Path) -> None:
    """Arrow does not look into the strings that it reads."""
    raw = [b"good", b"bad", b"caf\xe9", b"fine", b"poor"]
    texts = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": [0, 1, 0, 0, 1]}), tmp_path / "d.parquet")
    dataset = read_files("d", tmp_path / "d.parquet")
    assert dataset.bad_rows.first == [("d.parquet row 3", "not UTF-8: byte 0xe9 at 4")]
    assert sorted([*dataset.train.texts, *dataset.test.texts]) == ["bad", "fine", "good", "poor"]


def test_a_parquet_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"] * 100, "label": ["x", "y"] * 100}), path)
    whole = path.read_bytes()
    for cut in (4, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            read_files("d", path)


def test_a_directory_where_a_file_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DataError, match="is not a file"):
        read_files("d", tmp_path / "d.csv")


def test_a_link_out_of_a_directory_per_class_is_read_as_the_file_it_names(tmp_path: Path) -> None:
    for label in ("pos", "neg"):
        (tmp_path / "d" / label).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "d" / label / f"{number}.txt").write_text(f"{label} {number}")
    (tmp_path / "d" / "pos" / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "d" / "up").symlink_to("..")
    with contextlib.suppress(DataError):
        assert read_files("d", tmp_path / "d").labels == ["neg", "pos"]


def test_a_text_file_without_end_is_not_read_whole(tmp_path: Path) -> None:
    for label in ("pos", "neg"):
        (tmp_path / "d" / label).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "d" / label / f"{number}.txt").write_text(f"{label} {number}")
    with (tmp_path / "d" / "pos" / "large.txt").open("wb") as file:
        file.truncate(10 * 2**30)  # ten GiB of nothing
    dataset = read_files("d", tmp_path / "d")
    assert [where for where, _ in dataset.bad_rows.first] == ["pos/large.txt"]


def test_terminal_escapes_in_a_bad_row_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label,part\na,x,train\nb,y,train\nc,x,test\nd,y,\x1b[2J\x1b]0;owned\x07\n")
    shown = str(read_files("d", path, split="part").bad_rows)
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_a_wheel_whose_csv_unpacks_to_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "WHEEL_MAX_BYTES", 1_000_000)
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(corpora.WHEEL_MEMBER, b"0" * 50_000_000)
    assert wheel.stat().st_size < 100_000
    with pytest.raises(DataError, match="larger than"):
        corpora._wheel_rows(wheel)


def test_a_wheel_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(io.BytesIO(b"not a zip").getvalue())
    with pytest.raises(DataError, match="has no"):
        corpora._wheel_rows(tmp_path / "w.whl")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.text(max_size=200))
def test_any_text_is_a_recipe_or_refused_with_a_message(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(content, encoding="utf-8", errors="replace")
    with pytest.raises(MillpondError):
        read_recipe(path)


@pytest.mark.parametrize("name", ["\x1b[2J.csv", "line\nbreak.csv", "turned\u202e.csv", "not utf-8 \udcff.csv"])
def test_a_name_of_a_file_is_kept_in_characters_that_are_seen(tmp_path: Path, name: str) -> None:
    for number, path in enumerate((tmp_path / name, tmp_path / f"{'x' * 150}.csv")):
        path.write_text("text,label\n" + "".join(f"{number} {i},{i % 2}\n" for i in range(20)))
    sets = PreparedSets(tmp_path / "prepared", 10**9)
    names = read_files("d", tmp_path / "*.csv", sets=sets).train.source_names
    assert all(name.isprintable() and len(name) <= 100 for name in names)
    assert len(names) == 2
    alone = read_files("d", tmp_path / name, sets=sets)
    assert alone.source.isprintable()
    assert all(name.isprintable() for name in alone.train.source_names)


def test_a_run_writes_into_no_directory_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    recipe = read_recipe(None, {"data": {"file": str(tmp_path / "r.csv")}})
    with pytest.raises(DataError, match=r"the name of .*out\ufffd is not UTF-8"):
        run(recipe, LearnSettings(home=tmp_path), device="cpu", name="r", out=tmp_path / "out\udcff", report=print)


def test_a_pattern_longer_than_any_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"cannot be read: OSError: .*File name too long"):
        read_files("d", "*" * 5000)
