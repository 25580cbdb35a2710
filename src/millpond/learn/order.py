"""In which batches an epoch goes through its texts: seeded, repeatable, and by length where padding would cost.

A batch is as wide as its longest text. Texts of like length in one batch leave little to fill up; the batches come in
random order, and each is cut from a random draw, so that no epoch repeats another's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BUCKET_BATCHES = 32
"""Batches whose texts are sorted together: the draw stays random beyond that, and padding hardly shrinks further."""
WIDTHS = 8
"""Widths of batches, where each further one costs a recording of the step."""


def epochs(
    lengths: NDArray[np.int64], batch_size: int, seed: int, *, by_length: bool
) -> Iterator[list[NDArray[np.int64]]]:
    """Yield for each epoch its batches, each the row numbers of its texts, without end.

    The n-th epoch depends on the arguments alone, so a training that goes on skips to its epoch.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(lengths))
        if by_length:
            span = BUCKET_BATCHES * batch_size
            spans = (order[start : start + span] for start in range(0, len(order), span))
            order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in spans])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        if by_length:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        yield batches


def width_unit(lengths: NDArray[np.int64], batch_size: int, *, pads_texts: bool) -> int:
    """Return of what the widths of batches are to be multiples, so that there are about `WIDTHS` of them."""
    if pads_texts:
        return max(1, math.ceil(int(lengths.max(initial=1)) / WIDTHS))
    # All ids of a batch in one row: of many texts their number varies little, and hardly one batch has more than this.
    most = batch_size * float(lengths.mean()) + 3 * math.sqrt(batch_size) * float(lengths.std())
    return max(1, math.ceil(most / WIDTHS))


def widened(batch: NDArray[np.int32], unit: int) -> NDArray[np.int32]:
    """Return a batch with its last axis filled up with 0 to a multiple of `unit`: padding, or id 0 of text 0."""
    missing = -batch.shape[1] % unit
    return np.pad(batch, ((0, 0), (0, missing))) if missing else batch


def padding_share(lengths: NDArray[np.int64], batches: list[NDArray[np.int64]], unit: int = 1) -> float:
    """Return which share of the batches is padding, if each is as wide as its longest text, or the next `unit`."""
    total = sum(len(batch) * math.ceil(int(lengths[batch].max()) / unit) * unit for batch in batches)
    return 1 - int(lengths.sum()) / total if total else 0.0


def batches_of_like_length(
    lengths: NDArray[np.int64], order: NDArray[np.int64], max_ids: int
) -> list[NDArray[np.int64]]:
    """Cut `order` (by rising length) into batches of at most `max_ids` ids, padding included; a text is never cut."""
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > max_ids:
            batches.append(order[start:end])
            start = end
    return batches
