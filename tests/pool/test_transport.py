"""Connections over real sockets, with TLS and without: whole messages, limits on every wait, and clear ends."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from certificates import Authority, settings
from millpond.pool import tls, transport, wire
from millpond.pool.errors import AuthenticationError, ConnectionLost, HandshakeError, WireError
from millpond.pool.stream import TlsStream
from millpond.pool.transport import Connection

TORCH = "2.13.0"


Security = tuple[tls.Caller, tls.Listener] | tuple[None, None]


@pytest.fixture(scope="module", params=["plain", "tls"])
def security(request, tmp_path_factory) -> Security:
    """How both ends secure a connection: each test runs once without TLS and once with it."""
    if request.param == "plain":
        return None, None
    files = Authority(tmp_path_factory.mktemp("certificates")).issue("pool", "127.0.0.1")
    caller, listener = tls.caller(settings(files)), tls.listener(files)
    assert caller is not None
    assert listener is not None
    return caller, listener


@pytest.fixture
def ends(security: Security) -> Iterator[tuple[Connection, Connection]]:
    """Two ends of a connection: a client's and a worker's."""
    calls, listens = security
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near_tls = far_tls = None
    if calls is not None and listens is not None:
        with ThreadPoolExecutor(1) as other:
            shaking = other.submit(listens.secure, far, 10)
            near_tls = calls.secure(near, "the worker", 10)
            far_tls = shaking.result()
    with (
        Connection(near, sends="to-worker", receives="from-worker", secured=near_tls) as client,
        Connection(far, sends="from-worker", receives="to-worker", secured=far_tls) as worker,
    ):
        yield client, worker


def test_messages_and_payloads_arrive_whole_and_in_order(ends):
    client, worker = ends
    payload = bytes(range(256)) * 40_000  # 10 MB: far more than the kernel takes at once
    batch = wire.Batch([wire.Write(1, 0)])
    sending = threading.Thread(target=lambda: (client.send(batch, payload), client.send(wire.Batch([]))))
    sending.start()
    assert worker.receive(10) == (batch, payload)
    assert worker.receive(10) == (wire.Batch([]), b"")
    sending.join()


def test_one_thread_sends_while_another_receives(ends):
    """Both ends at once, each far more than the kernel holds: who waited for the other would wait for ever."""
    payload = bytes(range(256)) * 40_000
    sending = [
        threading.Thread(target=lambda end=end, message=message: [end.send(message, payload) for _ in range(4)])
        for end, message in zip(ends, (wire.Batch([wire.Write(1, 0)]), wire.Data()), strict=True)
    ]
    received: list[bool] = []
    receiving = [
        threading.Thread(target=lambda end=end: received.extend(end.receive(30)[1] == payload for _ in range(4)))
        for end in ends
    ]
    for thread in [*sending, *receiving]:
        thread.start()
    for thread in [*sending, *receiving]:
        thread.join()
    assert received == [True] * 8


def test_what_came_together_is_seen_as_input_until_the_last_of_it(ends):
    client, worker = ends
    for _ in range(3):
        worker.send(wire.Done())
    for _ in range(3):
        assert client.has_input(10)
        assert client.receive(10)[0] == wire.Done()
    assert not client.has_input()


class Interrupting:
    """OpenSSL, with a Ctrl-C as soon as it has decrypted something."""

    def __init__(self, openssl: ssl.SSLObject) -> None:
        self._openssl = openssl

    def read(self, length: int, buffer: memoryview) -> int:
        count = self._openssl.read(length, buffer)
        signal.raise_signal(signal.SIGINT)
        return count


def test_an_interrupt_while_looking_for_input_loses_none_of_it(ends):
    """A program that catches Ctrl-C goes on with its session. (Without TLS looking takes nothing.)"""
    client, worker = ends
    worker.send(wire.Data(), b"whole")
    assert client.has_input(10)
    client.receive(10)
    worker.send(wire.Data(), b"whole")
    looking = client._stream
    if isinstance(looking, TlsStream):
        openssl = looking._secured.openssl
        looking._secured = replace(looking._secured, openssl=Interrupting(openssl))
        with pytest.raises(KeyboardInterrupt):
            client.has_input(10)
        looking._secured = replace(looking._secured, openssl=openssl)
    assert client.receive(10) == (wire.Data(), b"whole")


def test_a_message_is_input_only_when_something_of_it_is_there(ends):
    """A socket is also readable when only TLS's own messages, or half a record, have come."""
    client, worker = ends
    assert not client.has_input(0.05)
    worker.send(wire.Data(), b"x" * 20_000)
    assert client.has_input(10)
    assert client.receive(10)[1] == b"x" * 20_000


