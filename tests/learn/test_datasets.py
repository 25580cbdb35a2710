"""Reading labelled texts: every row is used or counted, and the same rows have the same digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from millpond.learn.datasets import BadRows, DataError, Dataset, Gathered, Split, from_rows, shuffled, split_texts
from millpond.learn.gather import read_files

ROWS = [
    ("good", "pos"),
    ("bad, really", "neg"),
    ('he said "no"\nand left', "neg"),
    ("fine", "pos"),
    ("naïve 🙂", "pos"),
]


def as_csv(rows: list[tuple[str, str]], separator: str = ",") -> str:
    quoted = ['"{}"{}{}'.format(text.replace('"', '""'), separator, label) for text, label in rows]
    return "\n".join([f"text{separator}label", *quoted]) + "\n"


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    import json

    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        path.write_text(as_csv(rows, "\t" if path.suffix == ".tsv" else ","), encoding="utf-8")
    return path


def everything(dataset: Dataset) -> set[tuple[str, str]]:
    return {
        (text, dataset.labels[label])
        for split in (dataset.train, dataset.test)
        for text, label in zip(split.texts, split.labels, strict=True)
    }


def test_every_format_gives_the_same_rows_and_digest(tmp_path: Path) -> None:
    endings = (".csv", ".tsv", ".jsonl", ".parquet")
    datasets = [read_files("d", write(tmp_path / f"d{ending}", ROWS)) for ending in endings]
    assert all(everything(dataset) == set(ROWS) for dataset in datasets)
    assert len({dataset.digest for dataset in datasets}) == 1
    assert not any(dataset.bad_rows.count for dataset in datasets)


def test_another_row_order_or_label_is_another_digest(tmp_path: Path) -> None:
    digests = {
        from_rows("d", {"train": rows, "test": ROWS}).digest
        for rows in (ROWS, ROWS[::-1], [*ROWS[:-1], ("naïve 🙂", "neg")])
    }
    assert len(digests) == 3


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    for ending in (".csv", ".jsonl"):
        path = write(tmp_path / f"d{ending}", ROWS)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert everything(read_files("d", path)) == set(ROWS)


def test_bad_rows_are_counted_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text,label\n"two\nlines",pos\n,neg\nx,y,z\nbad,\ngood,pos\nawful,neg\nmeh,neg\nfine,pos\n')
    dataset = read_files("d", path)
    assert [where for where, _ in dataset.bad_rows.first] == ["d.csv line 4", "d.csv line 5", "d.csv line 6"]
    assert "the text is empty" in str(dataset.bad_rows)
    assert "the label is empty" in str(dataset.bad_rows)
    assert "3 fields where the header has 2" in str(dataset.bad_rows)
    assert len(everything(dataset)) == 5


def test_bad_json_lines_are_counted_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = [f'{{"text": "text {i}", "label": {i % 2}}}' for i in range(9)]
    bad = ["{not json}", "[1, 2]", '{"text": "no label"}', '{"text": 7, "label": 1}', '{"text": "t", "label": {}}']
    path.write_text("\n".join([*good, *bad]))
    dataset = read_files("d", path)
    assert [where for where, _ in dataset.bad_rows.first] == [f"d.jsonl line {i}" for i in range(10, 15)]
    assert dataset.labels == ["0", "1"]


def test_only_the_first_bad_rows_are_kept_but_all_are_counted(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(100)] + [("", "a")] * 60
    dataset = read_files("d", write(tmp_path / "d.csv", rows))
    assert dataset.bad_rows.count == 60
    assert len(dataset.bad_rows.first) == 20
    assert "and 40 more" in str(dataset.bad_rows)


def test_a_split_column_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    rows = ["a,x,train", "b,y,Training", "c,x,dev", "d,y,test", "e,x,other"]
    path.write_text("\n".join(["body,class,part", *rows]))
    dataset = read_files("d", path, text="body", label="class", split="part")
    assert dataset.train.texts == ["a", "b"]
    assert dataset.validation is not None
    assert dataset.validation.texts == ["c"]
    assert dataset.test.texts == ["d"]
    assert dataset.bad_rows.first[0][0] == "d.csv line 6"


def test_a_label_that_only_the_test_rows_have_is_a_bad_row() -> None:
    dataset = from_rows("d", {"train": ROWS, "test": [("x", "pos"), ("y", "unheard")]})
    assert len(dataset.test) == 1
    assert "does not occur in the training rows" in str(dataset.bad_rows)


def test_numbers_as_labels_are_sorted_as_numbers_and_floats_are_integers() -> None:
    rows = [(f"text {i}", str(i % 11)) for i in range(30)]
    assert from_rows("d", {"train": rows}).labels == [str(i) for i in range(11)]


def test_a_float_label_of_parquet_is_its_integer(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b", "c", "d"], "label": [0.0, 1.0, 1.0, None]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    dataset = read_files("d", tmp_path / "d.parquet")
    assert dataset.labels == ["0", "1"]
    assert dataset.bad_rows.first == [("d.parquet row 4", "the label is empty")]


def test_repeated_texts_stay_on_one_side_of_a_split() -> None:
    texts = [f"text {i % 40}" for i in range(200)]
    split = Split(texts, np.arange(200) % 2)
    for seed in range(20):
        kept, chosen = split_texts(split, 0.2, seed)
        assert not {texts[i] for i in kept} & {texts[i] for i in chosen}
        assert sorted([*kept, *chosen]) == list(range(200))
        assert 30 <= len(chosen) <= 40


def test_a_split_leaves_every_label_something_to_train_on() -> None:
    split = Split([f"text {i}" for i in range(50)], np.array([0] * 49 + [1]))
    for seed in range(30):
        kept, _ = split_texts(split, 0.5, seed)
        assert set(split.labels[kept]) == {0, 1}


def test_the_order_follows_the_seed() -> None:
    split = Split([f"text {i}" for i in range(50)], np.zeros(50, np.int64))
    assert shuffled(split, 1).tolist() == shuffled(split, 1).tolist() != shuffled(split, 2).tolist()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.csv", b"", "is empty"),
        ("d.csv", b"text,label\n", "has no rows"),
        ("d.csv", b"text,label\na,x\nb,x\n", "at least two classes"),
        ("d.csv", b"body,label\na,x\nb,y\n", "no column 'text'.*'body', 'label'.*--text"),
        ("d.jsonl", b'{"t": "a", "label": 1}\n', "no column 'text'.*'label', 't'"),
        ("d.csv", b"text,label\na,x\ncaf\xe9,y\n", "line 3 is not UTF-8: byte 0xe9 at column 4.*iconv"),
        ("d.jsonl", b'{"text": "caf\xe9", "label": 1}\n', "line 1 is not UTF-8"),
        ("d.csv", b"text,label\na\nb\nc,x\nd,y\ne\n", "3 rows are bad and 2 are good"),
        ("d.parquet", b"PAR1 nothing", "cannot be read as Parquet"),
        ("d.txt", b"a", "'.txt'; data comes as"),
    ],
)
def test_a_file_that_cannot_train_is_refused_clearly(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){says}"):
        read_files("d", tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_files("d", tmp_path / "d.csv")


def test_a_split_column_without_test_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label,part\na,x,train\nb,y,train\n")
    with pytest.raises(DataError, match="says 'test'"):
        read_files("d", tmp_path / "d.csv", split="part")


def test_too_many_labels_are_refused() -> None:
    with pytest.raises(DataError, match="Is the label column the right one"):
        from_rows("d", {"train": [(f"text {i}", f"label {i}") for i in range(1001)]})


LEAKY = {
    "train": [(f"text {i}", "ab"[i % 2]) for i in range(20)],
    "validation": [("text 100", "a"), ("text 101", "b")],
    "test": [("text 3", "b"), ("text 4", "b"), ("text 101", "b"), ("text 200", "a")],
}


def test_dropping_leaks_takes_them_out_of_training_and_leaves_the_test_whole() -> None:
    dataset = from_rows("d", LEAKY)
    clean = dataset.without_leaks()
    assert clean.test.texts == dataset.test.texts
    assert clean.train.texts == [text for text, _ in LEAKY["train"] if text not in ("text 3", "text 4")]
    assert clean.validation is not None
    assert clean.validation.texts == ["text 100"]
    assert clean.dropped_leaks == 3
    assert "3 rows whose text is in the test split were dropped" in clean.source
    assert clean.digest != dataset.digest
    assert clean.without_leaks().digest == clean.digest


def test_dropping_leaks_that_are_all_of_a_class_is_refused() -> None:
    with pytest.raises(DataError, match="fewer than two classes are left"):
        from_rows("d", {"train": [("x", "a"), ("y", "b")], "test": [("y", "b")]}).without_leaks()


def test_the_digest_is_the_same_on_every_machine_and_in_every_version() -> None:
    digest = from_rows("d", {"train": ROWS, "test": [("naïve 🙂 \ud800", "pos")]}).digest
    assert digest == "sha256:0c6d7f70374a20dfac5deb53b5a9f89dcbff5c7d2872f8cc703a5f638909c28e"


def in_sources(split: Split) -> dict[str, list[str]]:
    """Return the texts of each source."""
    found: dict[str, list[str]] = {}
    for text, source in zip(split.texts, split.sources.tolist(), strict=True):
        found.setdefault(split.source_names[source], []).append(text)
    return found


def test_rows_know_their_source_wherever_they_are_taken(tmp_path: Path) -> None:
    for name, share in (("a", ROWS[:2]), ("b", ROWS[2:])):
        write(tmp_path / f"{name}.csv", share)
    train = read_files("d", tmp_path / "?.csv", write(tmp_path / "test.csv", ROWS)).train
    assert in_sources(train) == {
        "b.csv": ['he said "no"\nand left', "fine", "naïve 🙂"],
        "a.csv": ["good", "bad, really"],
    }
    assert in_sources(train.take(np.array([4, 0]))) == {"b.csv": ["naïve 🙂"], "a.csv": ["good"]}
    more = Split(["new", "newer"], np.array([0, 1]), np.array([1, 0], np.int16), ("corrections", "a.csv"))
    joined = train.take(np.array([0, 4])).with_rows(more)
    assert in_sources(joined) == {"a.csv": ["good", "new"], "b.csv": ["naïve 🙂"], "corrections": ["newer"]}
    assert joined.source_names == ("b.csv", "a.csv", "corrections")


def test_rows_in_one_file_or_in_several_have_one_digest(tmp_path: Path) -> None:
    for name, share in (("part-1", ROWS[:2]), ("part-2", ROWS[2:])):
        write(tmp_path / f"{name}.jsonl", share)
    parts, whole = read_files("d", tmp_path / "part-*.jsonl"), read_files("d", write(tmp_path / "whole.csv", ROWS))
    assert parts.digest == whole.digest
    assert (len(parts.train.source_names), len(whole.train.source_names)) == (2, 1)


def test_of_many_sources_the_largest_keep_their_names_and_the_others_are_one() -> None:
    content = bytearray()
    gathered = Gathered("d", content.extend, BadRows())
    for number in range(300):
        for row in range(2 + (number == 200) + 2 * (number == 7)):
            gathered.add((f"text {number} {row}", str(row % 2), "train", f"file {number}"))
    gathered.add(("text", "1", "test", "of few"))
    dataset = gathered.dataset(lambda: np.frombuffer(bytes(content), np.uint8), source="", seed=0)
    train, sizes = dataset.train, np.bincount(dataset.train.sources).tolist()
    assert train.source_names[:4] == ("file 7", "file 200", "file 0", "file 1")
    assert train.source_names[50:] == ("250 other sources",)
    assert sizes == [4, 3, *[2] * 48, 500]
    assert dataset.test.source_names == ("of few",)  # each split has its own largest
    assert (train.sources.itemsize, len(dataset.of_source("one").train.texts)) == (2, len(train))
    assert dataset.of_source("one").train.source_names == ("one",)
    assert dataset.of_source("one").digest == dataset.digest
