"""Naive Bayes' log-count ratio: how much more often an id stands in the texts of one label than in the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from millpond.learn.encoded import Encoded


def log_count_ratio(
    data: Encoded, labels: NDArray[np.int64], shape: tuple[int, int], smoothing: float
) -> NDArray[np.float32]:
    """Return log p(id | label) / p(id | other labels) as `shape` = [ids, columns], 0 for an id that no text has.

    One column for two labels (that of label 1), else one for each label; `smoothing` is added to each count.
    Wang and Manning, "Baselines and Bigrams", ACL 2012.
    """
    rows, columns = shape

    def count(label: int | None) -> NDArray[np.int64]:
        counts_R = np.zeros(rows, np.int64)
        for texts, part in data.parts():
            chosen = slice(None) if label is None else np.repeat(labels[texts] == label, part.lengths)
            counts_R += np.bincount(part.ids[chosen], minlength=rows)
        return counts_R

    all_R = count(None)
    ratio_RK = np.empty((rows, columns), np.float32)
    for column in range(columns):
        inside_R = count(1 if columns == 1 else column)
        p_R, q_R = inside_R + smoothing, all_R - inside_R + smoothing
        ratio_RK[:, column] = np.log(p_R / p_R.sum()) - np.log(q_R / q_R.sum())
    ratio_RK[all_R == 0] = 0.0
    return ratio_RK