def test_a_payload_lands_in_the_memory_it_is_given(ends):
    client, worker = ends
    memory = bytearray(5)
    client.send(wire.Batch([wire.Write(1, 0)]), b"hello")
    message, payload = worker.receive(10, lambda message, length: memoryview(memory)[:length])
    assert message == wire.Batch([wire.Write(1, 0)])
    assert memory == payload == b"hello"


def test_waiting_has_a_limit_and_harms_nothing(ends):
    client, worker = ends
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        client.receive(0.05)
    assert time.monotonic() - started < 5
    assert not client.has_input()
    worker.send(wire.Done())
    assert client.receive(10)[0] == wire.Done()


def test_the_end_of_the_peer_is_noticed_by_both_directions(ends):
    client, worker = ends
    worker.close()
    assert client.has_input()
    with pytest.raises(ConnectionLost):
        client.receive(10)
    with pytest.raises(ConnectionLost):
        client.send(wire.Batch([wire.Write(1, 0)]), bytes(wire.MAX_PAYLOAD_BYTES))


def test_closing_wakes_a_thread_that_waits(ends):
    client, _ = ends
    threading.Timer(0.05, client.close).start()
    with pytest.raises(ConnectionLost):
        client.receive()


def test_what_the_peer_may_not_send_is_refused(ends):
    client, worker = ends
    worker.send(wire.GetStatus())
    with pytest.raises(WireError, match="not a from-worker message"):
        client.receive(10)


@pytest.mark.parametrize(("token", "error"), [("token", None), ("guess", AuthenticationError)])
def test_a_caller_and_a_listener_greet(token, error, security):
    calls, listens = security
    with transport.listen("127.0.0.1", 0) as listener:
        outcome: list[object] = []

        def serve() -> None:
            sock, _ = listener.accept()
            try:
                connection, hello = transport.accept(
                    sock,
                    "token",
                    TORCH,
                    sends="from-worker",
                    receives="to-worker",
                    device="CPU",
                    memory_bytes=9,
                    security=listens,
                )
            except HandshakeError as refused:
                outcome.append(refused)
            else:
                outcome.append(hello.name)
                connection.close()

        serving = threading.Thread(target=serve)
        serving.start()
        port = listener.getsockname()[1]
        try:
            if error is None:
                connection, welcome = transport.connect(
                    "127.0.0.1",
                    port,
                    token,
                    TORCH,
                    sends="to-worker",
                    receives="from-worker",
                    name="ann",
                    security=calls,
                )
                connection.close()
                assert (welcome.device, welcome.memory_bytes) == ("CPU", 9)
            else:
                with pytest.raises(error):
                    transport.connect(
                        "127.0.0.1", port, token, TORCH, sends="to-worker", receives="from-worker", security=calls
                    )
        finally:
            serving.join()
    assert outcome == ["ann"] if error is None else isinstance(outcome[0], AuthenticationError)


def test_nothing_listening_is_said_plainly():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionLost, match=f"nothing answers at 127.0.0.1:{port}"):
        transport.connect("127.0.0.1", port, "", TORCH, sends="to-worker", receives="from-worker")


def test_another_service_is_told_from_a_pool():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                sock.recv(100)

        serving = threading.Thread(target=serve)
        serving.start()
        with pytest.raises(HandshakeError, match="does not speak the pool's protocol"):
            transport.connect(
                "127.0.0.1", listener.getsockname()[1], "", TORCH, sends="to-worker", receives="from-worker"
            )
        serving.join()


def test_a_listener_that_says_nothing_is_not_waited_for_longer_than_allowed():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ConnectionLost, match=r"did not answer the greeting within 0\.1 s"),
    ):
        transport.connect(
            "127.0.0.1", listener.getsockname()[1], "", TORCH, sends="to-worker", receives="from-worker", timeout_s=0.1
        )


def test_a_port_that_is_taken_is_said_plainly():
    with (
        transport.listen("127.0.0.1", 0) as first,
        pytest.raises(ConnectionLost, match="Is another pool running there"),
    ):
        transport.listen("127.0.0.1", first.getsockname()[1])
