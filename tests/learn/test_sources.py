"""Where texts come from: the same rows from a file, a directory, a URL and a database are the same dataset."""

from __future__ import annotations

import http.server
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import sqlalchemy as sa

from millpond.learn.datasets import DataError, Dataset
from millpond.learn.gather import read_files, read_query
from millpond.learn.prepared import PreparedSets
from millpond.learn.recipes import load_data, read_recipe, shown_recipe
from millpond.learn.sources import scrubbed, shown, sources_of
from millpond.settings import LearnSettings
from postgresql_site import HOW_TO_INSTALL, IS_INSTALLED, postgresql

from .conftest import make_rows, write_jsonl

ROWS = make_rows(60, ("negative", "plot", "positive"))
SECRET = "s3cret/p@ss"


def everything(dataset: Dataset) -> set[tuple[str, str]]:
    return {
        (text, dataset.labels[label])
        for split in dataset.splits.values()
        for text, label in zip(split.texts, split.labels.tolist(), strict=True)
    }


# --- a directory per class ---------------------------------------------------------------------------------------


def make_directory(root: Path, rows: list[tuple[str, str]]) -> Path:
    for number, (text, label) in enumerate(rows):
        path = root / label / f"{number:04}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_directory_per_class_is_read_with_any_number_of_classes(tmp_path: Path) -> None:
    dataset = read_files("d", make_directory(tmp_path / "texts", ROWS))
    assert dataset.labels == ["negative", "plot", "positive"]
    assert everything(dataset) == set(ROWS)


def test_directories_of_splits_are_followed(tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("dev", 1), ("test", 2)):
        make_directory(tmp_path / "texts" / split, make_rows(20, seed=seed))
    dataset = read_files("d", tmp_path / "texts")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 20, "validation": 20, "test": 20}
    assert set(dataset.test.texts) == {text for text, _ in make_rows(20, seed=2)}


def test_a_second_directory_is_the_test_split(tmp_path: Path) -> None:
    train, test = make_directory(tmp_path / "a", ROWS), make_directory(tmp_path / "b", ROWS[:9])
    assert len(read_files("d", train, test).test) == 9


def test_the_disk_s_order_of_files_does_not_matter(tmp_path: Path) -> None:
    one = make_directory(tmp_path / "one", ROWS)
    two = tmp_path / "two"
    for path in sorted(one.rglob("*.txt"), reverse=True):
        (two / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, two / path.parent.name)
    assert read_files("d", one).digest == read_files("d", two).digest
    next(two.rglob("*.txt")).write_text("another text")
    assert read_files("d", one).digest != read_files("d", two).digest


def test_files_that_are_no_texts_are_bad_rows_and_hidden_ones_nothing(tmp_path: Path) -> None:
    root = make_directory(tmp_path / "texts", ROWS)
    (root / "README.md").write_text("about")
    (root / "plot" / "notes.pdf").write_bytes(b"%PDF")
    (root / "plot" / "latin.txt").write_bytes(b"caf\xe9")
    (root / "plot" / "empty.txt").write_bytes(b"")
    (root / ".DS_Store").write_bytes(b"\0")
    (root / "plot" / "deeper").mkdir()
    (root / "plot" / "deeper" / "0.txt").write_text("too deep")
    dataset = read_files("d", root)
    assert everything(dataset) == set(ROWS)
    assert dict(dataset.bad_rows.first) == {
        "README.md": "not where a text belongs, which is CLASS/NAME.txt",
        "plot/notes.pdf": "not a .txt file",
        "plot/latin.txt": "not UTF-8: byte 0xe9 at 4",
        "plot/empty.txt": "the text is empty",
        "plot/deeper/0.txt": "not where a text belongs, which is CLASS/NAME.txt",
    }


def test_a_directory_has_no_split_column_and_must_have_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has no columns"):
        read_files("d", make_directory(tmp_path / "texts", ROWS), split="part")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="has no rows"):
        read_files("d", tmp_path / "nothing")


def test_a_changed_file_in_a_directory_is_read_again(tmp_path: Path) -> None:
    root, sets = make_directory(tmp_path / "texts", ROWS), PreparedSets(tmp_path / "prepared", 10**9)
    first = read_files("d", root, sets=sets)
    assert read_files("d", root, sets=sets).digest == first.digest
    (root / "plot" / "new.txt").write_text("one more")
    assert read_files("d", root, sets=sets).digest != first.digest


# --- patterns ----------------------------------------------------------------------------------------------------


