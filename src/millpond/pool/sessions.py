"""Where a worker's callers come in: greeted, bounded in number, and led to their sessions, which outlive connections.

What a session does is the worker's own.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from millpond.pool import tls, transport, wire
from millpond.pool.errors import ConnectionLost, HandshakeError, WireError
from millpond.pool.link import Berth, Link

MAX_GREETING = 64
"""Callers that have not yet proved who they are; a further one displaces the oldest."""


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What a worker's callers must know, and are told."""

    lease: str
    token: str
    torch: str
    device: str
    """What it computes on, by PyTorch's name: `cpu`, `cuda:1`."""
    memory_bytes: int
    grace_s: float
    security: tls.Listener | None
    sends: wire.Direction
    receives: wire.Direction


class Sessions:
    """The sessions of one lease at a worker, `most` at a time; each is `run` in a thread of its own."""

    def __init__(self, greeting: Greeting, bind: str, most: int, run: Callable[[Link], None]) -> None:
        self.greeting = greeting
        self.most = most
        self._listener = transport.listen(bind, 0)
        self._run = run
        self._greeting: dict[socket.socket, None] = {}
        self._sessions: dict[bytes, tuple[Link, Berth]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def port(self) -> int:
        """Return where callers are listened for."""
        return int(self._listener.getsockname()[1])

    def serve(self) -> None:
        """Accept sessions for ever."""
        while True:
            sock, _ = self._listener.accept()
            with self._lock:
                while len(self._greeting) >= MAX_GREETING:
                    oldest = next(iter(self._greeting))
                    del self._greeting[oldest]
                    _hang_up(oldest)
                self._greeting[sock] = None
            threading.Thread(target=self._attend, args=(sock,), name="session", daemon=True).start()

    def _attend(self, sock: socket.socket) -> None:
        greeting = self.greeting
        try:
            connection, _ = transport.accept(
                sock,
                greeting.token,
                greeting.torch,
                sends=greeting.sends,
                receives=greeting.receives,
                device=greeting.device,
                memory_bytes=greeting.memory_bytes,
                grace_s=greeting.grace_s,
                security=greeting.security,
            )
            attach, _ = connection.receive(transport.GREETING_S)
        except (ConnectionLost, WireError, HandshakeError, TimeoutError, OSError) as error:
            print(f"worker {greeting.lease}: refused a caller: {error}", file=sys.stderr)  # noqa: T201
            return
        finally:
            with self._lock:
                self._greeting.pop(sock, None)
        if not isinstance(attach, wire.Attach):
            refuse(connection, "malformed", "the first message must attach to a session")
        elif attach.resumes:
            self._resume(connection, attach)
        else:
            self._begin(connection, attach.session)

    def _resume(self, connection: transport.Connection, attach: wire.Attach) -> None:
        """Hand a connection to the session that it belongs to."""
        known = self._sessions.get(attach.session)
        if known is None:
            refuse(connection, "lease", "its session has ended at the worker: it was away for too long")
            return
        link, berth = known
        link.close()  # before the new one is handed over, which must not be the one to be closed
        berth.come_back(connection, attach.received)

    def _begin(self, connection: transport.Connection, name: bytes) -> None:
        """Run a session until its client ends it, or is gone for good."""
        berth = Berth(self.greeting.grace_s)
        link = Link(connection, berth)
        with self._lock:
            known = name in self._sessions
            full = sum(not berth.is_waiting for _, berth in self._sessions.values()) >= self.most
            if not full and len(self._sessions) >= self.most:  # who came goes before who may come back
                next(berth for _, berth in self._sessions.values() if berth.is_waiting).give_up()
            if not known and not full:
                self._sessions[name] = (link, berth)
        if known:
            refuse(connection, "malformed", "this session has begun already")
        elif full:
            refuse(connection, "busy", f"this lease has {self.most} sessions already; end some")
        else:
            try:
                self._run(link)
            finally:
                link.close()
                with self._lock:
                    del self._sessions[name]


def refuse(connection: transport.Connection, code: wire.RefusalCode, message: str) -> None:
    """Tell a caller why its connection ends, and end it."""
    with contextlib.suppress(ConnectionLost):
        connection.send(wire.Refused(code, message))
    connection.close()


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
