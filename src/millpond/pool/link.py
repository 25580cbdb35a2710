"""A link: messages to one peer and back, in order and each once, over connections that may break and be made again.

Both ends count the messages that came in whole, keep what they sent until the other end has it, and send the rest
again over the next connection. How there comes to be one is the end's own: a client dials, a worker is dialled.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from millpond.pool import wire
from millpond.pool.errors import ConnectionLost, HandshakeError, PeerSilent, WireError
from millpond.pool.transport import Allocate, Connection

TELL_EVERY = 32
"""An end says after so many messages that it has them; of one with a payload, at once."""
MAX_KEPT = 4096
MAX_KEPT_BYTES = 256 * 1024 * 1024
"""What an end keeps to send again, at most; before it sends more, it waits for the other end to say what it has."""
MAX_INBOX = 4096
MAX_INBOX_BYTES = 256 * 1024 * 1024
"""What an end takes in while it waits so, at most; an other end that sends more and says nothing means ill."""
COPIED_BYTES = 1024 * 1024
"""Payloads up to this size are copied by who sends them, as they may be kept; of larger ones a sender waits until the
other end has them, or keeps what they are of."""
RETRY_S = 0.2

Restore = Callable[[ConnectionLost, int], tuple[Connection, int]]
"""Given why the connection broke, and how many messages have come in: returns a new one, and how many the peer has.

Raises ConnectionLost when there will be none.
"""

log = logging.getLogger("millpond.pool")


def patience_s(error: ConnectionLost, grace_s: float) -> float:
    """Return how long to wait for a new connection, by how the old one broke."""
    return grace_s if isinstance(error, PeerSilent) else min(wire.CLOSED_S, grace_s)


class Link:
    """One end of a link. `send` and `take` are called under a lock of the caller's, or from one thread."""

    def __init__(self, connection: Connection, restore: Restore) -> None:
        self.connection = connection
        self._restore = restore
        self._kept: deque[tuple[wire.Message, memoryview]] = deque()
        self._kept_bytes = 0
        self._sent = 0
        self._received = 0
        self._told = 0
        """How many of the received messages the peer knows about."""
        self._inbox: deque[tuple[wire.Message, memoryview]] = deque()
        """What came while we waited for the peer to say what it has; bounded, too."""
        self._inbox_bytes = 0

    def send(self, message: wire.Message, payload: memoryview = memoryview(b"")) -> None:  # noqa: B008
        """Send a message. Its payload must stay as it is until the peer has it: see `settle`.

        Raises:
            ConnectionLost: the peer is gone for good.
        """
        self._kept.append((message, payload))
        self._kept_bytes += payload.nbytes
        self._sent += 1
        try:
            self.connection.send(message, payload)
        except ConnectionLost as error:
            self._mend(error)
        self._await(MAX_KEPT, MAX_KEPT_BYTES)

    def settle(self) -> None:
        """Wait until the peer has all payloads that were sent.

        Raises:
            ConnectionLost, WireError: as `take`.
        """
        self._await(MAX_KEPT, 0)

    def kept(self) -> Iterator[wire.Message]:
        """Yield the messages of which the peer has not said that it has them."""
        yield from (message for message, _ in self._kept)

    def has_input(self, wait_s: float = 0.0) -> bool:
        """Return whether `take` has something to do, at the latest after `wait_s`."""
        return bool(self._inbox) or self.connection.has_input(wait_s)

    def take(self, allocate: Allocate | None = None) -> tuple[wire.Message, memoryview] | None:
        """Wait for something to come; return it with its payload, or None if it was for the link itself.

        Raises:
            ConnectionLost: the peer is gone for good.
            WireError: it sent what it may not.
        """
        if not self._inbox:
            return self._receive(allocate)
        message, payload = self._inbox.popleft()
        self._inbox_bytes -= payload.nbytes
        return message, payload

    def receive(self, allocate: Allocate | None = None) -> tuple[wire.Message, memoryview]:
        """Wait for the next message; return it with its payload, which lies in memory from `allocate`."""
        while (taken := self.take(allocate)) is None:
            pass
        return taken

    def close(self) -> None:
        """End the connection that there is; a thread that waits in `take` goes on to `restore`."""
        self.connection.close()

    def _receive(self, allocate: Allocate | None) -> tuple[wire.Message, memoryview] | None:
        try:
            message, payload = self.connection.receive(None, allocate)
        except ConnectionLost as error:
            self._mend(error)
            return None
        if isinstance(message, wire.Received):
            self._forget(message.messages)
            return None
        self._received += 1
        if payload.nbytes or self._received - self._told >= TELL_EVERY:
            self._tell()
        return message, payload

    def _tell(self) -> None:
        """Say what has come in."""
        self._told = self._received
        try:
            self.connection.send(wire.Received(self._received))
        except ConnectionLost as error:
            self._mend(error)

    def _await(self, messages: int, payload_bytes: int) -> None:
        while len(self._kept) > messages or self._kept_bytes > payload_bytes:
            if taken := self._receive(None):
                self._inbox.append(taken)
                self._inbox_bytes += taken[1].nbytes
                if len(self._inbox) > MAX_INBOX or self._inbox_bytes > MAX_INBOX_BYTES:
                    raise WireError("the other end goes on sending, and does not say what it has")

    def _forget(self, received: int) -> None:
        """Drop what the peer has."""
        if not self._sent - len(self._kept) <= received <= self._sent:
            raise WireError(f"the other end says that it has {received} messages; {self._sent} were sent")
        while self._sent - len(self._kept) < received:
            self._kept_bytes -= self._kept.popleft()[1].nbytes

    def _mend(self, error: ConnectionLost) -> None:
        """Go on over a new connection."""
        while True:
            self.connection.close()
            self.connection, theirs = self._restore(error, self._received)
            self._told = self._received
            self._forget(theirs)
            try:
                for message, payload in self._kept:
                    self.connection.send(message, payload)
            except ConnectionLost as again:
                error = again
            else:
                return


