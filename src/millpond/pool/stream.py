"""Bytes over a socket, plain or TLS, by the same verbs. One thread may send while another receives.

The socket stays in blocking mode, so that the kernel moves a payload in one call; waits with a limit are polled.
OpenSSL's object is for one thread at a time, and is locked only while it computes, never while the socket waits.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from typing import Protocol

from millpond.pool import wire
from millpond.pool.interrupts import hold_back_interrupts
from millpond.pool.tls import RECORD_BYTES, Secured

TAKE_BYTES = 256 * 1024
"""How much is taken from the kernel at once for OpenSSL to decrypt."""
PIECE_BYTES = 128 * 1024
"""How much OpenSSL encrypts at once; what becomes of it still is in the processor's cache when it is sent."""


class Stream(Protocol):
    """The bytes of one connection."""

    def send(self, frame: bytes, payload: memoryview) -> None:
        """Send all of both; returns when the kernel has it. Raises OSError. For one thread at a time."""

    def receive_into(self, buffer: memoryview, deadline: float | None) -> int:
        """Return how many bytes have come into `buffer`, at least one; 0: the peer has ended the connection.

        Raises:
            TimeoutError: nothing came until `deadline` (of `time.monotonic`).
            OSError: the connection broke.
        """

    def has_input(self, wait_s: float) -> bool:
        """Return whether something can be received (or the peer is gone), at the latest after `wait_s`."""


def of(sock: socket.socket, secured: Secured | None) -> Stream:
    """Return the stream over a socket."""
    return PlainStream(sock) if secured is None else TlsStream(sock, secured)


class PlainStream:
    """A stream as the kernel has it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._socket = sock
        self._readable = _poll(sock)

    def send(self, frame: bytes, payload: memoryview) -> None:
        """See Stream."""
        if len(payload) <= wire.MAX_INLINE_BYTES:
            self._socket.sendall(frame + payload if payload else frame)
            return
        sent = self._socket.sendmsg([frame, payload])
        for rest in (memoryview(frame)[sent:], payload[max(0, sent - len(frame)) :]):
            self._socket.sendall(rest)

    def receive_into(self, buffer: memoryview, deadline: float | None) -> int:
        """See Stream."""
        if deadline is None:
            return self._socket.recv_into(buffer, 0, socket.MSG_WAITALL)
        return _receive_some(self._socket, self._readable, buffer, deadline)

    def has_input(self, wait_s: float) -> bool:
        """See Stream."""
        return bool(self._readable.poll(wait_s * 1000))


class TlsStream:
    """A stream after TLS's handshake."""

    def __init__(self, sock: socket.socket, secured: Secured) -> None:
        sock.settimeout(None)
        self._socket = sock
        self._secured = secured
        self._lock = threading.Lock()
        """Held by who is within OpenSSL."""
        self._readable = _poll(sock)
        self._taken = memoryview(bytearray(TAKE_BYTES))
        self._record = memoryview(bytearray(RECORD_BYTES))
        self._ahead = self._record[:0]
        """What has been decrypted and not yet been asked for: no socket shows that it is there."""

    def send(self, frame: bytes, payload: memoryview) -> None:
        """See Stream."""
        if len(payload) <= wire.MAX_INLINE_BYTES:
            self._send(memoryview(frame + payload if payload else frame))
        else:
            self._send(memoryview(frame))
            self._send(payload)

    def _send(self, data: memoryview) -> None:
        while data:
            with self._lock:
                data = data[self._secured.openssl.write(data[:PIECE_BYTES]) :]
                encrypted = self._secured.outgoing.read()
            self._socket.sendall(encrypted)

    def receive_into(self, buffer: memoryview, deadline: float | None) -> int:
        """See Stream."""
        if not self._ahead:
            if len(buffer) >= RECORD_BYTES:
                return self._receive(buffer, deadline)
            self._ahead = self._record[: self._receive(self._record, deadline)]
        count = min(len(buffer), len(self._ahead))
        buffer[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def has_input(self, wait_s: float) -> bool:
        """See Stream; decrypts what has come, since a socket that is readable may hold no byte for us."""
        deadline = time.monotonic() + wait_s
        while not self._ahead:
            with hold_back_interrupts():  # only while nothing is taken may one fall
                try:
                    self._ahead = self._record[: self._receive(self._record, 0.0)]
                except TimeoutError:
                    pass
                except OSError:
                    return True  # the next receive says it again
                else:
                    return True
            if not self._readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
        return True

    def _receive(self, buffer: memoryview, deadline: float | None) -> int:
        """Decrypt into `buffer`, which has room for a record.

        What TLS itself answers (to new keys) goes with what is sent next. That the other end says goodbye
        (`close_notify`) is not asked for: a frame that is cut off is noticed, and leases end by messages.
        """
        while True:
            with self._lock:
                try:
                    return self._secured.openssl.read(len(buffer), buffer)  # type: ignore[return-value]
                except ssl.SSLWantReadError:
                    pass
            count = _receive_some(self._socket, self._readable, self._taken, deadline)
            if count == 0:
                return 0
            with self._lock:
                self._secured.incoming.write(self._taken[:count])


def _receive_some(sock: socket.socket, poll: select.poll, buffer: memoryview, deadline: float | None) -> int:
    while deadline is not None:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("no answer in time")
        try:
            return sock.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
    return sock.recv_into(buffer)


def _poll(sock: socket.socket) -> select.poll:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return poll
