"""Labelled texts: split, with a digest, in memory or mapped from disk. Every row not used is counted.

A dataset has labels (strings), a training and a test split, and maybe a validation split. The same rows in the
same order give the same digest wherever they came from. Rows come from `sources`, large sets lie in `prepared`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from millpond import MillpondError
from millpond.learn.texts import Store, StoreWriter, Texts, encoded, numbered

MAX_TEXT_CHARACTERS = 4 * 1024 * 1024
MAX_LABEL_CHARACTERS = 200
MAX_LABELS = 1000
SEEN_LABELS = 10 * MAX_LABELS
"""Labels after which reading ends: such a column holds something else."""
SHOWN_BAD_ROWS = 20
"""Bad rows that are kept with their line number and reason; the others are only counted."""
TEST_SHARE = 0.2
"""Share of the texts that become the test split where the data does not say which rows are for testing."""
NAMED_SOURCES = 50
"""Sources of a split that keep their names, the largest; the others, however many files they are, become one."""

SplitName = Literal["train", "validation", "test"]
SPLIT_ORDER: tuple[SplitName, ...] = ("train", "validation", "test")
SPLIT_NAMES: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}


class DataError(MillpondError):
    """A data set cannot be read or cannot train a model; the message says where and what to do."""


class Split:
    """Texts, the index of each one's label in `Dataset.labels`, and of its source in `source_names`.

    Without `sources` all rows are of the first. No digest knows of them: the same rows are the same wherever they lie.
    """

    def __init__(
        self,
        texts: Iterable[str],
        labels: NDArray[np.int64],
        sources: NDArray[np.int16] | None = None,
        source_names: tuple[str, ...] = ("",),
    ) -> None:
        self.texts = Texts.of(texts)
        self.labels = labels
        self.sources = np.zeros(len(labels), np.int16) if sources is None else sources
        self.source_names = source_names

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: NDArray[np.int64]) -> Split:
        """Return the rows at `index`, in that order."""
        return Split(self.texts.take(index), self.labels[index], self.sources[index], self.source_names)

    def with_rows(self, other: Split) -> Split:
        """Return these rows and then those of `other`; sources of one name are one source."""
        names = tuple(dict.fromkeys(self.source_names + other.source_names))
        theirs = np.array([names.index(name) for name in other.source_names], np.int16)[other.sources]
        labels, sources = np.concatenate([self.labels, other.labels]), np.concatenate([self.sources, theirs])
        return Split(self.texts + other.texts, labels, sources, names)


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
    dropped_leaks: int = 0
    """Rows taken out of training and validation because their text is in the test split."""
    known_digest: str = ""
    """What `digest` would find, where it has been found before."""

    @cached_property
    def digest(self) -> str:
        """Return the digest of all rows: `sha256:` and the hash of labels, splits and texts in their order."""
        if self.known_digest:
            return self.known_digest
        total = hashlib.sha256(msgspec.json.encode(self.labels))
        for name in SPLIT_ORDER:
            split = self.splits.get(name)
            total.update(f"{name} {split_digest(split) if split else '-'}\n".encode())
        return f"sha256:{total.hexdigest()}"

    @property
    def splits(self) -> dict[str, Split]:
        """Return the splits there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    def renamed(self, labels: dict[str, str]) -> Dataset:
        """Return the same rows with other names for the labels."""
        return replace(self, labels=[labels.get(label, label) for label in self.labels], known_digest="")

    def of_source(self, name: str) -> Dataset:
        """Return the same rows as all of one source."""
        splits = {part: Split(split.texts, split.labels, source_names=(name,)) for part, split in self.splits.items()}
        return replace(self, train=splits["train"], test=splits["test"], validation=splits.get("validation"))

    def without_leaks(self) -> Dataset:
        """Return it without the training and validation rows whose text is in the test split, which stays whole.

        Raises:
            DataError: fewer than two labels are left to train on.
        """
        tested = self.test.texts.keys

        def clean(split: Split) -> Split:
            return split.take(np.flatnonzero(~np.isin(split.texts.keys, tested)))

        train, validation = clean(self.train), self.validation and clean(self.validation)
        before = len(self.train) + (len(self.validation) if self.validation else 0)
        dropped = before - len(train) - (len(validation) if validation else 0)
        if len(np.unique(train.labels)) < 2:
            raise DataError(
                f"{self.name}: without the rows whose text is in the test split, fewer than two classes are left to "
                "train on. Give other test rows, or leave out --drop-leaks."
            )
        return replace(
            self,
            train=train,
            validation=validation if validation else None,
            source=f"{self.source}; {dropped:,} rows whose text is in the test split were dropped",
            dropped_leaks=dropped,
            known_digest="" if dropped else self.known_digest,
        )