def test_files_of_a_pattern_are_sources_by_the_names_that_tell_them_apart(tmp_path: Path) -> None:
    for place in ("a/x1.csv", "a/x2.csv", "b/x1.csv", "b/.hidden.csv"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("text,label\n")
    assert [name for name, _ in sources_of(f"{tmp_path}/a/x?.csv")] == ["x1.csv", "x2.csv"]
    both = [
        ("a/x1.csv", f"{tmp_path}/a/x1.csv"),
        ("a/x2.csv", f"{tmp_path}/a/x2.csv"),
        ("b/x1.csv", f"{tmp_path}/b/x1.csv"),
    ]
    assert sources_of(f"{tmp_path}/*/*.csv") == sources_of(f"{tmp_path}/**/*.csv") == both
    assert sources_of(f"file://{tmp_path}/a/*1.csv") == [("x1.csv", f"file://{tmp_path}/a/x1.csv")]
    assert sources_of(f"{tmp_path}/a") == [("a", f"{tmp_path}/a")]


def test_a_pattern_is_relative_and_a_file_that_looks_like_one_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x[1].csv").write_text("text,label\n")
    (tmp_path / "x1.csv").write_text("text,label\n")
    assert sources_of("x[1].csv") == [("x[1].csv", "x[1].csv")]
    assert sources_of("*1.csv") == [("x1.csv", f"{tmp_path}/x1.csv")]
    with pytest.raises(DataError, match=r"y\*\.csv is the pattern of no file"):
        sources_of("y*.csv")


def test_sources_are_named_without_hosts_homes_or_passwords(tmp_path: Path) -> None:
    named = {url: sources_of(url)[0][0] for url in (f"ftp://me:{SECRET}@host/d/a.csv?t=1", "https://host/d/b.csv?c*d")}
    assert list(named.values()) == ["a.csv", "b.csv"]
    with pytest.raises(DataError) as raised:
        sources_of("ftp://me:s3cret@127.0.0.1:1/*.csv")
    assert "s3cret" not in str(raised.value)


def test_a_dataset_is_named_after_what_is_sure_in_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    for number in range(2):
        write_jsonl(tmp_path / f"reviews/train-{number}.jsonl", ROWS[30 * number : 30 * number + 30])
    settings = LearnSettings(home=tmp_path)
    for pattern, name in (("train-*.jsonl", "train"), ("*.jsonl", "reviews")):
        dataset = load_data(read_recipe(None, {"data": {"file": f"{tmp_path}/reviews/{pattern}"}}), settings)
        assert (dataset.name, everything(dataset)) == (name, set(ROWS))


# --- URLs --------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    root = tmp_path / "served"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_are_read_over_http(served: tuple[Path, str]) -> None:
    root, url = served
    path = write_jsonl(root / "d.jsonl", ROWS)
    with path.open("a") as file:
        file.write("broken\n")
    dataset = read_files("d", f"{url}/d.jsonl")
    assert dataset.digest == read_files("d", path).digest
    assert dataset.bad_rows.first[0][0] == "d.jsonl line 61"
    assert dataset.source.startswith(f"{url}/d.jsonl")


def test_a_missing_file_on_a_server_is_a_clear_error_without_its_token(served: tuple[Path, str]) -> None:
    url = served[1].replace("//", f"//me:{SECRET}@")
    with pytest.raises(DataError, match=r"none\.csv cannot be read") as caught:
        read_files("d", f"{url}/none.csv?token=t0ken")
    assert "t0ken" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_any_file_system_of_fsspec_holds_files_and_directories(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/d.jsonl", write_jsonl(tmp_path / "d.jsonl", ROWS).read_bytes())
    for number, (text, label) in enumerate(ROWS):
        memory.pipe(f"/bucket/texts/{label}/{number:04}.txt", text.encode())
    try:
        assert read_files("d", "memory://bucket/d.jsonl").digest == read_files("d", tmp_path / "d.jsonl").digest
        here = read_files("d", make_directory(tmp_path / "texts", ROWS))
        assert read_files("d", "memory://bucket/texts").digest == here.digest
        for number in range(2):
            write_jsonl(tmp_path / f"part-{number}.jsonl", ROWS[30 * number : 30 * number + 30])
            memory.put_file(str(tmp_path / f"part-{number}.jsonl"), f"/bucket/part-{number}.jsonl")
        parts = read_files("d", "memory://bucket/part-*.jsonl")
        assert parts.digest == read_files("d", tmp_path / "d.jsonl").digest
        assert set(parts.train.source_names) == {"part-0.jsonl", "part-1.jsonl"}
    finally:
        memory.rm("/bucket", recursive=True)
    assert read_files("d", f"file://{tmp_path}/d.jsonl").digest == read_files("d", tmp_path / "d.jsonl").digest
    assert read_files("d", f"file://{tmp_path}/texts").digest == here.digest


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nothing://here/d.csv", "Protocol not known: nothing.*--query"),
        ("memory://nowhere/d.csv", "cannot be read"),
        ("memory://nowhere/d.pdf", "'.pdf'; data comes as"),
    ],
)
def test_a_url_that_cannot_be_read_says_why(url: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_files("d", url)


def test_a_missing_plug_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(DataError, match="pip install s3fs"):
        read_files("d", "s3://bucket/d.csv")


# --- databases ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    with sqlite3.connect(tmp_path / "reviews.db") as connection:
        fill(connection, ROWS)
    connection.close()
    return f"sqlite:///{tmp_path / 'reviews.db'}"


def fill(connection: Any, rows: list[tuple[str, str]]) -> None:
    connection.execute("CREATE TABLE reviews (body TEXT, stars TEXT, part TEXT)")
    parts = ["test" if i % 5 == 0 else "train" for i in range(len(rows))]
    values = [(*row, part) for row, part in zip(rows, parts, strict=True)]
    connection.executemany("INSERT INTO reviews VALUES (?, ?, ?)", values)


def test_a_query_is_read_and_its_order_does_not_matter(sqlite: str) -> None:
    columns = {"text": "body", "label": "stars"}
    dataset = read_query("d", sqlite, "SELECT * FROM reviews", **columns)
    assert everything(dataset) == set(ROWS)
    for order in ("body", "stars DESC, body DESC"):
        assert read_query("d", sqlite, f"SELECT * FROM reviews ORDER BY {order}", **columns).digest == dataset.digest
    like = read_query("d", sqlite, "SELECT body, stars, part FROM reviews WHERE stars NOT LIKE 'p%t'", **columns)
    assert like.labels == ["negative", "positive"]
    split = read_query("d", sqlite, "SELECT * FROM reviews", **columns, split="part")
    assert (len(split.train), len(split.test)) == (48, 12)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT body AS text FROM reviews", "the query has no column 'label'; its columns are 'text'"),
        ("SELECT absent FROM reviews", "the query failed: no such column: absent"),
        ("DELETE FROM reviews", "returns no rows"),
        ("SELECT body AS text, stars AS label FROM reviews WHERE 0", "has no rows"),
    ],
)
def test_a_query_that_gives_no_data_is_refused_and_changes_nothing(sqlite: str, query: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_query("d", sqlite, query)
    assert len(everything(read_query("d", sqlite, "SELECT * FROM reviews", text="body", label="stars"))) == 60


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_query("d", f"sqlite:///{tmp_path}/none.db", "SELECT 1")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("url", ["no url", "nothing://host/db", f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/db"])
def test_a_database_that_cannot_be_reached_is_a_clear_error_without_its_password(url: str) -> None:
    with pytest.raises(DataError) as caught:
        read_query("d", url, "SELECT 1")
    assert SECRET not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_recipe_names_a_query_and_the_database_beside_it_or_in_the_settings(sqlite: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    data = "[data]\nquery = 'SELECT * FROM reviews'\ntext = 'body'\nlabel = 'stars'\n"
    recipe.write_text(f"{data}database = 'sqlite:///reviews.db'\n")
    found = load_data(read_recipe(recipe), LearnSettings(home=tmp_path / "home"))
    assert everything(found) == set(ROWS)
    recipe.write_text(data)
    settings = LearnSettings(home=tmp_path / "home", database=sqlite)
    assert load_data(read_recipe(recipe), settings).digest == found.digest
    with pytest.raises(DataError, match="MILLPOND_LEARN_DATABASE"):
        load_data(read_recipe(recipe), LearnSettings(home=tmp_path / "home"))


def test_a_recipe_is_shown_without_passwords_and_tokens(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for data in (
        f"query = 'SELECT 1'\ndatabase = 'postgresql+psycopg://me:{SECRET}@host/db?sslkey=t0ken'",
        f"file = 'https://me:{SECRET}@host/d.csv?sig=t0ken'",
    ):
        recipe.write_text(f"[data]\n{data}\n")
        read = read_recipe(recipe)
        kept = json.dumps(shown_recipe(read)) + read.data.source
        assert "host" in kept
        assert SECRET not in kept
        assert "t0ken" not in kept


def test_what_is_secret_in_a_url_is_taken_out_of_messages() -> None:
    url = "pg://me:p%40ss@host/db?key=abc"
    assert shown(url) == "pg://host/db"
    assert scrubbed(f"cannot open {url}: bad p@ss, p%40ss", url) == "cannot open pg://host/db: bad ***, ***"
    assert shown("/a/path?with@signs") == "/a/path?with@signs"


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED, reason=HOW_TO_INSTALL)
def test_postgresql_gives_the_same_dataset_as_sqlite(sqlite: str) -> None:
    with postgresql() as server:
        engine = sa.create_engine(f"{server}/postgres")
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE reviews (body TEXT, stars TEXT, part TEXT)")
            rows = [{"body": text, "stars": label} for text, label in ROWS]
            connection.execute(sa.text("INSERT INTO reviews VALUES (:body, :stars, 'train')"), rows)
            connection.exec_driver_sql("CREATE ROLE reader LOGIN PASSWORD 's3cret'; GRANT SELECT ON reviews TO reader")
        engine.dispose()
        url = f"{server}/postgres".replace("millpond@", "reader:s3cret@")
        query = "SELECT body, stars::text FROM reviews WHERE body NOT LIKE '%nothing%'"
        dataset = read_query("d", url, query, text="body", label="stars")
        here = read_query("d", sqlite, "SELECT body, stars FROM reviews", text="body", label="stars")
        assert dataset.digest == here.digest
        assert "s3cret" not in dataset.source
        for broken in ("SELECT nothing FROM reviews", "DELETE FROM reviews"):
            with pytest.raises(DataError, match="the query failed") as caught:
                read_query("d", url, broken)
            assert "s3cret" not in str(caught.value)
