"""Encoded texts: the ids of many texts in one array, from which batches are cut without a Python loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millpond.text import TextEncoder


@dataclass(frozen=True)
class Encoded:
    """Ids of text i are `ids[starts[i]:starts[i + 1]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, encoder: TextEncoder, texts: Sequence[str]) -> Encoded:
        """Encode texts."""
        ids, starts = encoder.encode_flat(texts)
        return cls(ids.astype(np.int32), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of ids of each text."""
        return np.diff(self.starts)

    def take(self, index: NDArray[np.int64]) -> Encoded:
        """Return the texts at `index`, in that order."""
        lengths = self.lengths[index]
        starts = np.zeros(len(index) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        gather = np.arange(starts[-1]) + np.repeat(self.starts[index] - starts[:-1], lengths)
        return Encoded(self.ids[gather], starts)

    def with_rows(self) -> NDArray[np.int32]:
        """Return [2, ids]: each id's text number within this set, and the id."""
        rows = np.repeat(np.arange(len(self), dtype=np.int32), self.lengths)
        return np.stack([rows, self.ids])

    def padded(self) -> NDArray[np.int32]:
        """Return [texts, longest], filled up with 0 on the right."""
        matrix = np.zeros((len(self), int(self.lengths.max(initial=1))), np.int32)
        matrix[np.arange(matrix.shape[1]) < self.lengths[:, None]] = self.ids
        return matrix
