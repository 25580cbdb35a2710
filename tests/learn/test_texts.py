"""Texts over arrays: a sequence of strings whose rows are taken, sliced and added without copying a text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.learn.texts import Texts, numbered, text_key

ODD = ["", "a", "naïve 🙂", "\ud800 lone", "nul \x00", "\u202eright to left", "x" * 100_000]


def test_every_text_comes_back_as_it_was() -> None:
    texts = Texts.of(ODD)
    assert list(texts) == ODD
    assert [texts[i] for i in range(len(texts))] == ODD
    assert texts[-1] == ODD[-1]
    assert texts[np.int64(2)] == "naïve 🙂"
    with pytest.raises(IndexError):
        texts[len(ODD)]


@given(st.lists(st.text()), st.lists(st.text()), st.data())
def test_it_behaves_as_a_list_does(one: list[str], two: list[str], data: st.DataObject) -> None:
    both = Texts.of(one) + Texts.of(two)
    assert both == one + two
    assert both[1::2] == (one + two)[1::2]
    index = data.draw(st.lists(st.integers(0, len(both) - 1), max_size=8)) if len(both) else []
    taken = both.take(np.array(index, np.int64))
    assert taken == [(one + two)[i] for i in index]
    assert (taken + one) == [*taken, *one]
    assert all(text in both for text in one)
    assert [int(key) for key in both.keys] == [text_key(text) for text in one + two]
    assert [len(text.encode("utf-8", "surrogatepass")) for text in both] == both.sizes.tolist()


def test_texts_are_numbered_in_the_order_in_which_they_come() -> None:
    number, first = numbered(Texts.of(["b", "a", "b", "c", "a"]).keys)
    assert number.tolist() == [0, 1, 0, 2, 1]
    assert first.tolist() == [0, 1, 3]
