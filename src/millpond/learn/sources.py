"""Where labelled texts come from: CSV, TSV, JSONL, Parquet, a directory per class, a query; on disk or by URL.

Each reader yields rows as it finds them, a few at a time, and says where each was; what cannot be a row is a `BadRow`
in its place. A password, or what follows the `?` of a URL, is in no message.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import msgspec

from millpond.learn.datasets import MAX_TEXT_CHARACTERS, SPLIT_NAMES, DataError

MAX_LINE_BYTES = 6 * MAX_TEXT_CHARACTERS
"""Longest line of a JSONL file; JSON escapes may make six bytes of a character."""
ROWS_AT_ONCE = 1000
"""Rows of a query or of a Parquet file that are in memory together."""
MAX_NAME_CHARACTERS = 100
"""Longest name of a source."""
CONNECT_S = 10
COPY_BYTES = 1024 * 1024

Raw = tuple[str, Any, Any, Any]
"""Where, text, label, split (None where nothing says it), as found; a bad row has a `BadRow` for its text."""


@dataclass(frozen=True)
class BadRow:
    """Stands for a text that cannot be had."""

    why: str


@dataclass(frozen=True)
class Columns:
    """The columns that hold text, label and, maybe, split."""

    text: str = "text"
    label: str = "label"
    split: str | None = None

    @property
    def wanted(self) -> list[str]:
        """Return their names."""
        return [self.text, self.label, *([self.split] if self.split else [])]


def is_url(source: str) -> bool:
    """Return whether a source is a URL, such as s3://bucket/reviews.csv, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)", source) is not None


def shown(source: str) -> str:
    """Return a path, or a URL without user, password and query: what may be shown and kept."""
    kept = re.sub(r"\?.*", "", re.sub(r"//\S*@", "//", source), flags=re.DOTALL) if is_url(source) else source
    return _visible(kept)


def sources_of(source: str) -> list[tuple[str, str]]:
    """Return name and place of each source that a path or URL stands for: itself, or the files that it is a pattern of.

    A name is what may be kept of a place: a file's name, below the directory that all files share. Hosts, passwords and
    homes are not in it.

    Raises:
        DataError: it is a pattern of no file, or cannot be listed.
    """
    with _errors(source):
        is_pattern = re.search(r"\*" if is_url(source) else r"[*?[]", shown(source)) and not Path(source).exists()
    if not is_pattern:
        whole = shown(source).partition("::")[0] if is_url(source) else Path(source).absolute()
        return [(_nameable(PurePosixPath(whole).name), source)]
    with _errors(source):
        files, pattern = _open_url(source)
        found = files.glob(pattern, detail=True).items()
    paths = sorted(PurePosixPath(str(path)) for path, info in found if info["type"] != "directory")
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise DataError(f"{shown(source)} is the pattern of no file. Give a path, or a pattern that files match.")
    shared = os.path.commonpath([path.parent for path in paths])
    names = [_nameable(str(path.relative_to(shared))) for path in paths]
    places = [source.replace(pattern, str(path), 1) if is_url(source) else str(path) for path in paths]
    return list(zip(names, places, strict=True))


def _nameable(name: str) -> str:
    """Return a name that any page, terminal or JSON can hold: not too long, of characters that are seen."""
    name = _visible(name)
    return name if len(name) <= MAX_NAME_CHARACTERS else f"…{name[1 - MAX_NAME_CHARACTERS :]}"


