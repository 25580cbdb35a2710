"""From sources to a dataset: rows are checked one by one, and each one not used is counted with its place.

With `PreparedSets` the texts go to disk as they come and are mapped from there, so that a corpus may be larger than
memory; without, they are kept in memory. The rows and the digest are the same.
"""

from __future__ import annotations

import decimal
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millpond.learn.datasets import (
    MAX_LABEL_CHARACTERS,
    MAX_TEXT_CHARACTERS,
    SPLIT_NAMES,
    BadRows,
    DataError,
    Dataset,
    Gathered,
    Row,
    SplitName,
)
from millpond.learn.prepared import PreparedSets
from millpond.learn.sources import BadRow, Columns, Raw, is_url, rows_of, rows_of_query, shown, sources_of

OnRows = Callable[[int], None]
"""Told how many rows have been read."""
ROWS_BETWEEN_REPORTS = 20_000


@dataclass(frozen=True)
class _Input:
    """Rows of one source, which they know by `name`; `only` is the split of all, `stamp` changes when they do."""

    source: str
    name: str
    rows: Callable[[], Iterator[Raw]]
    only: SplitName | None
    stamp: str | None
    """None: nobody knows."""


def read_files(
    name: str,
    source: Path | str,
    test_source: Path | str | None = None,
    *,
    text: str = "text",
    label: str = "label",
    split: str | None = None,
    seed: int = 0,
    sets: PreparedSets | None = None,
    on_rows: OnRows = lambda count: None,
) -> Dataset:
    """Read a CSV, TSV, JSONL or Parquet file with a text and a label column, or a directory per class.

    A source is a path or a URL that fsspec can open, or a pattern of such, as `reviews-*.csv`: each file is a source.
    The test split is `test_source`, or the rows whose `split` column or directory says so, or a fifth of the texts
    chosen with `seed`, repeated texts kept on one side.

    Raises:
        DataError: a source cannot be read, is empty, lacks a column, has one class only, or mostly bad rows.
    """
    columns = Columns(text, label, split)

    def of(part: Path | str, only: SplitName | None) -> list[_Input]:
        return [
            _Input(place, named, partial(rows_of, place, columns), only, _stamp(place, columns))
            for named, place in sources_of(str(part))
        ]

    inputs = of(source, "train" if test_source else None) + (of(test_source, "test") if test_source else [])
    shown_as = " and ".join(shown(str(part)) for part in (source, test_source) if part)
    return _gather(name, inputs, shown_as, split, seed, sets, on_rows)


def read_query(
    name: str,
    database: str,
    query: str,
    *,
    text: str = "text",
    label: str = "label",
    split: str | None = None,
    seed: int = 0,
    sets: PreparedSets | None = None,
    on_rows: OnRows = lambda count: None,
) -> Dataset:
    """Read the rows of a query; `database` is a SQLAlchemy URL. Whatever order they come in gives the same dataset.

    Raises:
        DataError: the database cannot be reached, the query fails or lacks a column, or as for `read_files`.
    """
    columns = Columns(text, label, split)
    found = _Input(shown(database), "query", partial(rows_of_query, database, query, columns), None, None)
    return _gather(name, [found], f"a query to {shown(database)}", split, seed, sets, on_rows, sort=True)


def _gather(
    name: str,
    inputs: list[_Input],
    source: str,
    split: str | None,
    seed: int,
    sets: PreparedSets | None,
    on_rows: OnRows,
    *,
    sort: bool = False,
) -> Dataset:
    bad = BadRows()
    rows = _rows(inputs, split, bad, on_rows)
    if sets is None:
        content = bytearray()
        gathered = Gathered(name, content.extend, bad)
        for row in rows:
            gathered.add(row)
        return gathered.dataset(lambda: np.frombuffer(bytes(content), np.uint8), source=source, seed=seed, sort=sort)
    stamps = [part.stamp for part in inputs]
    stamp = None if None in stamps else hashlib.sha256(msgspec.json.encode([stamps, seed])).hexdigest()
    return sets.prepare(name, rows, bad, stamp=stamp, source=source, seed=seed, sort=sort)


def _rows(inputs: list[_Input], split: str | None, bad: BadRows, on_rows: OnRows) -> Iterator[Row]:
    """Yield the rows that can be used, and see that each source has more of them than others."""
    total, tested = 0, False
    for part in inputs:
        source = shown(part.source)
        before, good = bad.count, 0
        for where, text, label, row_split in _checked(part.rows(), bad):
            target: SplitName | None = "train" if row_split is None else SPLIT_NAMES.get(row_split.strip().lower())
            target = part.only or target
            if target is None:
                why = f"column {split!r} says {str(row_split)[:40]!r}, which is none of {', '.join(SPLIT_NAMES)}"
                bad.add(where, why)
                continue
            good += 1
            total += 1
            tested |= target == "test"
            if total % ROWS_BETWEEN_REPORTS == 0:
                on_rows(total)
            yield text, label, target, part.name
        if bad.count - before > good:
            raise DataError(
                f"{source}: {bad.count - before} rows are bad and {good} are good, so the source or the columns are "
                f"probably not what was meant. The first bad rows:\n{bad}"
            )
        if good == 0:
            raise DataError(f"{source} has no rows. Give a source with at least two labelled texts.")
    if split is not None and not tested:
        source = shown(inputs[0].source)
        raise DataError(f"{source}: no row of column {split!r} says 'test'. Mark the test rows, or leave out --split.")


def _checked(raw: Iterator[Raw], bad: BadRows) -> Iterator[tuple[str, str, str, str | None]]:
    for where, text, label, split in raw:
        if isinstance(text, BadRow):
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


def _label_text(label: Any) -> str:
    """Return a label as text: 1, 1.0, "1" and " 1" are one label; anything that is no scalar is none."""
    if isinstance(label, float | decimal.Decimal):
        if not math.isfinite(label):
            return ""
        label = int(label) if label == int(label) else label
    return str(label).strip() if isinstance(label, str | int | float | decimal.Decimal) else ""


def _stamp(source: str, columns: Columns) -> str | None:
    """Return what changes when a file or directory on this machine does, None for what lies elsewhere."""
    if is_url(source):
        return None
    root = Path(source).resolve()
    states = hashlib.sha256()
    try:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            state = path.stat()
            states.update(os.fsencode(path))  # which need not be UTF-8
            states.update(f"\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}\0".encode())
    except OSError:
        return None
    return f"{states.hexdigest()} {columns}"
