"""Prepared data sets: the texts of a dataset in one file, and what points into it, under the digest of its rows.

A set is written to a temporary name and renamed when it is whole. It is found again by a stamp of the files that it was
made of, so that unchanged files are read once. Sets not used for longest go when all are larger than the bound; a
program that has mapped one keeps it until it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millpond.learn.datasets import BadRows, DataError, Dataset, Gathered, Row, Split
from millpond.learn.texts import Store, Texts
from millpond.settings import LearnSettings

FORMAT = 2
"""Raised when what is written, or which rows are taken, changes: older sets are then not found."""
ABANDONED_S = 24 * 3600
"""Age after which a set that was never finished is swept away."""


class _Description(msgspec.Struct, frozen=True, kw_only=True):
    """`set.json`."""

    format: int
    digest: str
    stamp: str | None
    source: str
    labels: list[str]
    splits: list[str]
    sources: dict[str, tuple[str, ...]]
    """Names by split; which row is of which is in the arrays `sources_as`."""
    sources_as: str
    bad_rows: int
    first_bad_rows: list[tuple[str, str]]


@dataclass(frozen=True)
class PreparedSets:
    """The sets below a directory, and how many bytes of them are kept."""

    directory: Path
    keep_bytes: int

    @classmethod
    def of(cls, settings: LearnSettings) -> PreparedSets:
        """Return those below the home."""
        return cls(settings.home / "prepared", settings.prepared_bytes)

    def prepare(
        self,
        name: str,
        rows: Iterable[Row],
        bad_rows: BadRows,
        *,
        stamp: str | None,
        source: str,
        seed: int,
        sort: bool,
    ) -> Dataset:
        """Return the dataset of `rows`, mapped from disk; they are not read where a set with this stamp is there.

        Raises:
            DataError: a set cannot be written, or as the rows say.
        """
        found = self._find(stamp) if stamp else None
        if found is not None:
            return self._open(found, name)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with tempfile.TemporaryDirectory(dir=self.directory, prefix=".new-") as temporary:
                new = Path(temporary) / "set"
                new.mkdir()
                digest = self._write(new, name, rows, bad_rows, stamp=stamp, source=source, seed=seed, sort=sort)
                target = self.directory / digest.removeprefix("sha256:")
                if target.exists():  # the same rows from elsewhere: what is there is as good, what is said is newer
                    for path in (*new.glob("*-sources-*.npy"), new / "set.json"):
                        path.replace(target / path.name)
                else:
                    new.rename(target)
            dataset = self._open(target, name)
            self._keep_bound()
            return dataset
        except OSError as error:
            raise DataError(
                f"{name} cannot be prepared in {self.directory}: {error}. Its texts need as much room there as where "
                "they come from; MILLPOND_HOME says where there is more."
            ) from error

    def _write(
        self,
        new: Path,
        name: str,
        rows: Iterable[Row],
        bad_rows: BadRows,
        *,
        stamp: str | None,
        source: str,
        seed: int,
        sort: bool,
    ) -> str:
        with (new / "texts").open("wb") as file:
            gathered = Gathered(name, file.write, bad_rows)
            for row in rows:
                gathered.add(row)
        dataset = gathered.dataset(lambda: _mapped(new / "texts"), source=source, seed=seed, sort=sort)
        arrays: dict[str, NDArray[Any]] = {"starts": gathered.texts.starts, "keys": gathered.texts.keys}
        for split_name, split in dataset.splits.items():
            arrays |= {f"{split_name}-rows": split.texts.rows, f"{split_name}-labels": split.labels}
        # Named by what is in them: the same rows may come from other sources later, while a program reads these.
        sources = {split_name: split.sources for split_name, split in dataset.splits.items()}
        sources_as = hashlib.sha256(b"".join(part.tobytes() for part in sources.values())).hexdigest()[:16]
        arrays |= {f"{split_name}-sources-{sources_as}": part for split_name, part in sources.items()}
        for array_name, array in arrays.items():
            np.save(new / f"{array_name}.npy", array, allow_pickle=False)
        description = _Description(
            format=FORMAT,
            digest=dataset.digest,
            stamp=stamp,
            source=dataset.source,
            labels=dataset.labels,
            splits=list(dataset.splits),
            sources={split_name: split.source_names for split_name, split in dataset.splits.items()},
            sources_as=sources_as,
            bad_rows=bad_rows.count,
            first_bad_rows=bad_rows.first,
        )
        (new / "set.json").write_bytes(msgspec.json.encode(description))
        return dataset.digest

    def _open(self, directory: Path, name: str) -> Dataset:
        description = _read(directory)
        if description is None:
            raise DataError(f"{directory} is damaged. Remove it; it is made again from its source.")
        os.utime(directory / "set.json")  # used now
        starts, keys = _load(directory, "starts"), _load(directory, "keys")
        store = Store(_mapped(directory / "texts"), starts, keys, self.directory)
        splits = {
            split: Split(
                Texts([store], _load(directory, f"{split}-rows")),
                _load(directory, f"{split}-labels"),
                _load(directory, f"{split}-sources-{description.sources_as}"),
                description.sources[split],
            )
            for split in description.splits
        }
        return Dataset(
            name,
            description.labels,
            splits["train"],
            splits["test"],
            splits.get("validation"),
            source=description.source,
            bad_rows=BadRows(description.bad_rows, list(description.first_bad_rows)),
            known_digest=description.digest,
        )

    def _find(self, stamp: str) -> Path | None:
        for directory in self._sets():
            description = _read(directory)
            if description is not None and description.stamp == stamp and description.format == FORMAT:
                return directory
        return None

    def _sets(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if not path.name.startswith(".") and path.is_dir()]

    def _sweep(self) -> None:
        for path in self.directory.glob(".*"):
            with contextlib.suppress(OSError):
                if path.is_dir() and time.time() - path.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _keep_bound(self) -> None:
        """Remove the sets used longest ago until the others are within the bound."""
        left = self.keep_bytes
        for directory in sorted(self._sets(), key=_last_used, reverse=True):
            left -= sum(path.stat().st_size for path in directory.iterdir())
            if left < 0:
                doomed = directory.rename(directory.with_name(f".old-{directory.name}"))
                shutil.rmtree(doomed, ignore_errors=True)


def _read(directory: Path) -> _Description | None:
    try:
        return msgspec.json.decode((directory / "set.json").read_bytes(), type=_Description)
    except (OSError, msgspec.MsgspecError):
        return None


def _last_used(directory: Path) -> float:
    try:
        return (directory / "set.json").stat().st_mtime
    except OSError:
        return 0.0


def _mapped(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _load(directory: Path, name: str) -> Any:
    """Map an array of the type that it was saved with."""
    return np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False))
