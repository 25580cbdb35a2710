"""Bytes that nobody means well by: the decoder gives a message or a WireError, never anything else."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.pool import wire
from millpond.pool.errors import WireError

DIRECTIONS = get_args(wire.Direction)
WORDS = [item.__struct_config__.tag for item in get_args(wire.Item)] + ["batch", "type", "items", "t", "s", "v", "n"]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text() | st.sampled_from(WORDS), inner, max_size=6),
    max_leaves=15,
)  # fmt: skip


def decodes_or_refuses(data: bytes) -> None:
    for direction in DIRECTIONS:
        try:
            message = wire.decode(data, direction)
        except WireError:
            continue
        assert wire.decode(wire.encode(message)[wire.PREFIX.size :], direction) == message or "nan" in repr(message)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes(data):
    decodes_or_refuses(data)


@settings(max_examples=80, deadline=None)
@given(values)
def test_any_values(value):
    decodes_or_refuses(msgspec.msgpack.encode(value))
    decodes_or_refuses(msgspec.msgpack.encode({"type": "batch", "items": [value]}))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(WORDS), st.lists(values, max_size=6))
def test_any_item_of_a_batch(word, fields):
    decodes_or_refuses(msgspec.msgpack.encode({"type": "batch", "items": [[word, *fields]]}))


@given(st.binary(min_size=12, max_size=12))
def test_lengths_beyond_the_limits_are_refused_before_anything_is_allocated(prefix):
    header, payload = wire.PREFIX.unpack(prefix)
    for greeted, most, most_payload in (
        (True, wire.MAX_HEADER_BYTES, wire.MAX_PAYLOAD_BYTES),
        (False, wire.MAX_GREETING_BYTES, 0),
    ):
        if 0 < header <= most and payload <= most_payload:
            assert wire.measure(prefix, greeted=greeted) == (header, payload)
        else:
            with pytest.raises(WireError):
                wire.measure(prefix, greeted=greeted)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        pickle.dumps(print),
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",  # a list that says it has 4 billion elements
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode({"type": "hello", "protocol": 1, "torch": "2", "nonce": b"", "proof": b"x" * 32}),
    ],
)
def test_known_bad_bytes(direction, data):
    with pytest.raises(WireError):
        wire.decode(data, direction)


LONG = {"list": b"\xdd\xff\xff\xff\xff", "map": b"\xdf\xff\xff\xff\xff", "bytes": b"\xc6\xff\xff\xff\xff"}
PLACES = {
    "the message": b"",
    "a field": b"\x82\xa4type\xa5batch\xa5items",
    "a field that nobody knows": b"\x82\xa4type\xa5batch\xa5other",
    "an item": b"\x82\xa4type\xa5batch\xa5items\x91\x92\xa4free",
    "a list of the most items that may be": b"\x82\xa4type\xa5batch\xa5items\xdd\x00\x01\x00\x00\x92\xa4free",
    "sizes": b"\x82\xa4type\xa5batch\xa5items\x91\x95\xa3put\x00\xa5uint8",
}


@pytest.mark.parametrize("promised", LONG)
@pytest.mark.parametrize("place", PLACES)
def test_a_length_that_the_bytes_do_not_bear_out_takes_no_memory(place, promised):
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            wire.decode(PLACES[place] + LONG[promised], "to-worker")
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()