def split_digest(split: Split) -> str:
    """Return the sha256 (hexadecimal) of a split's rows in their order."""
    rows = hashlib.sha256()
    for text, label in zip(split.texts, split.labels.tolist(), strict=True):
        raw = encoded(text)
        rows.update(b"%d %d\n" % (label, len(raw)))
        rows.update(raw)
    return rows.hexdigest()


Row = tuple[str, str, SplitName, str]
"""Text, label, split, name of its source."""


def from_rows(
    name: str,
    rows: dict[SplitName, list[tuple[str, str]]],
    *,
    bad_rows: BadRows | None = None,
    source: str = "",
    official_test: bool = False,
    seed: int = 0,
) -> Dataset:
    """Make a dataset in memory of (text, label) rows by split; without a test split, a fifth of the texts becomes one.

    Raises:
        DataError: there are fewer than two labels to train on, or more than `MAX_LABELS`.
    """
    content = bytearray()
    gathered = Gathered(name, content.extend, bad_rows or BadRows())
    for split, members in rows.items():
        for text, label in members:
            gathered.add((text, label, split, name))
    dataset = gathered.dataset(lambda: np.frombuffer(bytes(content), np.uint8), source=source, seed=seed)
    return replace(dataset, official_test=official_test)


class Gathered:
    """Rows as they come, one after the other: texts go to `write`, about thirty bytes a row stay in memory."""

    def __init__(self, name: str, write: Callable[[bytes], object], bad_rows: BadRows) -> None:
        self._name, self._bad_rows = name, bad_rows
        self.texts = StoreWriter(write)
        self._label_numbers: dict[str, int] = {}  # in the order in which they come
        self._source_numbers: dict[str, int] = {}
        self._labels = array("q")
        self._splits = array("b")
        self._sources = array("i")

    def add(self, row: Row) -> None:
        """Take a row in.

        Raises:
            DataError: there are far too many labels for the column to be the right one.
        """
        text, label, split, source = row
        number = self._label_numbers.setdefault(label, len(self._label_numbers))
        if number >= SEEN_LABELS:
            raise self._too_many(f"more than {SEEN_LABELS:,}")
        self.texts.add(text)
        self._labels.append(number)
        self._splits.append(SPLIT_ORDER.index(split))
        self._sources.append(self._source_numbers.setdefault(source, len(self._source_numbers)))

    def dataset(
        self,
        content: Callable[[], NDArray[np.uint8]],
        *,
        source: str,
        seed: int,
        sort: bool = False,
    ) -> Dataset:
        """Return the dataset of all rows, their texts in `content`; `sort` brings them into an order of their own.

        Raises:
            DataError: there are fewer than two labels to train on, or more than `MAX_LABELS`.
        """
        found = list(self._label_numbers)
        numbers, splits = np.array(self._labels, np.int64), np.array(self._splits, np.int8)
        sources, source_names = np.array(self._sources, np.int32), list(self._source_numbers)
        order = np.arange(len(numbers))
        trained = [found[i] for i in np.unique(numbers[splits == SPLIT_ORDER.index("train")])]
        labels = sorted(trained, key=_label_order)
        self._check(labels)
        index = {label: i for i, label in enumerate(labels)}
        indices = np.array([index.get(label, -1) for label in found])[numbers]
        texts = Texts([Store(content(), self.texts.starts, self.texts.keys)])
        if sort:
            order = np.lexsort((indices, texts.keys))

        def as_split(part: SplitName) -> Split:
            rows = order[splits[order] == SPLIT_ORDER.index(part)]
            for position in np.flatnonzero(indices[rows] < 0):
                label = found[numbers[rows[position]]]
                where = f"{part} row {position + 1}"
                self._bad_rows.add(where, f"label {label[:40]!r} does not occur in the training rows")
            rows = rows[indices[rows] >= 0]
            return Split(texts.take(rows), indices[rows], *_largest(sources[rows], source_names))

        train, validation, test = as_split("train"), as_split("validation"), as_split("test")
        if not len(test):
            keep, held = split_texts(train, TEST_SHARE, seed)
            if not len(held):
                raise DataError(
                    f"{self._name}: no test rows are given, and of {len(train):,} rows none can be set aside: each is "
                    "the last of its class or too few there are. Give more rows, or rows to test on."
                )
            train, test = train.take(keep), train.take(held)
            source += f"; no test rows given: {TEST_SHARE:.0%} of the texts were set aside (seed {seed})"
        shown = source.lstrip("; ")
        held_back = validation if len(validation) else None
        return Dataset(self._name, labels, train, test, held_back, source=shown, bad_rows=self._bad_rows)

    def _check(self, labels: list[str]) -> None:
        if len(labels) < 2:
            seen = f"only {labels[0]!r}" if labels else "none"
            raise DataError(
                f"{self._name}: a model needs at least two classes to tell apart; the training rows have {seen}."
            )
        if len(labels) > MAX_LABELS:
            raise self._too_many(f"{len(labels):,}, more than {MAX_LABELS:,}")

    def _too_many(self, count: str) -> DataError:
        return DataError(f"{self._name}: different labels: {count}. Is the label column the right one?")