class Dialler:
    """A caller's way back: dials the worker until it answers, the lease has ended, or the grace is over."""

    def __init__(
        self, dial: Callable[[], Connection], attach: wire.Attach, grace_s: float, *, why_ended: Callable[[], str]
    ) -> None:
        self._dial = dial
        self._attach = attach
        """What was said on the first connection."""
        self._grace_s = grace_s
        self._why_ended = why_ended

    def __call__(self, error: ConnectionLost, received: int) -> tuple[Connection, int]:
        """Restore a link; see `Restore`."""
        broke = time.monotonic()
        last = error
        told = False
        while True:
            try:
                connection = self._dial()
                theirs = self._resume(connection, received)
            except (HandshakeError, WireError) as refused:
                raise ConnectionLost(f"{error}, and then: {refused}") from None
            except ConnectionLost as failed:
                last = failed
            else:
                log.warning("the connection is back after %.1f s; nothing is lost", time.monotonic() - broke)
                return connection, theirs
            away_s = time.monotonic() - broke
            if why := self._why_ended():
                raise ConnectionLost(why)
            limit_s = patience_s(last, self._grace_s)
            if away_s > limit_s:
                raise ConnectionLost(f"{error}, and for {away_s:.0f} s after that {last}")
            if not told:
                log.warning("%s; trying to go on, for %g s at most", error, limit_s)
                told = True
            time.sleep(RETRY_S)

    def _resume(self, connection: Connection, received: int) -> int:
        try:
            connection.send(msgspec.structs.replace(self._attach, resumes=True, received=received))
            answer, _ = connection.receive(None)  # an op of ours may still run there; a dead host is noticed
            if isinstance(answer, wire.Refused):
                raise HandshakeError(answer.message)
            if not isinstance(answer, wire.Attached):
                raise WireError("the worker did not say what it has")
        except BaseException:
            connection.close()
            raise
        return answer.received


class Berth:
    """A worker's way back: where a session whose connection broke waits to be dialled."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._callers: queue.SimpleQueue[tuple[Connection, int] | None] = queue.SimpleQueue()
        self.is_waiting = False
        """Whether the session has no connection now."""

    def come_back(self, connection: Connection, received: int) -> None:
        """Hand over a caller's new connection, and how many of our messages it has. From any thread."""
        self._callers.put((connection, received))

    def give_up(self) -> None:
        """Have a session that waits end at once. From any thread."""
        self._callers.put(None)

    def __call__(self, error: ConnectionLost, received: int) -> tuple[Connection, int]:
        """Restore a link; see `Restore`."""
        wait_s = patience_s(error, self._grace_s)
        self.is_waiting = True
        try:
            caller = self._callers.get(timeout=wait_s)
        except queue.Empty:
            caller = None
        if caller is None:
            raise ConnectionLost(f"{error}, and it has not come back within {wait_s:g} s")
        self.is_waiting = False
        connection, theirs = caller
        try:
            connection.send(wire.Attached(received))
        except ConnectionLost as again:  # as when it has dialled once more, meanwhile
            connection.close()
            return self(again, received)
        return connection, theirs
