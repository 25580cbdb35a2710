"""Hostile callers of the broker: it stays, its memory too, and the lease of a good client is untouched."""

import contextlib
import pickle
import random
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from millpond.pool import handshake, wire
from millpond.pool.broker import MAX_CLIENTS
from millpond.pool.errors import AuthenticationError, ConnectionLost, PoolError
from millpond.pool.lease import Lease, connect
from millpond.settings import PoolSettings, load
from pool_site import DEADLINE_S, TOKEN, BrokerProcess, frame, greet, is_hung_up, read_message, wait_for

FLAT_BYTES = 16 * 2**20
"""An attack may make the broker larger by no more than this, however long it lasts."""
WAIT = wire.Acquire("eve", wait_s=1e6)


@pytest.fixture(scope="module")
def broker(tmp_path_factory) -> Iterator[BrokerProcess]:
    started = BrokerProcess(tmp_path_factory.mktemp("pool") / "pool", "serves:8", MILLPOND_POOL_GRACE_S="60")
    with started.acquire("eve's accomplice"):  # caches and lazy imports are not growth
        started.status()
    started.wait_ended(started.status().leases[0].lease)
    yield started
    started.close()


@pytest.fixture(autouse=True)
def unharmed(broker) -> Iterator[Lease]:
    """Hold a lease during the attack; check that it stands and that the broker has not grown."""
    process = psutil.Process(broker.process.pid)
    with broker.acquire("ann", wait_s=DEADLINE_S) as lease:
        before = process.memory_info().rss
        yield lease
        assert lease.keep() == ""
        assert broker.lease_status(lease.granted.lease).state == "active"
        assert process.memory_info().rss - before < FLAT_BYTES
    assert "Traceback" not in broker.log.read_text()


class Payload:
    def __reduce__(self):
        return (print, ("unpickled!",))


