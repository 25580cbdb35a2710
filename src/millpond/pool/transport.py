"""A connection over TCP, with or without TLS: whole messages with their payloads, blocking, each wait with a limit.

What a peer sends goes through `wire`, so that nothing but its messages gets in. A surprise ends the connection:
`WireError` if the peer sent what it may not, `ConnectionLost` if it is gone.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import struct
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

from millpond.pool import handshake, stream, tls, wire
from millpond.pool.errors import ConnectionLost, HandshakeError, PeerSilent, WireError

GREETING_S = 10.0
"""How long a handshake may take."""
REDIAL_S = 1.5
"""How long one try to connect anew may take: after a break the kernel's own next try may be far away."""
SILENT_HOST_S = 8
"""A host that acknowledges neither the kernel's probes nor our bytes for so long has fallen silent."""
WATCH_S = 1.0
"""How often connections are looked at for such a host."""
TLS_HINT = ". If the pool speaks TLS, set MILLPOND_POOL_TLS_CA to the authority of its certificate"
"""A pool greets at once, unless it waits for TLS's own greeting."""

Buffer = bytes | bytearray | memoryview
Allocate = Callable[[wire.Message, int], memoryview]
"""Returns writable memory for the payload, of so many bytes, of a message."""


class Connection:
    """One peer. `send` may be called from any thread; `receive` from one at a time."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        sends: wire.Direction,
        receives: wire.Direction,
        secured: tls.Secured | None = None,
    ) -> None:
        self.socket = sock
        self.sends = sends
        self.receives = receives
        self._sending = threading.Lock()
        self._stream = stream.of(sock, secured)
        self.silent = False
        """Whether the other host fell silent, and the connection was ended for that."""
        _watch_host(sock)
        _watch.add(self)

    def send(self, message: wire.Message, payload: Buffer = b"") -> None:
        """Send a message; returns when the kernel has it.

        Raises:
            ConnectionLost: the peer is gone.
        """
        data = memoryview(payload)
        frame = wire.encode(message, data.nbytes)
        with self._sending:
            try:
                self._stream.send(frame, data)
            except OSError as error:
                raise self._lost(f"the connection broke while sending ({error})", error) from None

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
        return self._stream.has_input(wait_s)

    @property
    def is_open(self) -> bool:
        """Return whether this end has not closed it."""
        return self.socket.fileno() >= 0

    def close(self) -> None:
        """End the connection; a thread that waits in `receive` gets ConnectionLost."""
        _watch.remove(self)
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
        done = 0
        while done < len(buffer):
            try:
                count = self._stream.receive_into(buffer[done:], deadline)
            except OSError as error:
                if isinstance(error, TimeoutError) and error.errno is None:  # else the kernel gave the host up
                    raise
                said = error.reason or error if isinstance(error, ssl.SSLError) else error
                cause = error if isinstance(error, ssl.SSLError) else None
                raise self._lost(f"the connection broke while receiving ({said})", error) from cause
            if count == 0:
                raise self._lost("the other end closed the connection")
            done += count

    def _lost(self, what: str, error: OSError | None = None) -> ConnectionLost:
        if self.silent:
            return PeerSilent(f"nothing has come from the other host for {SILENT_HOST_S} s")
        return PeerSilent(what) if error is not None and is_silence(error) else ConnectionLost(what)


def connect(
    host: str,
    port: int,
    token: str,
    torch: str,
    *,
    sends: wire.Direction,
    receives: wire.Direction,
    name: str = "",
    security: tls.Caller | None = None,
    connect_s: float = GREETING_S,
    timeout_s: float = GREETING_S,
) -> tuple[Connection, wire.Welcome]:
    """Connect to a broker or a worker, over TLS if `security` says how, and greet it.

    Raises:
        ConnectionLost: nothing listens there, or it hung up; `PeerSilent`: no way leads there now.
        HandshakeError: it refused us, or is not what it should be.
    """
    peer = f"{host}:{port}"
    try:
        sock = socket.create_connection((host, port), timeout=connect_s)
    except OSError as error:
        kind = PeerSilent if is_silence(error) else ConnectionLost
        raise kind(f"nothing answers at {peer} ({error})") from None
    secured = None if security is None else _secure(sock, security, peer, timeout_s)
    channel = secured.channel if secured else b""
    connection = Connection(sock, sends=sends, receives=receives, secured=secured)
    try:
        opening = _opening(connection, security, peer, timeout_s)
        hello = handshake.answer(opening, token, torch, name, channel=channel)
        connection.send(hello)
        reply, _ = connection.receive(timeout_s, direction="greeting")
        welcome = handshake.confirm(opening, hello, reply, token, channel=channel)
    except TimeoutError:
        connection.close()
        raise _silent(peer, timeout_s, security) from None
    except WireError as error:
        connection.close()
        raise HandshakeError(f"{peer} does not speak the pool's protocol: {error}") from None
    except BaseException:
        connection.close()
        raise
    return connection, welcome


def _secure(sock: socket.socket, security: tls.Caller, peer: str, timeout_s: float) -> tls.Secured:
    try:
        return security.secure(sock, peer, timeout_s)
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise _silent(peer, timeout_s, security) from None
        if isinstance(error, OSError):
            kind = PeerSilent if is_silence(error) else ConnectionLost
            raise kind(f"{peer} ended the connection within TLS's handshake ({error})") from None
        raise


def _opening(connection: Connection, security: tls.Caller | None, peer: str, timeout_s: float) -> wire.Challenge:
    try:
        opening, _ = connection.receive(timeout_s, direction="greeting")
    except PeerSilent:
        raise
    except ConnectionLost as error:
        if security is None:
            raise ConnectionLost(f"{peer} did not greet: {error}{TLS_HINT}") from None
        raise tls.hung_up(peer, error.__cause__, security.shows) from None
    if not isinstance(opening, wire.Challenge):
        raise HandshakeError(f"{peer} did not greet as a pool does; is the address right?")
    return opening


def _silent(peer: str, timeout_s: float, security: tls.Caller | None) -> PeerSilent:
    return PeerSilent(f"{peer} did not answer the greeting within {timeout_s:g} s{'' if security else TLS_HINT}")


def accept(
    sock: socket.socket,
    token: str,
    torch: str,
    *,
    sends: wire.Direction,
    receives: wire.Direction,
    device: str = "",
    memory_bytes: int = 0,
    grace_s: float = 0.0,
    security: tls.Listener | None = None,
    timeout_s: float = GREETING_S,
) -> tuple[Connection, wire.Hello]:
    """Greet a caller, over TLS if `security` says how; on failure tell it why, close, and raise.

    Raises:
        ConnectionLost, WireError, HandshakeError, TimeoutError: as the names say.
        OSError: the caller did not get through TLS's handshake.
    """
    try:
        secured = security.secure(sock, timeout_s) if security else None
    except BaseException:
        sock.close()
        raise
    channel = secured.channel if secured else b""
    connection = Connection(sock, sends=sends, receives=receives, secured=secured)
    try:
        opening = handshake.challenge()
        connection.send(opening)
        hello, _ = connection.receive(timeout_s, direction="greeting")
        if not isinstance(hello, wire.Hello):
            raise WireError("the caller did not greet")
        welcome = handshake.admit(
            opening, hello, token, torch, device=device, memory_bytes=memory_bytes, grace_s=grace_s, channel=channel
        )
        connection.send(welcome)
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


_NO_WAY = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN}


def is_silence(error: Exception) -> bool:
    """Return whether an error of a socket says that nothing comes from the other host, or that no way leads there."""
    return isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno in _NO_WAY)


def _watch_host(sock: socket.socket) -> None:
    """Have the kernel end the connection when the other host falls silent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENT_HOST_S // 2 - 1)