def _visible(name: str) -> str:
    """Return a name with a mark for each character that is not seen, or is none: file names need not be UTF-8."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def rows_of(source: str, columns: Columns) -> Iterator[Raw]:
    """Yield the rows of a file or of a directory per class, on disk or by URL.

    Raises:
        DataError: it cannot be read, is empty, lacks a column, or is of no kind that is known.
    """
    if not is_url(source):
        if ending(source) is None and Path(source).is_dir():
            yield from _rows_of_directory(source, columns)
        else:
            yield from _rows_of_file(Path(source), columns)
        return
    with _errors(source):
        files, path = _open_url(source)
        is_directory = ending(source) is None and files.isdir(path)
    if is_directory:
        yield from _rows_of_directory(source, columns)
    elif getattr(files, "local_file", False):
        yield from _rows_of_file(Path(path), columns)
    else:
        _reader(shown(source))  # what cannot be read is not fetched
        with tempfile.TemporaryDirectory(prefix="millpond-fetch-") as temporary:
            copy = Path(temporary) / PurePosixPath(shown(source)).name
            with _errors(source), files.open(path, "rb") as far, copy.open("wb") as near:
                shutil.copyfileobj(far, near, COPY_BYTES)
            yield from _rows_of_file(copy, columns)


def ending(source: str) -> str | None:
    """Return the ending that says how a file is read, None if there is none such."""
    suffix = PurePosixPath(shown(source)).suffix.lower()
    return suffix if suffix in _READERS else None


def _reader(source: str) -> Any:
    found = ending(source)
    if found is None:
        raise DataError(
            f"{source} has the ending {PurePosixPath(source).suffix!r}; data comes as {', '.join(_READERS)}, "
            "or as a directory with a directory of .txt files for each class."
        )
    return _READERS[found]


# --- files -------------------------------------------------------------------------------------------------------


def _rows_of_file(path: Path, columns: Columns) -> Iterator[Raw]:
    if ending(str(path)) is None and not path.exists():
        raise DataError(f"{path} does not exist.")
    reader = _reader(str(path))
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Give a file with at least two labelled texts.")
    try:
        yield from reader(path, columns)
    except UnicodeDecodeError as error:
        raise DataError(_where_undecodable(path, error)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_csv(path: Path, columns: Columns) -> Iterator[Raw]:
    csv.field_size_limit(MAX_TEXT_CHARACTERS + 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            header = next(reader, [])
            _require_columns(str(path), header, columns)
            at_text, at_label = header.index(columns.text), header.index(columns.label)
            at_split = header.index(columns.split) if columns.split else None
            line = reader.line_num + 1
            for row in reader:
                where, line = f"{path.name} line {line}", reader.line_num + 1
                if not row:
                    continue
                if len(row) != len(header):
                    why = f"{len(row)} fields where the header has {len(header)}; is a quote or a comma missing?"
                    yield where, BadRow(why), None, None
                    continue
                yield where, row[at_text], row[at_label], row[at_split] if at_split is not None else None
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not readable as CSV: {error}.") from error


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Raw]:
    found: set[str] = set()
    seen = 0
    for number, line in read_lines(path, MAX_LINE_BYTES):
        where = f"{path.name} line {number}"
        if len(line) > MAX_LINE_BYTES:
            yield where, BadRow(f"longer than {MAX_LINE_BYTES:,} bytes"), None, None
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line.decode("utf-8")  # an encoding error ends the reading, a JSON error does not
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            yield where, BadRow(f"not JSON: {error}"), None, None
            continue
        if not isinstance(row, dict):
            yield where, BadRow("not a JSON object"), None, None
            continue
        seen += 1
        found.update(list(row)[:50] if len(found) < 50 else [])
        missing = [column for column in columns.wanted if row.get(column) is None]
        if missing:
            yield where, BadRow(f"no {' and no '.join(repr(column) for column in missing)}"), None, None
            continue
        yield where, row[columns.text], row[columns.label], row[columns.split] if columns.split else None
    if seen and not set(columns.wanted) <= found and len(found) < 50:
        _require_columns(str(path), sorted(found), columns)


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


def _read_parquet(path: Path, columns: Columns) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(str(path), file.schema_arrow.names, columns)
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns.wanted):
                for values in zip(*(_values(batch.column(name)) for name in columns.wanted), strict=True):
                    number += 1
                    yield f"{path.name} row {number}", values[0], values[1], values[2] if columns.split else None
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _values(column: Any) -> list[Any]:
    """Return the values of a column of Arrow's, a `BadRow` in the place of each text that is not UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _undecodable(error)


_READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _require_columns(source: str, found: Sequence[str], columns: Columns) -> None:
    wanted = (("--text", columns.text), ("--label", columns.label), ("--split", columns.split))
    for option, column in wanted:
        if column is not None and column not in found:
            names = ", ".join(repr(name[:40]) for name in found[:20]) or "none"
            raise DataError(
                f"{source} has no column {column!r}; its columns are {names}. Name the right one with {option}."
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


# --- a directory per class ---------------------------------------------------------------------------------------


def _rows_of_directory(source: str, columns: Columns) -> Iterator[Raw]:
    """Yield the rows of CLASS/*.txt or SPLIT/CLASS/*.txt, ordered by name whatever the disk's order is."""
    if columns.split is not None:
        raise DataError(f"{shown(source)} is a directory: it has no columns. Put its classes below train/ and test/.")
    with _errors(source):
        files, root = _open_url(source)
        names = [PurePosixPath(name).relative_to(root.rstrip("/") or "/") for name in files.find(root)]
    names = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    tops = {name.parts[0] for name in names if len(name.parts) > 1}
    has_splits = bool(tops) and all(top.lower() in SPLIT_NAMES for top in tops)
    depth = 3 if has_splits else 2
    for name in names:
        if len(name.parts) != depth:
            shape = "SPLIT/CLASS/NAME.txt" if has_splits else "CLASS/NAME.txt"
            yield str(name), BadRow(f"not where a text belongs, which is {shape}"), None, None
        elif name.suffix.lower() != ".txt":
            yield str(name), BadRow("not a .txt file"), None, None
        else:
            with _errors(source), files.open(f"{root.rstrip('/')}/{name}", "rb") as file:
                raw = file.read(4 * MAX_TEXT_CHARACTERS + 1)
            yield str(name), _decoded(raw), name.parts[-2], name.parts[0] if has_splits else None


def _decoded(raw: bytes) -> str | BadRow:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _undecodable(error)


def _undecodable(error: UnicodeDecodeError) -> BadRow:
    return BadRow(f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start + 1}")


# --- a query -----------------------------------------------------------------------------------------------------


def rows_of_query(database: str, query: str, columns: Columns) -> Iterator[Raw]:
    """Yield the rows that a query returns; `database` is a SQLAlchemy URL. Nothing is committed.

    Raises:
        DataError: the database cannot be reached, a package lacks, or the query fails or lacks a column.
    """
    try:
        import sqlalchemy as sa
    except ImportError as error:
        raise DataError(
            "a query needs SQLAlchemy, which is not here. Install it: pip install 'millpond[data]'"
        ) from error
    with _errors(database):
        try:
            url = sa.make_url(database)
            is_file = url.get_backend_name() == "sqlite" and url.database and not url.database.startswith("file:")
            if is_file and not Path(str(url.database)).is_file():
                raise DataError(f"{shown(database)} does not exist.")  # SQLite would make it
            limit = {"connect_timeout": CONNECT_S} if url.get_backend_name() == "postgresql" else {}
            engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=limit)
            with engine.connect() as connection:
                streaming = connection.execution_options(yield_per=ROWS_AT_ONCE, no_parameters=True)
                result = streaming.exec_driver_sql(query)
                if not result.returns_rows:
                    raise DataError("the query returns no rows. Give a SELECT with a text and a label column.")
                _require_columns("the query", list(result.keys()), columns)
                at = [list(result.keys()).index(name) for name in columns.wanted]
                for number, row in enumerate(result, 1):
                    yield f"row {number}", row[at[0]], row[at[1]], row[at[2]] if columns.split else None
        except sa.exc.NoSuchModuleError as error:
            raise DataError(f"{shown(database)}: SQLAlchemy does not know this kind of database: {error}") from error
        except sa.exc.DBAPIError as error:
            raise DataError(f"{shown(database)}: the query failed: {scrubbed(str(error.orig), database)}") from None


# --- URLs --------------------------------------------------------------------------------------------------------


def _open_url(source: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path within it."""
    import fsspec
    from fsspec.registry import known_implementations

    try:
        files, path = fsspec.core.url_to_fs(source)
        return files, str(path)
    except ImportError as error:
        protocol = source.partition(":")[0]
        package = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        needed = "aiohttp" if package in ("fsspec", "") else package
        raise DataError(
            f"{shown(source)}: reading {protocol}:// needs a package that is not here. Install it: pip install {needed}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{shown(source)}: {scrubbed(str(error), source)}. Paths can be read and the URLs of fsspec, such as "
            "https:// or s3://; a database is read by --query and --database."
        ) from None


@contextmanager
def _errors(source: str) -> Iterator[None]:
    """Turn what a file system or a database driver raises into a message without credentials."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each file system and driver has errors of its own
        message = scrubbed(str(error), source) or "no reason is given"
        raise DataError(f"{shown(source)} cannot be read: {type(error).__name__}: {message}") from None


def scrubbed(message: str, source: str) -> str:
    """Return a message without what is secret in a URL."""
    message = message.replace(source, shown(source))
    secret = re.search(r"//[^:/@]*:(\S*)@", source)
    query = source.partition("?")[2] if is_url(source) else ""
    for part in (secret[1] if secret else "", query):
        for form in (part, unquote(part)):
            message = message.replace(form, "***") if form else message
    return message
