"""The order of an epoch: every text once, the same for a seed, and little padding where lengths are bucketed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from millpond.learn.order import BUCKET_BATCHES, epochs, padding_share

LENGTHS = np.random.default_rng(5).geometric(0.01, 5000)


@pytest.mark.parametrize("by_length", [False, True])
def test_an_epoch_has_every_text_once_and_each_epoch_its_own_order(by_length: bool) -> None:
    first, second = islice(epochs(LENGTHS, 64, 0, by_length=by_length), 2)
    for batches in (first, second):
        assert sorted(np.concatenate(batches).tolist()) == list(range(5000))
        assert sorted(map(len, batches)) == [5000 % 64] + [64] * (5000 // 64)
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


@pytest.mark.parametrize("by_length", [False, True])
def test_the_order_follows_from_the_seed(by_length: bool) -> None:
    orders = [
        [np.concatenate(batches).tolist() for batches in islice(epochs(LENGTHS, 64, seed, by_length=by_length), 3)]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_texts_of_like_length_share_a_batch_and_hardly_anything_is_padding() -> None:
    mixed = padding_share(LENGTHS, next(epochs(LENGTHS, 64, 0, by_length=False)))
    bucketed = padding_share(LENGTHS, next(epochs(LENGTHS, 64, 0, by_length=True)))
    assert mixed > 0.6
    assert bucketed < 0.15


def test_bucketed_batches_come_in_no_order_of_length() -> None:
    batches = next(epochs(LENGTHS, 16, 0, by_length=True))
    longest = [int(LENGTHS[batch].max()) for batch in batches[:BUCKET_BATCHES]]
    assert longest != sorted(longest)


def test_padding_is_counted_as_by_hand() -> None:
    lengths = np.array([1, 3, 4, 4])
    assert padding_share(lengths, [np.array([0, 1]), np.array([2, 3])]) == pytest.approx(2 / 14)
    assert padding_share(lengths[:0], []) == 0.0