GARBAGE = {
    "text": b"GET / HTTP/1.1\r\nHost: pool\r\n\r\n",
    "zero length": wire.PREFIX.pack(0, 0),
    "4 GiB message": wire.PREFIX.pack(2**32 - 1, 0),
    "a huge payload": wire.PREFIX.pack(10, 2**63),
    "a small payload": wire.PREFIX.pack(10, 1),
    "just over the limit": wire.PREFIX.pack(wire.MAX_GREETING_BYTES + 1, 0) + bytes(wire.MAX_GREETING_BYTES + 1),
    "a bare pickle": pickle.dumps(Payload()),
    "a framed pickle": frame(pickle.dumps(Payload())),
    "a pickle in a message": frame(msgspec.msgpack.encode({"type": "acquire", "owner": pickle.dumps(Payload())})),
    "no tag": frame(msgspec.msgpack.encode({"owner": "eve"})),
    "an unknown tag": frame(msgspec.msgpack.encode({"type": "exec", "code": "import os"})),
    "deep nesting": frame(b"\x91" * 4000),
    "an array that claims 4 G items": frame(b"\xdd\xff\xff\xff\xff"),
    "a worker's message": wire.encode(wire.Batch([wire.Synchronize()])),
    "a broker's message": wire.encode(wire.Granted("lease-1", [])),
    "a wrong type": frame(msgspec.msgpack.encode({"type": "acquire", "owner": "eve", "devices": "all"})),
    "no devices": frame(msgspec.msgpack.encode({"type": "acquire", "owner": "eve", "devices": 0})),
    "negative memory": frame(msgspec.msgpack.encode({"type": "acquire", "owner": "eve", "memory_bytes": -1})),
    "an endless wait": frame(msgspec.msgpack.encode({"type": "acquire", "owner": "eve", "wait_s": float("nan")})),
    "a long owner": frame(msgspec.msgpack.encode({"type": "acquire", "owner": "e" * 129})),
    "not UTF-8": frame(b"\x82\xa4type\xa7acquire\xa5owner\xa2\xff\xfe"),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("greeted", [False, True], ids=["stranger", "client"])
def test_garbage_ends_the_connection_and_nothing_else(broker, garbage, greeted):
    with greet(broker) if greeted else broker.raw() as sock:
        with contextlib.suppress(OSError):
            sock.sendall(garbage)
        assert is_hung_up(sock)


def test_random_bytes_by_the_thousand(broker):
    draw = random.Random(3)
    for round in range(300):
        with greet(broker) if round % 3 else broker.raw() as sock, contextlib.suppress(OSError):
            header = bytearray(wire.encode(WAIT)[wire.PREFIX.size :])
            for _ in range(draw.randint(1, 8)):
                header[draw.randrange(len(header))] = draw.randrange(256)
            sock.sendall(frame(bytes(header)))
    wait_for(lambda: [lease.state for lease in broker.status().leases].count("pending") == 0)


@pytest.mark.parametrize(
    "messages",
    [
        [wire.Release()],
        [WAIT, WAIT],
        [WAIT, wire.Release(), WAIT],
        [wire.Hello(wire.PROTOCOL, "2.13", bytes(32), bytes(32))],
        [wire.Heartbeat(), wire.GetStatus(), wire.Release()],
    ],
)
def test_messages_out_of_order_end_the_connection_and_the_lease(broker, messages):
    with greet(broker) as sock:
        for message in messages:
            sock.sendall(wire.encode(message))
        assert is_hung_up(sock)
    assert not [lease for lease in broker.status().leases if lease.state == "pending"]


def test_messages_before_the_greeting_are_not_heeded(broker):
    with broker.raw() as sock:
        sock.sendall(wire.encode(wire.GetStatus()) + wire.encode(WAIT))
        assert is_hung_up(sock)
    assert "eve" not in {lease.owner for lease in broker.status().leases if lease.state == "pending"}


def test_hundreds_of_wrong_tokens(broker):
    settings = load(PoolSettings, {**broker.environ, "MILLPOND_POOL_TOKEN": "guess"})
    for _ in range(200):
        with pytest.raises(AuthenticationError):
            connect(settings, "eve")
    assert "guess" not in broker.log.read_text()


def test_a_recorded_greeting_is_worth_nothing(broker):
    with broker.raw() as sock:
        hello = handshake.answer(read_message(sock), TOKEN, "2.13")
        sock.sendall(wire.encode(hello))
        assert isinstance(read_message(sock), wire.Welcome)
    with broker.raw() as sock:
        read_message(sock)
        sock.sendall(wire.encode(hello))
        refused = read_message(sock)
        assert isinstance(refused, wire.Refused)
        assert refused.code == "token"


def test_hundreds_of_half_open_connections_keep_nobody_out(broker):
    with contextlib.ExitStack() as stack:
        half_open = [stack.enter_context(broker.raw()) for _ in range(300)]
        for sock in half_open[::2]:
            with contextlib.suppress(OSError):
                sock.sendall(b"\0\0")
        started = time.monotonic()
        broker.status()
        assert time.monotonic() - started < 5
        assert sum(is_hung_up(sock) for sock in half_open[:200]) == 200


def test_clients_beyond_the_limit_are_told_so_and_places_come_back(broker):
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CLIENTS - 1):  # one is ann
            stack.enter_context(greet(broker))
        with greet(broker) as sock:
            refused = read_message(sock)
            assert isinstance(refused, wire.Refused)
            assert refused.code == "busy"
    wait_for(lambda: can_ask(broker))


def can_ask(broker: BrokerProcess) -> bool:
    try:
        return bool(broker.status())
    except (PoolError, ConnectionLost):
        return False


def test_a_client_that_asks_and_never_reads_is_not_buffered_for_ever(broker):
    with greet(broker) as sock:
        sock.settimeout(1)
        question = wire.encode(wire.GetStatus()) * 1000
        with contextlib.suppress(OSError):
            for _ in range(2000):
                sock.sendall(question)
        broker.status()
