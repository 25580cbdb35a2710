"""A link over real sockets: whatever breaks in between, messages arrive in order, each once."""

from __future__ import annotations

import contextlib
import random
import secrets
import socket
import threading
from collections.abc import Iterator

import pytest

from millpond.pool import link, transport, wire
from millpond.pool.errors import ConnectionLost, PeerSilent, WireError
from millpond.pool.link import Berth, Dialler, Link
from pool_site import wait_for

SESSION = secrets.token_bytes(16)


class Worker:
    """A worker's end that echoes: a batch of seeds comes back as data whose bytes are the seed's."""

    def __init__(self, *, grace_s: float = 20.0) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.berth = Berth(grace_s)
        self.link: Link | None = None
        self.connections: list[transport.Connection] = []
        self.heard: list[int] = []
        self.error: Exception | None = None
        self.running = threading.Thread(target=self._accept, daemon=True)
        self.echoing = threading.Thread(target=self._echo, daemon=True)
        self.running.start()

    def dial(self) -> transport.Connection:
        try:
            sock = socket.create_connection(self.address)
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        return transport.Connection(sock, sends="to-worker", receives="from-worker")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                connection = transport.Connection(sock, sends="from-worker", receives="to-worker")
                self.connections.append(connection)
                try:
                    attach, _ = connection.receive(5)
                except (ConnectionLost, TimeoutError):
                    connection.close()
                    continue
                assert isinstance(attach, wire.Attach)
                if self.link is None:
                    self.link = Link(connection, self.berth)
                    self.echoing.start()
                else:
                    self.link.close()
                    self.berth.come_back(connection, attach.received)

    def _echo(self) -> None:
        assert self.link is not None
        try:
            while True:
                message, payload = self.link.receive()
                assert isinstance(message, wire.Batch)
                for item in message.items:
                    assert isinstance(item, wire.Seed)
                    self.heard.append(int(item.seed.text))
                    self.link.send(wire.Data(), memoryview(item.seed.text.encode() + bytes(payload)))
        except (ConnectionLost, WireError) as error:
            self.error = error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.close()


def client(worker: Worker, *, grace_s: float = 20.0, why_ended: str = "") -> Link:
    connection = worker.dial()
    connection.send(wire.Attach(SESSION))
    return Link(connection, Dialler(worker.dial, wire.Attach(SESSION), grace_s, why_ended=lambda: why_ended))


def seed(number: int) -> wire.Batch:
    return wire.Batch([wire.Seed(wire.BigInt(str(number)))])


def test_messages_arrive_in_order_each_once_however_often_the_connection_breaks(worker):
    chance = random.Random(7)
    ours = client(worker)
    answers = []
    for number in range(400):
        ours.send(seed(number), memoryview(chance.randbytes(chance.choice([0, 10, 200_000]))))
        if chance.random() < 0.1:
            with contextlib.suppress(OSError):  # as the network does: a descriptor stays its owner's to close
                chance.choice([ours.connection, *worker.connections[-1:]]).socket.shutdown(socket.SHUT_RDWR)
        while ours.has_input():
            if taken := ours.take():
                answers.append(taken[1])
    while len(answers) < 400:
        answers.append(ours.receive()[1])
    ours.close()
    assert worker.heard == list(range(400))
    assert all(bytes(answer).startswith(str(number).encode()) for number, answer in enumerate(answers))


def test_what_was_sent_is_kept_only_until_the_worker_has_it(worker):
    ours = client(worker)
    for number in range(10):
        ours.send(seed(number), memoryview(bytes(100_000)))
    ours.settle()
    assert ours._kept_bytes == 0
    assert [len(ours.receive()[1]) for _ in range(10)] == [100_001] * 10
    ours.close()


def test_a_sender_waits_once_too_much_is_unacknowledged(worker, monkeypatch):
    monkeypatch.setattr(link, "MAX_KEPT_BYTES", 250_000)
    ours = client(worker)
    for number in range(50):
        ours.send(seed(number), memoryview(bytes(100_000)))
        assert ours._kept_bytes <= 250_000
    ours.close()


def test_a_worker_that_is_gone_is_told_with_the_reason_that_the_launcher_knows(worker):
    ours = client(worker, why_ended="worker 7 was ended by SIGKILL")
    ours.send(seed(1))
    ours.receive()
    worker.close()
    with pytest.raises(ConnectionLost, match="worker 7 was ended by SIGKILL"):
        ours.receive()


def test_a_worker_that_is_gone_is_given_up_soon(worker):
    ours = client(worker, grace_s=0.5)
    ours.send(seed(1))
    ours.receive()
    worker.close()
    with pytest.raises(ConnectionLost, match=r"closed the connection, and for \d s after that .*refused"):
        ours.receive()


def test_a_client_that_does_not_come_back_ends_the_session():
    worker = Worker(grace_s=0.2)
    ours = client(worker)
    ours.send(seed(1))
    ours.receive()
    ours.close()
    worker.echoing.join(10)
    assert "it has not come back within 0.2 s" in str(worker.error)
    worker.close()


def test_a_peer_that_asks_and_asks_and_never_says_what_it_has_is_hung_up_on(worker, monkeypatch):
    monkeypatch.setattr(link, "MAX_KEPT", 50)
    monkeypatch.setattr(link, "MAX_INBOX", 50)
    connection = worker.dial()
    connection.send(wire.Attach(SESSION))
    with contextlib.suppress(ConnectionLost):
        for number in range(200):
            connection.send(seed(number))
    wait_for(lambda: worker.error)
    assert "goes on sending, and does not say what it has" in str(worker.error)
    assert len(worker.heard) <= 51
    connection.close()


@pytest.mark.parametrize("claimed", [5, 2**40])
def test_a_peer_that_claims_to_have_what_was_never_sent_is_found_out(worker, claimed):
    ours = client(worker)
    ours.send(seed(1))
    ours.receive()
    worker.connections[0].send(wire.Received(claimed))
    with pytest.raises(WireError, match=f"says that it has {claimed} messages; 1 were sent"):
        ours.receive()
    ours.close()


def test_silence_is_told_from_an_end():
    assert transport.is_silence(TimeoutError())
    assert transport.is_silence(OSError(113, "No route to host"))
    assert not transport.is_silence(ConnectionResetError())
    assert issubclass(PeerSilent, ConnectionLost)
