"""Labelled texts in memory: read from CSV, JSONL or Parquet, split, with a digest. Every row not used is counted.

A dataset has labels (strings), a training and a test split, and maybe a validation split. The same rows in the
same order give the same digest wherever they came from. What a file holds is hostile until it is checked.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from millpond import MillpondError

MAX_TEXT_CHARACTERS = 4 * 1024 * 1024
MAX_LINE_BYTES = 6 * MAX_TEXT_CHARACTERS
"""Longest line of a JSONL file; JSON escapes may make six bytes of a character."""
MAX_LABEL_CHARACTERS = 200
MAX_LABELS = 1000
SHOWN_BAD_ROWS = 20
"""Bad rows that are kept with their line number and reason; the others are only counted."""
TEST_SHARE = 0.2
"""Share of the texts that become the test split where the data does not say which rows are for testing."""

SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}


class DataError(MillpondError):
    """A data set cannot be read or cannot train a model; the message says where and what to do."""


@dataclass(frozen=True)
class Split:
    """Texts and the index of each one's label in `Dataset.labels`."""

    texts: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: NDArray[np.int64]) -> Split:
        """Return the rows at `index`, in that order."""
        return Split([self.texts[i] for i in index], self.labels[index])

    def with_rows(self, other: Split) -> Split:
        """Return these rows and then those of `other`."""
        return Split(self.texts + other.texts, np.concatenate([self.labels, other.labels]))


@dataclass
class BadRows:
    """Rows that were not used: how many, and where the first of them are."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)
    """(where, why) of the first `SHOWN_BAD_ROWS`."""

    def add(self, where: str, why: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.first) < SHOWN_BAD_ROWS:
            self.first.append((where, why))

    def __str__(self) -> str:
        lines = [f"  {where}: {why}" for where, why in self.first]
        if self.count > len(lines):
            lines.append(f"  and {self.count - len(lines)} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Dataset:
    """A named set of labelled texts; `official_test` says whether the test split is the corpus's published one."""

    name: str
    labels: list[str]
    train: Split
    test: Split
    validation: Split | None = None
    official_test: bool = False
    source: str = ""
    """Where the rows came from and how they were split, for people."""
    bad_rows: BadRows = field(default_factory=BadRows)

    @cached_property
    def digest(self) -> str:
        """Return the digest of all rows: `sha256:` and the hash of labels, splits and texts in their order."""
        total = hashlib.sha256(msgspec.json.encode(self.labels))
        for name, split in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            total.update(f"{name} {split_digest(split) if split else '-'}\n".encode())
        return f"sha256:{total.hexdigest()}"

    def renamed(self, labels: dict[str, str]) -> Dataset:
        """Return the same rows with other names for the labels."""
        return replace(self, labels=[labels.get(label, label) for label in self.labels])


def split_digest(split: Split) -> str:
    """Return the sha256 (hexadecimal) of a split's rows in their order."""
    rows = hashlib.sha256()
    for text, label in zip(split.texts, split.labels.tolist(), strict=True):
        encoded = text.encode("utf-8", "surrogatepass")
        rows.update(b"%d %d\n" % (label, len(encoded)))
        rows.update(encoded)
    return rows.hexdigest()