class _Watch:
    """Ends connections whose other host acknowledges nothing of what we sent.

    The kernel's probes are for connections where nothing is under way; what is, it sends again for a quarter of an
    hour. TCP_USER_TIMEOUT would also end a connection to a host that is well and busy (tcp(7): zero window).
    """

    _INFO = struct.Struct("=2xB5x13I")
    """Of `struct tcp_info` (linux/tcp.h): retransmits; words 4, unacked, and 12, milliseconds since the last ACK."""

    def __init__(self) -> None:
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._running = False

    def add(self, connection: Connection) -> None:
        """Watch a connection until it is closed."""
        with self._lock:
            self._connections.add(connection)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="pool-watch", daemon=True).start()

    def remove(self, connection: Connection) -> None:
        """Watch a connection no longer."""
        with self._lock:
            self._connections.discard(connection)

    def _run(self) -> None:
        while True:
            time.sleep(WATCH_S)
            with self._lock:
                watched = list(self._connections)
                if not watched:
                    self._running = False
                    return
            for connection in watched:
                self._look_at(connection)
            del watched

    def _look_at(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            info = connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, self._INFO.size)
            retransmits, *words = self._INFO.unpack(info)
            if retransmits and words[4] and words[12] > SILENT_HOST_S * 1000:
                connection.silent = True
                connection.socket.shutdown(socket.SHUT_RDWR)


_watch = _Watch()
