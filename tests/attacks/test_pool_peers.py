"""Hostile peers and hostile copies: nothing gets in, nothing dies, no memory is held, good copies go on."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from millpond.pool import transport, wire
from millpond.pool.arrivals import MAX_ARRIVALS
from millpond.pool.errors import AuthenticationError, ConnectionLost
from millpond.pool.executor import Memory
from millpond.pool.peers import CHUNK_BYTES, PeerExecutor
from pool_site import wait_for
from worker_site import GIB, PEER_TOKEN, TOKEN, Workers

FLAT_BYTES = 48 * 2**20
EIGHT = wire.Geometry("uint8", (8,), (1,))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    started = Workers(log=tmp_path_factory.mktemp("workers") / "worker")
    copies(started)
    yield started
    started.close()


@pytest.fixture(autouse=True)
def unharmed(workers: Workers) -> Iterator[None]:
    """Copy before and after the attack; it must leave no memory behind."""
    processes = [psutil.Process(worker.process.pid) for worker in workers.each]
    before = [process.memory_info().rss for process in processes]
    yield
    copies(workers)
    for worker, process, size in zip(workers.each, processes, before, strict=True):
        assert process.memory_info().rss - size < FLAT_BYTES
        assert "Traceback" not in worker.log.read_text()


def copies(workers: Workers) -> None:
    """Send a tensor of the bytes 0 to 7 from worker 0 to worker 1."""
    ticket = secrets.token_bytes(16)
    with workers.each[0].connect() as one, workers.each[1].connect() as other:
        one.send(wire.Batch([wire.Put(1, "uint8", (8,), bytes(range(8))), wire.Send(1, 1, ticket)]))
        other.send(wire.Batch([wire.Receive(5, 0, ticket, EIGHT), wire.Read(5, 0, 8)]))
        message, payload = other.receive(20)
        assert (message, bytes(payload)) == (wire.Data(), bytes(range(8)))


def peer(workers: Workers, token: str = PEER_TOKEN) -> transport.Connection:
    """Begin to deliver to worker 1 as another worker of the lease does."""
    connection = dial(workers, token)
    connection.send(wire.Attach(secrets.token_bytes(16), device=7))
    return connection


def dial(workers: Workers, token: str = PEER_TOKEN) -> transport.Connection:
    """Connect to worker 1 and greet, no more."""
    port = workers.each[1].first_report.peer_port
    return transport.connect("127.0.0.1", port, token, "2.13.0", sends="to-peer", receives="from-peer")[0]


def failed(connection: transport.Connection, *items: wire.Item) -> wire.Failed:
    connection.send(wire.Batch([*items, wire.Synchronize()]))
    message, _ = connection.receive(20)
    assert isinstance(message, wire.Failed), message
    assert isinstance(connection.receive(20)[0], wire.Done)
    return message


def used(workers: Workers) -> int:
    with workers.each[1].connect() as connection:
        connection.send(wire.Batch([wire.GetUsage()]))
        message, _ = connection.receive(20)
        assert isinstance(message, wire.Usage)
        return message.used_bytes


def is_hung_up(connection: transport.Connection) -> bool:
    try:
        while isinstance(connection.receive(20)[0], wire.Received):
            pass
    except ConnectionLost:
        return True
    return False


@pytest.mark.parametrize("token", [TOKEN, "", "guess"], ids=["the lease's", "none", "a guess"])
def test_only_the_workers_of_the_lease_know_the_token_of_peers(workers, token):
    with pytest.raises(AuthenticationError):
        peer(workers, token)


def test_a_client_has_no_way_to_name_an_address(workers):
    with workers.each[0].connect() as connection:
        for index in (0, 2, 7, 2**62):  # itself, and none
            connection.send(wire.Batch([wire.Put(1, "uint8", (8,), bytes(8))]))
            message = failed(connection, wire.Send(1, index, bytes(16)))
            assert (message.kind, message.message) == ("refused", f"device {index} is no other device of this lease")


def test_a_worker_of_one_device_refuses_both_ends_of_a_copy():
    executor = PeerExecutor(torch.device("cpu"), Memory(GIB), None)
    items = [wire.Put(1, "uint8", (8,), bytes(8)), wire.Send(1, 1, bytes(16)), wire.Receive(2, 1, bytes(16), EIGHT)]
    answers = [answer for answer, _ in executor.run(wire.Batch(items), memoryview(b""))]
    assert [(answer.item, answer.kind) for answer in answers] == [(1, "refused"), (2, "refused")]
    executor.close()


def test_a_handle_of_another_session_cannot_be_sent(workers):
    with workers.each[0].connect() as good, workers.each[0].connect() as eve:
        good.send(wire.Batch([wire.Put(1, "uint8", (8,), bytes(8)), wire.Synchronize()]))
        good.receive(20)
        assert failed(eve, wire.Send(1, 1, bytes(16))).kind == "refused"
        with workers.each[1].connect() as other:
            assert failed(other, wire.Receive(1, 0, bytes(16), EIGHT)).kind == "refused"


def test_a_ticket_is_good_once_and_a_guess_is_worth_nothing(workers):
    ticket = secrets.token_bytes(16)
    with workers.each[0].connect() as one, workers.each[1].connect() as other:
        one.send(wire.Batch([wire.Put(1, "uint8", (8,), bytes(8)), wire.Send(1, 1, ticket)]))
        other.send(wire.Batch([wire.Receive(5, 0, ticket, EIGHT), wire.Synchronize()]))
        assert isinstance(other.receive(20)[0], wire.Done)
        with workers.each[1].connect() as eve:
            eve.send(wire.Batch([wire.Receive(5, 0, ticket, EIGHT), wire.Synchronize()]))
            with pytest.raises(TimeoutError):
                eve.receive(0.5)
            one.send(wire.Batch([wire.Send(1, 1, ticket)]))  # so that nobody waits longer
            eve.receive(20)


@pytest.mark.parametrize(
    "geometry",
    [
        wire.Geometry("uint8", (9,), (1,)),
        wire.Geometry("float64", (8,), (1,)),
        wire.Geometry("uint8", (8,), (2**61,)),
        wire.Geometry("uint8", (2**62, 0), (1, 1)),
        wire.Geometry("uint8", (2**40,), (1,)),
    ],
)
def test_bytes_for_a_tensor_of_another_size_are_refused_and_freed(workers, geometry):
    ticket = secrets.token_bytes(16)
    with workers.each[0].connect() as one, workers.each[1].connect() as other:
        one.send(wire.Batch([wire.Put(1, "uint8", (8,), bytes(8)), wire.Send(1, 1, ticket)]))
        assert failed(other, wire.Receive(5, 0, ticket, geometry)).kind == "refused"
    wait_for(lambda: used(workers) == 0)


def test_sizes_that_no_tensor_has_end_the_session(workers):
    with workers.each[1].connect() as eve:
        eve.send(wire.Batch([wire.Receive(5, 0, bytes(16), wire.Geometry("uint8", (2**62, 2**62), (1, 1)))]))
        assert isinstance(eve.receive(20)[0], wire.Refused)


def test_a_delivery_larger_than_the_lease_takes_no_memory(workers):
    for total in (GIB + 1, 2**62):
        ticket = secrets.token_bytes(16)
        with peer(workers) as eve, workers.each[1].connect() as other:
            for place in range(3):
                eve.send(wire.Deliver(ticket, total, place * CHUNK_BYTES), bytes(CHUNK_BYTES))
            message = failed(other, wire.Receive(5, 0, ticket, EIGHT))
            assert message.kind == "memory"
            eve.send(wire.Deliver(ticket, total, 3 * CHUNK_BYTES), bytes(CHUNK_BYTES))
    assert used(workers) == 0


@pytest.mark.parametrize(
    ("messages", "payload"),
    [
        ([wire.Deliver(bytes(16), 100, 0), wire.Deliver(bytes(16), 100, 60)], 50),
        ([wire.Deliver(b"o" * 16, 100, 0), wire.Deliver(b"o" * 16, 100, 0)], 50),
        ([wire.Deliver(b"s" * 16, 100, 0), wire.Deliver(b"s" * 16, 2**40, 50)], 50),
        ([wire.Deliver(b"m" * 16, 10, 0)], 50),
        ([wire.Deliver(b"l" * 16, 2**26, 0)], CHUNK_BYTES + 1),
        ([wire.Withhold(b"w" * 16, "runtime", "no")], 50),
    ],
    ids=["a gap", "twice the same", "another size", "more than announced", "a long frame", "a payload of a word"],
)
def test_parts_that_do_not_fit_end_the_peer_and_free_what_came(workers, messages, payload):
    with peer(workers) as eve:
        with contextlib.suppress(ConnectionLost):  # it may have hung up on us already
            for message in messages:
                eve.send(message, bytes(payload))
        assert is_hung_up(eve)
    wait_for(lambda: used(workers) == 0)


@pytest.mark.slow  # it may come back, for three seconds
def test_a_peer_that_ends_within_a_delivery_frees_it_and_who_waits_is_told(workers):
    ticket = secrets.token_bytes(16)
    with workers.each[1].connect() as other:
        with peer(workers) as eve:
            eve.send(wire.Deliver(ticket, 2**20, 0), bytes(100))
            wait_for(lambda: used(workers) == 2**20)
        message = failed(other, wire.Receive(5, 0, ticket, EIGHT))
    assert "the connection broke on the way from the other device" in message.message
    assert used(workers) == 0


def test_deliveries_that_nobody_wants_are_bounded(workers):
    with peer(workers) as eve:
        for _ in range(MAX_ARRIVALS + 1):
            try:
                eve.send(wire.Deliver(secrets.token_bytes(16), 2, 0), b"1")
            except ConnectionLost:
                break
        assert is_hung_up(eve)
    wait_for(lambda: used(workers) == 0)


def test_messages_of_other_directions_end_the_peer(workers):
    for message in (wire.Batch([wire.Synchronize()]), wire.Acquire("eve"), wire.Done(), wire.Attach(bytes(16))):
        with peer(workers) as eve:
            eve.send(message)
            assert is_hung_up(eve)


def test_a_peer_that_does_not_attach_first_is_hung_up_on_and_costs_nothing(workers):
    for message, payload in ((wire.Deliver(bytes(16), 2**26, 0), wire.MAX_PAYLOAD_BYTES), (wire.Attach(bytes(16)), 9)):
        with dial(workers) as eve:
            with contextlib.suppress(ConnectionLost):
                eve.send(message, bytes(payload))
            assert is_hung_up(eve)
    assert used(workers) == 0


def test_deliveries_are_gone_on_with_only_by_who_knows_what_they_are_called(workers):
    with peer(workers), dial(workers) as eve:
        eve.send(wire.Attach(secrets.token_bytes(16), resumes=True, device=0))
        refused, _ = eve.receive(20)
        assert isinstance(refused, wire.Refused)
        assert is_hung_up(eve)


def test_a_receive_that_waits_holds_up_nobody_else(workers):
    with workers.each[1].connect() as waiting:
        waiting.send(wire.Batch([wire.Receive(5, 0, secrets.token_bytes(16), EIGHT)]))
        started = time.monotonic()
        copies(workers)
        assert time.monotonic() - started < 10
