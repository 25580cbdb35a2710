"""Prepared sets: the same dataset as in memory, read once, whole or not there, within their bound."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from millpond.learn.datasets import DataError, Dataset, Split
from millpond.learn.encoded import Encoded
from millpond.learn.gather import read_files
from millpond.learn.prepared import ABANDONED_S, PreparedSets
from millpond.text import TextConfig, TextEncoder

from .conftest import make_rows, write_jsonl


@pytest.fixture
def sets(tmp_path: Path) -> PreparedSets:
    return PreparedSets(tmp_path / "prepared", 10**9)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [*make_rows(200), ("naïve 🙂 \x00", "positive")]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with path.open("a") as file:
        file.write("broken\n")
    return path


def same(one: Dataset, two: Dataset) -> bool:
    return (one.labels, one.digest, one.source, str(one.bad_rows)) == (
        two.labels,
        two.digest,
        two.source,
        str(two.bad_rows),
    ) and all(
        one.splits[name].texts == two.splits[name].texts
        and (one.splits[name].labels == two.splits[name].labels).all()
        and sources(one.splits[name]) == sources(two.splits[name])
        for name in ("train", "test")
    )


def sources(split: Split) -> list[str]:
    return [split.source_names[source] for source in split.sources.tolist()]


def listed(sets: PreparedSets) -> list[str]:
    return sorted(path.name for path in sets.directory.iterdir())


def test_a_set_on_disk_is_the_one_in_memory_under_its_digest(source: Path, sets: PreparedSets) -> None:
    memory, disk = read_files("d", source), read_files("d", source, sets=sets)
    assert same(memory, disk)
    assert listed(sets) == [disk.digest.removeprefix("sha256:")]
    assert disk.train.texts.place == sets.directory
    assert memory.train.texts.place is None


def test_unchanged_files_are_read_once_and_changed_ones_again(
    source: Path, sets: PreparedSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_files("d", source, sets=sets)
    with monkeypatch.context() as patched:
        patched.setattr("millpond.learn.gather.rows_of", lambda *a: pytest.fail("the file was read again"))
        assert same(first, read_files("d", source, sets=sets))
    with source.open("a") as file:
        file.write('{"text": "one more", "label": "positive"}\n')
    assert read_files("d", source, sets=sets).digest != first.digest
    assert len(listed(sets)) == 2


def test_other_columns_or_another_seed_are_not_taken_for_the_same_set(tmp_path: Path, sets: PreparedSets) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label,other\n" + "".join(f"text {i},{i % 2},{i % 3}\n" for i in range(40)))
    digests = {
        read_files("d", path, sets=sets, label=label, seed=seed).digest
        for label in ("label", "other")
        for seed in (0, 1)
    }
    assert len(digests) == 4


def test_the_same_rows_from_another_file_are_the_same_set(source: Path, sets: PreparedSets, tmp_path: Path) -> None:
    first = read_files("d", source, sets=sets)
    copy = Path(shutil.copy(source, tmp_path / "copy.jsonl"))
    second = read_files("d", copy, sets=sets)
    assert second.digest == first.digest
    assert "copy.jsonl" in second.source
    assert len(listed(sets)) == 1


def test_rows_that_come_from_other_files_later_are_one_set_that_names_the_newer(
    sets: PreparedSets, tmp_path: Path
) -> None:
    rows = make_rows(200)
    whole = read_files("d", write_jsonl(tmp_path / "whole.jsonl", rows), sets=sets)
    for number in range(2):
        write_jsonl(tmp_path / f"part-{number}.jsonl", rows[100 * number : 100 * (number + 1)])
    for _ in range(2):  # once read, once found
        parts = read_files("d", tmp_path / "part-*.jsonl", sets=sets)
        assert same(parts, read_files("d", tmp_path / "part-*.jsonl"))
    assert set(sources(parts.train)) == {"part-0.jsonl", "part-1.jsonl"}
    assert set(sources(whole.train)) == {"whole.jsonl"}  # which is mapped
    assert listed(sets) == [whole.digest.removeprefix("sha256:")]


def test_a_set_of_an_older_format_is_made_again(source: Path, sets: PreparedSets) -> None:
    first = read_files("d", source, sets=sets)
    place = sets.directory / first.digest.removeprefix("sha256:")
    description = json.loads((place / "set.json").read_text())
    (place / "set.json").write_text(json.dumps({**description, "format": 1}))
    for path in place.glob("*-sources-*.npy"):
        path.unlink()
    assert same(first, read_files("d", source, sets=sets))


def test_a_source_that_is_refused_leaves_nothing(tmp_path: Path, sets: PreparedSets) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,x\nb,x\n")
    with pytest.raises(DataError, match="at least two classes"):
        read_files("d", tmp_path / "d.csv", sets=sets)
    assert listed(sets) == []


def test_sets_used_longest_ago_go_and_what_is_mapped_stays_readable(tmp_path: Path, sets: PreparedSets) -> None:
    files = [write_jsonl(tmp_path / f"d{i}.jsonl", make_rows(300, seed=i)) for i in range(3)]
    oldest = read_files("d", files[0], sets=sets)
    size = sum(path.stat().st_size for path in (sets.directory / oldest.digest.removeprefix("sha256:")).iterdir())
    read_files("d", files[1], sets=sets)
    for age, directory in enumerate(
        sorted(sets.directory.iterdir(), key=lambda d: (d / "set.json").stat().st_mtime_ns)
    ):
        os.utime(directory / "set.json", (time.time() - 100 + age, time.time() - 100 + age))
    bounded = PreparedSets(sets.directory, int(size * 2.5))
    newest = read_files("d", files[2], sets=bounded)
    names = listed(sets)
    assert len(names) == 2
    assert oldest.digest.removeprefix("sha256:") not in names
    assert newest.digest.removeprefix("sha256:") in names
    assert oldest.train.texts == read_files("d", files[0]).train.texts


def test_a_set_larger_than_the_bound_serves_its_reader_and_goes(source: Path, sets: PreparedSets) -> None:
    dataset = read_files("d", source, sets=PreparedSets(sets.directory, 1))
    assert listed(sets) == []
    assert same(dataset, read_files("d", source))


def test_what_a_killed_program_left_is_swept_and_what_is_being_written_is_not(source: Path, sets: PreparedSets) -> None:
    for name, age in ((".new-old", ABANDONED_S + 60), (".new-young", 0)):
        (sets.directory / name).mkdir(parents=True)
        os.utime(sets.directory / name, (time.time() - age, time.time() - age))
    read_files("d", source, sets=sets)
    assert ".new-old" not in listed(sets)
    assert ".new-young" in listed(sets)


def test_a_damaged_description_is_not_found_and_is_made_again(source: Path, sets: PreparedSets) -> None:
    digest = read_files("d", source, sets=sets).digest
    description = sets.directory / digest.removeprefix("sha256:") / "set.json"
    description.write_text("{}")
    assert read_files("d", source, sets=sets).digest == digest
    assert json.loads(description.read_text())["digest"] == digest


def test_a_directory_that_cannot_be_written_is_a_clear_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be prepared in .*MILLPOND_HOME"):
        read_files("d", source, sets=PreparedSets(tmp_path / "file" / "prepared", 10**9))


def test_ids_of_a_set_on_disk_are_mapped_and_those_of_memory(source: Path, sets: PreparedSets) -> None:
    memory, disk = read_files("d", source).train, read_files("d", source, sets=sets).train
    encoder = TextEncoder.learn(memory.texts, TextConfig(features="ngrams"), min_count=1, max_vocabulary=1000)
    one, two = Encoded.of(encoder, memory.texts), Encoded.of(encoder, disk.texts)
    assert (one.ids == two.ids).all()
    assert (one.starts == two.starts).all()
    assert isinstance(two.ids.base, np.memmap)
    assert not isinstance(one.ids.base, np.memmap)
    assert listed(sets) == [read_files("d", source).digest.removeprefix("sha256:")]


def test_parts_of_encoded_texts_are_all_of_them(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.learn.encoded.PART_IDS", 64)
    texts = read_files("d", source).train.texts
    encoder = TextEncoder.learn(texts, TextConfig(), min_count=1, max_vocabulary=1000)
    data = Encoded.of(encoder, texts)
    parts = list(data.parts())
    assert len(parts) > 10
    assert (np.concatenate([part.ids for _, part in parts]) == data.ids).all()
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(len(data)))
    assert all(len(part) == rows.stop - rows.start for rows, part in parts)
