"""A connection over TCP: whole messages with their payloads, blocking, each wait with a limit.

What a peer sends goes through `wire`, so that nothing but its messages gets in. A surprise ends the connection:
`WireError` if the peer sent what it may not, `ConnectionLost` if it is gone.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from millpond.pool import handshake, wire
from millpond.pool.errors import ConnectionLost, HandshakeError, WireError

GREETING_S = 10.0
"""How long a handshake may take."""
SILENT_HOST_S = 8
"""A host that does not answer the kernel's probes for so long is gone."""

Buffer = bytes | bytearray | memoryview
Allocate = Callable[[wire.Message, int], memoryview]
"""Returns writable memory for the payload, of so many bytes, of a message."""


class Connection:
    """One peer. `send` may be called from any thread; `receive` from one at a time."""

    def __init__(self, sock: socket.socket, *, sends: wire.Direction, receives: wire.Direction) -> None:
        self.socket = sock
        self.sends = sends
        self.receives = receives
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        sock.settimeout(None)
        _watch_host(sock)

    def send(self, message: wire.Message, payload: Buffer = b"") -> None:
        """Send a message; returns when the kernel has it.

        Raises:
            ConnectionLost: the peer is gone.
        """
        size = memoryview(payload).nbytes
        frame = wire.encode(message, size)
        with self._sending:
            try:
                if size <= wire.MAX_INLINE_BYTES:
                    self.socket.sendall(frame + payload if size else frame)
                else:
                    _send_both(self.socket, frame, memoryview(payload))
            except OSError as error:
                raise ConnectionLost(f"the connection broke while sending ({error})") from None

    def receive(
        self,
        timeout_s: float | None = None,
        allocate: Allocate | None = None,
        *,
        direction: wire.Direction | None = None,
    ) -> tuple[wire.Message, memoryview]:
        """Return the next message and its payload, which lies in memory from `allocate`.

        Raises:
            TimeoutError: nothing came in time (None: wait for ever; the kernel still notices a dead host).
            ConnectionLost: the peer is gone.
            WireError: the peer sent what it may not.
        """
        greeting = direction == "greeting"
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        prefix = bytearray(wire.PREFIX.size)
        self._fill(memoryview(prefix), deadline)
        header_bytes, payload_bytes = wire.measure(bytes(prefix), greeted=not greeting)
        header = bytearray(header_bytes)
        self._fill(memoryview(header), deadline)
        message = wire.decode(header, direction or self.receives)
        payload = memoryview(b"")
        if payload_bytes:
            payload = allocate(message, payload_bytes) if allocate else memoryview(bytearray(payload_bytes))
            self._fill(payload, deadline)
        return message, payload

    def has_input(self, wait_s: float = 0.0) -> bool:
        """Return whether something can be received (or the peer is gone), at the latest after `wait_s`."""
        return bool(self._poll.poll(wait_s * 1000))

    def close(self) -> None:
        """End the connection; a thread that waits in `receive` gets ConnectionLost."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, buffer: memoryview, deadline: float | None) -> None:
        # The socket stays in blocking mode, and waits are polled: another thread may be sending meanwhile.
        done = 0
        while done < len(buffer):
            try:
                if deadline is None:
                    count = self.socket.recv_into(buffer[done:], 0, socket.MSG_WAITALL)
                elif self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    count = self.socket.recv_into(buffer[done:], 0, socket.MSG_DONTWAIT)
                else:
                    raise TimeoutError("no answer in time")
            except TimeoutError:
                raise
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(f"the connection broke while receiving ({error})") from None
            if count == 0:
                raise ConnectionLost("the other end closed the connection")
            done += count


def connect(
    host: str,
    port: int,
    token: str,
    torch: str,
    *,
    sends: wire.Direction,
    receives: wire.Direction,
    name: str = "",
    timeout_s: float = GREETING_S,
) -> tuple[Connection, wire.Welcome]:
    """Connect to a broker or a worker and greet it.

    Raises:
        ConnectionLost: nothing listens there, or it hung up.
        HandshakeError: it refused us, or is not what it should be.
    """
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise ConnectionLost(f"nothing answers at {host}:{port} ({error})") from None
    connection = Connection(sock, sends=sends, receives=receives)
    try:
        opening, _ = connection.receive(timeout_s, direction="greeting")
        if not isinstance(opening, wire.Challenge):
            raise HandshakeError(f"{host}:{port} did not greet as a pool does; is the address right?")
        hello = handshake.answer(opening, token, torch, name)
        connection.send(hello)
        reply, _ = connection.receive(timeout_s, direction="greeting")
        welcome = handshake.confirm(opening, hello, reply, token)
    except TimeoutError:
        connection.close()
        raise ConnectionLost(f"{host}:{port} did not answer the greeting within {timeout_s:g} s") from None
    except WireError as error:
        connection.close()
        raise HandshakeError(f"{host}:{port} does not speak the pool's protocol: {error}") from None
    except BaseException:
        connection.close()
        raise
    return connection, welcome


def accept(
    sock: socket.socket,
    token: str,
    torch: str,
    *,
    sends: wire.Direction,
    receives: wire.Direction,
    device: str = "",
    memory_bytes: int = 0,
    timeout_s: float = GREETING_S,
) -> tuple[Connection, wire.Hello]:
    """Greet a caller; on failure tell it why, close, and raise.

    Raises:
        ConnectionLost, WireError, HandshakeError, TimeoutError: as the names say.
    """
    connection = Connection(sock, sends=sends, receives=receives)
    try:
        opening = handshake.challenge()
        connection.send(opening)
        hello, _ = connection.receive(timeout_s, direction="greeting")
        if not isinstance(hello, wire.Hello):
            raise WireError("the caller did not greet")
        connection.send(handshake.admit(opening, hello, token, torch, device, memory_bytes))
    except HandshakeError as error:
        connection.send(handshake.refusal(error, torch))
        connection.close()
        raise
    except BaseException:
        connection.close()
        raise
    return connection, hello


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConnectionLost: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConnectionLost(
            f"cannot listen on {host}:{port} ({error.strerror}). Is another pool running there? Choose another port."
        ) from None


def _watch_host(sock: socket.socket) -> None:
    """Have the kernel end the connection when the other host falls silent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENT_HOST_S // 2 - 1)


def _send_both(sock: socket.socket, frame: bytes, payload: memoryview) -> None:
    sent = sock.sendmsg([frame, payload])
    rest: Sequence[memoryview] = (memoryview(frame)[sent:], payload[max(0, sent - len(frame)) :])
    for part in rest:
        sock.sendall(part)