def read_files(
    name: str,
    path: Path,
    test_path: Path | None = None,
    *,
    text: str = "text",
    label: str = "label",
    split: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Read a CSV, TSV, JSONL or Parquet file with a text and a label column.

    The test split is `test_path`, or the rows whose `split` column says so, or a fifth of the texts chosen with
    `seed`, repeated texts kept on one side.

    Raises:
        DataError: a file cannot be read, is empty, lacks a column, has one class only, or mostly bad rows.
    """
    bad = BadRows()
    rows: dict[SplitName, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    sources: list[tuple[Path | None, SplitName | None]] = [(path, "train" if test_path else None), (test_path, "test")]
    for file, only in sources:
        if file is None:
            continue
        count = bad.count
        good = 0
        for where, row_text, row_label, row_split in _checked(_read(file, text, label, split), bad):
            target: SplitName | None = "train" if row_split is None else SPLIT_NAMES.get(row_split.strip().lower())
            target = only or target
            if target is None:
                bad.add(
                    where, f"column {split!r} says {str(row_split)[:40]!r}, which is none of {', '.join(SPLIT_NAMES)}"
                )
                continue
            rows[target].append((row_text, row_label))
            good += 1
        if bad.count - count > good:
            raise DataError(
                f"{file}: {bad.count - count} rows are bad and {good} are good, so the file or the columns are "
                f"probably not what was meant. The first bad rows:\n{bad}"
            )
        if good == 0:
            raise DataError(f"{file} has no rows. Give a file with at least two labelled texts.")
    source = f"{path}" + (f" and {test_path}" if test_path else "")
    if split is not None and not test_path and not rows["test"]:
        raise DataError(f"{path}: no row of column {split!r} says 'test'. Mark the test rows, or leave out --split.")
    return from_rows(name, rows, bad_rows=bad, source=source, seed=seed)


def read_texts(path: Path, column: str, most: int | None = None) -> list[str]:
    """Read the texts of a file, with labels or without; empty and too long ones are left out.

    Raises:
        DataError: the file cannot be read or lacks the column.
    """
    bad = BadRows()
    unlabelled = ((where, text, "-", None) for where, text, _, _ in _read(path, column, column, None))
    return [text for _, text, _, _ in islice(_checked(unlabelled, bad), most)]


def from_rows(
    name: str,
    rows: dict[SplitName, list[tuple[str, str]]],
    *,
    bad_rows: BadRows | None = None,
    source: str = "",
    official_test: bool = False,
    seed: int = 0,
) -> Dataset:
    """Make a dataset of (text, label) rows by split; without a test split, a fifth of the texts becomes one.

    Raises:
        DataError: there are fewer than two labels to train on, or more than `MAX_LABELS`.
    """
    bad_rows = bad_rows or BadRows()
    everything = [label for _, label in rows["train"]]
    labels = sorted(set(everything), key=_label_order)
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "none"
        raise DataError(f"{name}: a model needs at least two classes to tell apart; the training rows have {found}.")
    if len(labels) > MAX_LABELS:
        raise DataError(
            f"{name}: {len(labels):,} different labels, more than {MAX_LABELS:,}. Is the label column the right one?"
        )
    index = {label: i for i, label in enumerate(labels)}

    def as_split(part: SplitName) -> Split:
        known = []
        for position, (text, label) in enumerate(rows.get(part, ()), 1):
            if label in index:
                known.append((text, index[label]))
            else:
                bad_rows.add(f"{part} row {position}", f"label {label[:40]!r} does not occur in the training rows")
        return Split([text for text, _ in known], np.array([label for _, label in known], np.int64))

    train, validation, test = as_split("train"), as_split("validation"), as_split("test")
    if not len(test):
        keep, held = split_texts(train, TEST_SHARE, seed)
        train, test = train.take(keep), train.take(held)
        source += f"; no test rows given: {TEST_SHARE:.0%} of the texts were set aside (seed {seed})"
    return Dataset(
        name, labels, train, test, validation if len(validation) else None, official_test, source.lstrip("; "), bad_rows
    )


def split_texts(split: Split, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose `share` of the rows with `seed`; return the rows kept and those chosen, each in their old order.

    Repeated texts stay on one side, and each label keeps at least one row on the side that is kept.
    """
    order = shuffled(split, seed)
    chosen = order[: round(len(order) * share)]
    kept = np.ones(len(split), bool)
    kept[chosen] = False
    # A text on both sides of the cut, or the last row of a label: its rows all stay.
    texts_kept = {split.texts[i] for i in np.flatnonzero(kept)}
    labels_kept = set(split.labels[kept].tolist())
    for i in chosen:
        if split.texts[i] in texts_kept or int(split.labels[i]) not in labels_kept:
            kept[i] = True
            texts_kept.add(split.texts[i])
            labels_kept.add(int(split.labels[i]))
    return np.flatnonzero(kept), np.flatnonzero(~kept)


def shuffled(split: Split, seed: int) -> NDArray[np.int64]:
    """Return all row numbers in a seeded random order; rows of one text follow each other."""
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(split.texts):
        groups.setdefault(text, []).append(i)
    members = list(groups.values())
    order = np.random.default_rng(seed).permutation(len(members))
    return np.fromiter((i for g in order for i in members[g]), np.int64, len(split))


# --- reading -----------------------------------------------------------------------------------------------------

_Raw = tuple[str, Any, Any, Any]
"""Where, text, label, split (None where there is no split column), as found; or where, None, why, None if bad."""


def _checked(raw: Iterator[_Raw], bad: BadRows) -> Iterator[tuple[str, str, str, str | None]]:
    for where, text, label, split in raw:
        if isinstance(text, _Bad):
            bad.add(where, text.why)
            continue
        label = _label_text(label)
        if not isinstance(text, str) or not text.strip():
            bad.add(where, "the text is empty" if not text or isinstance(text, str) else "the text is not a string")
        elif len(text) > MAX_TEXT_CHARACTERS:
            bad.add(where, f"the text has {len(text):,} characters, more than {MAX_TEXT_CHARACTERS:,}")
        elif not label:
            bad.add(where, "the label is empty")
        elif len(label) > MAX_LABEL_CHARACTERS:
            bad.add(where, f"the label has {len(label):,} characters, more than {MAX_LABEL_CHARACTERS}")
        else:
            yield where, text, label, None if split is None else str(split)


@dataclass(frozen=True)
class _Bad:
    why: str


def _label_text(label: Any) -> str:
    """Return a label as text: 1, 1.0, "1" and " 1" are one label; anything that is no scalar is none."""
    if isinstance(label, float) and label.is_integer() and math.isfinite(label):
        label = int(label)
    if isinstance(label, float) and math.isnan(label):
        return ""
    return str(label).strip() if isinstance(label, str | int | float) else ""


def _label_order(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isascii() and label.isdigit() else (1, 0, label)


def _read(path: Path, text: str, label: str, split: str | None) -> Iterator[_Raw]:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has the ending {path.suffix!r}; data comes as {', '.join(readers)}.")
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Give a file with at least two labelled texts.")
    try:
        yield from reader(path, text, label, split)
    except UnicodeDecodeError as error:
        raise DataError(_where_undecodable(path, error)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_csv(path: Path, text: str, label: str, split: str | None) -> Iterator[_Raw]:
    csv.field_size_limit(MAX_TEXT_CHARACTERS + 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            header = next(reader, [])
            _require_columns(path, header, text, label, split)
            at_text, at_label = header.index(text), header.index(label)
            at_split = header.index(split) if split else None
            line = reader.line_num + 1
            for row in reader:
                where, line = f"{path.name} line {line}", reader.line_num + 1
                if not row:
                    continue
                if len(row) != len(header):
                    why = f"{len(row)} fields where the header has {len(header)}; is a quote or a comma missing?"
                    yield where, _Bad(why), None, None
                    continue
                yield where, row[at_text], row[at_label], row[at_split] if at_split is not None else None
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not readable as CSV: {error}.") from error


def _read_jsonl(path: Path, text: str, label: str, split: str | None) -> Iterator[_Raw]:
    columns: set[str] = set()
    wanted = [text, label, *([split] if split else [])]
    seen = 0
    for number, line in read_lines(path, MAX_LINE_BYTES):
        where = f"{path.name} line {number}"
        if len(line) > MAX_LINE_BYTES:
            yield where, _Bad(f"longer than {MAX_LINE_BYTES:,} bytes"), None, None
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line.decode("utf-8")  # an encoding error ends the reading, a JSON error does not
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            yield where, _Bad(f"not JSON: {error}"), None, None
            continue
        if not isinstance(row, dict):
            yield where, _Bad("not a JSON object"), None, None
            continue
        seen += 1
        columns.update(list(row)[:50] if len(columns) < 50 else [])
        missing = [column for column in wanted if row.get(column) is None]
        if missing:
            yield where, _Bad(f"no {' and no '.join(repr(column) for column in missing)}"), None, None
            continue
        yield where, row[text], row[label], row[split] if split else None
    if seen and not set(wanted) <= columns and len(columns) < 50:
        _require_columns(path, sorted(columns), text, label, split)


def read_lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank; of one longer than `limit`, only `limit` + 1 bytes."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            rest = line
            while len(rest) > limit and not rest.endswith(b"\n"):
                rest = file.readline(limit + 1)
            if line.strip():
                yield number, line


def _read_parquet(path: Path, text: str, label: str, split: str | None) -> Iterator[_Raw]:
    import pyarrow
    import pyarrow.parquet

    wanted = [text, label, *([split] if split else [])]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(path, file.schema_arrow.names, text, label, split)
            number = 0
            for batch in file.iter_batches(columns=wanted):
                columns = batch.to_pydict()
                for values in zip(*(columns[name] for name in wanted), strict=True):
                    number += 1
                    yield f"{path.name} row {number}", values[0], values[1], values[2] if split else None
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _require_columns(path: Path, found: Sequence[str], text: str, label: str, split: str | None) -> None:
    for option, column in (("--text", text), ("--label", label), ("--split", split)):
        if column is not None and column not in found:
            names = ", ".join(repr(name[:40]) for name in found[:20]) or "none"
            raise DataError(
                f"{path} has no column {column!r}; its columns are {names}. Name the right one with {option}."
            )


def _where_undecodable(path: Path, error: UnicodeDecodeError) -> str:
    """Name the line and the byte: the error itself only knows its place in a buffer."""
    line = 1
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as found:
                line, error = number, found
                break
    byte = error.object[error.start]
    return (
        f"{path} line {line} is not UTF-8: byte 0x{byte:02x} at column {error.start + 1}. "
        f"Convert the file, such as with: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
    )
