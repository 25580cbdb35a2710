"""Texts that need not fit into memory: their UTF-8 in one array (often a mapped file), and where each begins.

A `Texts` is a sequence of strings over such arrays. Taking, slicing and adding copy row numbers, never texts. Each
text has a key, the first eight bytes of its BLAKE2b, by which repeated texts are found without holding them.
"""

from __future__ import annotations

import hashlib
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096
"""Texts whose places are looked up at once when they are read one after the other."""

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Store:
    """The arrays: text i is `content[starts[i]:starts[i + 1]]`, in UTF-8 (lone surrogates as they are)."""

    content: NDArray[np.uint8]
    starts: Index
    keys: NDArray[np.uint64]
    place: Path | None = None
    """Directory of a mapped file; None: all is in memory."""

    def __len__(self) -> int:
        return len(self.keys)


class Texts(Sequence[str]):
    """Rows of one store or of several, in any order."""

    def __init__(self, stores: Sequence[Store], rows: Index | None = None) -> None:
        """Take all texts of `stores`, or those at `rows`, counted through all of them."""
        self._stores = tuple(stores)
        self._bounds = np.cumsum([0, *map(len, self._stores)], dtype=np.int64)
        self._rows = np.arange(self._bounds[-1]) if rows is None else rows

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Return texts that are in memory."""
        if isinstance(texts, Texts):
            return texts
        content = bytearray()
        writer = StoreWriter(content.extend)
        for text in texts:
            writer.add(text)
        return cls([Store(np.frombuffer(bytes(content), np.uint8), writer.starts, writer.keys)])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self._stores, self._rows[index])
        row = self._rows[operator.index(index)]
        return next(self._read(row.reshape(1)))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._rows), BLOCK):
            yield from self._read(self._rows[start : start + BLOCK])

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and bool((self.keys == text_key(text)).any())

    def __add__(self, other: Sequence[str]) -> Texts:
        other = Texts.of(other)
        return Texts(self._stores + other._stores, np.concatenate([self._rows, other._rows + self._bounds[-1]]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} texts>"

    @property
    def rows(self) -> Index:
        """Return where in the stores each text is."""
        return self._rows

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Return the key of each text; texts that are equal have equal keys."""
        return np.concatenate([store.keys for store in self._stores])[self._rows] if self._stores else np.empty(0, "u8")

    @property
    def sizes(self) -> Index:
        """Return the bytes of each text in UTF-8."""
        return np.concatenate([np.diff(store.starts) for store in self._stores])[self._rows]

    @property
    def place(self) -> Path | None:
        """Return a directory for what is made of these texts and may be as large; None: memory will do."""
        return next((store.place for store in self._stores if store.place), None)

    def take(self, index: Index) -> Texts:
        """Return the texts at `index`, in that order."""
        return Texts(self._stores, self._rows[index])

    def _read(self, rows: Index) -> Iterator[str]:
        which = np.searchsorted(self._bounds, rows, "right") - 1
        local = rows - self._bounds[which]
        for store, row in zip(which.tolist(), local.tolist(), strict=True):
            found = self._stores[store]
            yield decoded(found.content[found.starts[row] : found.starts[row + 1]].tobytes())


class StoreWriter:
    """Writes texts one after the other; sixteen bytes of each stay in memory."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._starts = array("q", [0])
        self._keys = bytearray()

    def add(self, text: str) -> None:
        """Append a text."""
        raw = encoded(text)
        self._write(raw)
        self._starts.append(self._starts[-1] + len(raw))
        self._keys += _key(raw)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def starts(self) -> Index:
        """Return where each text begins, and where the last one ends."""
        return np.array(self._starts, np.int64)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Return the key of each text."""
        return np.frombuffer(bytes(self._keys), "<u8").astype(np.uint64)


def encoded(text: str) -> bytes:
    """Return a text in UTF-8; a lone surrogate, which has none, as three bytes that `decoded` reads back."""
    return text.encode("utf-8", "surrogatepass")


def decoded(raw: bytes) -> str:
    """Undo `encoded`."""
    return raw.decode("utf-8", "surrogatepass")


def text_key(text: str) -> int:
    """Return the key of a text."""
    return int.from_bytes(_key(encoded(text)), "little")


def numbered(keys: NDArray[np.uint64]) -> tuple[Index, Index]:
    """Number the different keys in the order in which they come; return each row's number, each number's first row."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return number[inverse], first[order]


def _key(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=8).digest()
