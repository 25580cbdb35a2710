"""Encoded texts: the ids of many texts in one array, from which batches are cut without a Python loop.

The array lies in memory, or in a mapped file without a name where the texts themselves lie on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millpond.learn.texts import Texts
from millpond.text import TextEncoder

BLOCK_CHARACTERS = 4 * 1024 * 1024
"""Characters of text that are encoded before their ids are put away: a few thousand texts, or one that is very long."""
PART_IDS = 2**24
"""Ids that are counted at once."""


@dataclass(frozen=True)
class Encoded:
    """Ids of text i are `ids[starts[i]:starts[i + 1]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, encoder: TextEncoder, texts: Sequence[str]) -> Encoded:
        """Encode texts; the ids lie where the texts do, in memory or on disk."""
        lengths: list[NDArray[np.int64]] = []

        def blocks() -> Iterator[NDArray[np.int32]]:
            for block in _blocks(texts):
                ids, starts = encoder.encode_flat(block)
                lengths.append(np.diff(starts))
                yield ids.astype(np.int32)

        place = texts.place if isinstance(texts, Texts) else None
        ids = _mapped(blocks(), place) if place else np.concatenate([np.empty(0, np.int32), *blocks()])
        return cls(ids, _starts(np.concatenate([np.empty(0, np.int64), *lengths])))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of ids of each text."""
        return np.diff(self.starts)

    def take(self, index: NDArray[np.int64]) -> Encoded:
        """Return the texts at `index`, in that order."""
        lengths = self.starts[index + 1] - self.starts[index]
        starts = _starts(lengths)
        gather = np.arange(starts[-1]) + np.repeat(self.starts[index] - starts[:-1], lengths)
        return Encoded(self.ids[gather], starts)

    def parts(self) -> Iterator[tuple[slice, Encoded]]:
        """Yield all texts, so many at a time that counting their ids needs little memory, and which they are."""
        start = 0
        while start < len(self):
            end = int(np.searchsorted(self.starts, self.starts[start] + PART_IDS, "right")) - 1
            end = max(end, start + 1)
            first, last = self.starts[start], self.starts[end]
            yield slice(start, end), Encoded(self.ids[first:last], self.starts[start : end + 1] - first)
            start = end

    def with_rows(self) -> NDArray[np.int32]:
        """Return [2, ids]: each id's text number within this set, and the id."""
        rows = np.repeat(np.arange(len(self), dtype=np.int32), self.lengths)
        return np.stack([rows, self.ids])

    def padded(self) -> NDArray[np.int32]:
        """Return [texts, longest], filled up with 0 on the right."""
        matrix = np.zeros((len(self), int(self.lengths.max(initial=1))), np.int32)
        matrix[np.arange(matrix.shape[1]) < self.lengths[:, None]] = self.ids
        return matrix


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _mapped(blocks: Iterable[NDArray[np.int32]], place: Path) -> NDArray[np.int32]:
    """Return the blocks as one array, mapped from a file that is gone when the array is."""
    with tempfile.TemporaryFile(dir=place) as file:
        for block in blocks:
            file.write(block.tobytes())
        file.flush()
        return np.asarray(np.memmap(file, np.int32, "r")) if file.tell() else np.empty(0, np.int32)