def _largest(sources: NDArray[np.int32], names: list[str]) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    """Number the sources of some rows anew, the largest first; after `NAMED_SOURCES` of them the others are one."""
    found, at, rows = np.unique(sources, return_inverse=True, return_counts=True)
    order = np.argsort(-rows, kind="stable")
    place = np.argsort(order)
    kept = [names[found[i]] for i in order[:NAMED_SOURCES]]
    if others := len(found) - len(kept):
        kept.append(f"{others:,} other sources")
    return np.minimum(place, NAMED_SOURCES)[at].astype(np.int16), tuple(kept)


def split_texts(split: Split, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose `share` of the rows with `seed`; return the rows kept and those chosen, each in their old order.

    Repeated texts stay on one side, and each label keeps at least one row on the side that is kept.
    """
    order = shuffled(split, seed)
    chosen = order[: round(len(order) * share)]
    kept = np.ones(len(split), bool)
    kept[chosen] = False
    # A text on both sides of the cut, or the last row of a label: its rows all stay.
    keys, labels = split.texts.keys, split.labels
    texts_kept = set(keys[order[len(chosen) :][:1]].tolist())
    labels_kept = set(np.unique(labels[kept]).tolist())
    for i, key, label in zip(chosen.tolist(), keys[chosen].tolist(), labels[chosen].tolist(), strict=True):
        if key in texts_kept or label not in labels_kept:
            kept[i] = True
            texts_kept.add(key)
            labels_kept.add(label)
    return np.flatnonzero(kept), np.flatnonzero(~kept)


def shuffled(split: Split, seed: int) -> NDArray[np.int64]:
    """Return all row numbers in a seeded random order; rows of one text follow each other."""
    number, first = numbered(split.texts.keys)
    place = np.empty(len(first), np.int64)
    place[np.random.default_rng(seed).permutation(len(first))] = np.arange(len(first))
    return np.argsort(place[number], kind="stable")


def _label_order(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isascii() and label.isdigit() else (1, 0, label)
