"""Near-duplicates: texts that share most of their three-word phrases, found by MinHash in about linear time.

Broder, "On the resemblance and containment of documents", 1997; candidates by banding (Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3). Similarities are estimates, with a standard error of at most 0.05.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from millpond.learn.datasets import DataError
from millpond.learn.texts import Texts

PHRASE_WORDS = 3
BANDS, BAND_ROWS = 20, 6
"""A pair of similarity 0.8 shares a band with probability 0.998, one of 0.4 with 0.08."""
SIMILAR = 0.8
MOST_TEXTS = 200_000
"""Texts compared, at most; of more, a sample."""
MOST_WORDS = 5000
"""Words of a text that are read."""
BLOCK = 1000


class NearPair(msgspec.Struct, frozen=True):
    """Two texts, by their rows, and the estimated share of their phrases that they have in common."""

    one: int
    two: int
    similarity: float


def near_duplicates(
    texts: Texts, rows: NDArray[np.int64], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[NearPair]:
    """Return pairs among the different texts at `rows` with a similarity of at least `SIMILAR`, the nearest first.

    Of many texts that are alike, each is paired with one or a few of the others, not with all of them.

    Raises:
        DataError: the package rensa is not here.
    """
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise DataError(
            "near-duplicates need the package rensa, which is not here: pip install 'millpond[data]'"
        ) from error
    digest = np.empty((len(rows), BANDS * BAND_ROWS), np.uint32)
    for start in range(0, len(rows), BLOCK):
        phrases = [_phrases(text) for text in texts.take(rows[start : start + BLOCK])]
        digest[start : start + BLOCK] = RMinHash.digests_from_token_sets(phrases, num_perm=digest.shape[1], seed=1)
        on_progress(min(start + BLOCK, len(rows)), len(rows))
    pairs = _candidates(digest)
    similarity = np.concatenate(
        [np.empty(0), *((digest[one] == digest[two]).mean(1) for one, two in _blocks(pairs, 100_000))]
    )
    order = np.argsort(-similarity, kind="stable")
    order = order[similarity[order] >= SIMILAR]
    return [
        NearPair(int(rows[pairs[0, i]]), int(rows[pairs[1, i]]), round(float(similarity[i]), 3)) for i in order.tolist()
    ]


def _phrases(text: str) -> list[str]:
    words = text.lower().split(maxsplit=MOST_WORDS)[:MOST_WORDS]
    return [" ".join(words[i : i + PHRASE_WORDS]) for i in range(max(1, len(words) - PHRASE_WORDS + 1))]


def _candidates(digest: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return [2, pairs]: rows that are next to each other in the order of some band and agree in all of it."""
    factors = np.random.default_rng(0).integers(1, 2**63, BAND_ROWS, np.uint64) | np.uint64(1)
    found = [np.empty((2, 0), np.int64)]
    for band in range(BANDS):
        value = (digest[:, band * BAND_ROWS : (band + 1) * BAND_ROWS].astype(np.uint64) * factors).sum(1)
        order = np.argsort(value, kind="stable")
        at = np.flatnonzero(value[order][1:] == value[order][:-1])
        found.append(np.stack([order[at], order[at + 1]]))  # stable: the smaller row first
    return np.unique(np.concatenate(found, 1), axis=1)


def _blocks(pairs: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [pairs[:, start : start + size] for start in range(0, pairs.shape[1], size)]
