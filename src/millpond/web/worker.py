"""Gunicorn's threaded worker, but a thread is given to a connection only when a whole request head has arrived.

So connections that send nothing, or a byte at a time, cost a file descriptor and no thread; the oldest of them are
dropped when there are too many. Gunicorn's own worker waits for them in its threads, which a few dozen then block.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from functools import partial
from typing import Any

from gunicorn.workers.gthread import TConn, ThreadWorker

MAX_HEAD_BYTES = 64 * 1024
"""A request head longer than this is handed on as it is, and refused by gunicorn's parser."""
DRAIN_S = 1.0
"""How long the rest of a body that is not wanted may take to arrive, before the connection is given up with it."""
_GONE = (errno.EAGAIN, errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """Waits for request heads in its poller (written against gunicorn 27)."""

    def accept(self, listener: Any) -> None:
        """Take a connection in; it waits for its first request like a kept-alive one for its next."""
        self._make_room()
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return
        self.nr_conns += 1
        connection = TConn(self.cfg, client, address, listener.getsockname())
        connection.timeout = time.monotonic() + self.cfg.keepalive
        self.pending_conns.append(connection)
        self.poller.register(client, selectors.EVENT_READ, partial(self.on_pending_socket_readable, connection))

    def on_pending_socket_readable(self, connection: Any, client: socket.socket) -> None:
        """Hand a new connection on when the head of its request is whole."""
        if _has_head(client):
            super().on_pending_socket_readable(connection, client)

    def on_client_socket_readable(self, connection: Any, client: socket.socket) -> None:
        """Hand a kept-alive connection on when the head of its next request is whole."""
        if _has_head(client):
            super().on_client_socket_readable(connection, client)

    def handle_request(self, request: Any, connection: Any) -> bool:
        """Answer; where much of the body is unread then, the answer says that the connection ends.

        Gunicorn says that it stays, finds the rest of the body too long to be read over (64 KiB), and hangs up on a
        client that may have sent its next request already.
        """
        should_close = request.should_close

        def should_close_or_is_unread() -> bool:
            if not should_close() and not connection.parser.finish_body(deadline=time.monotonic() + DRAIN_S):
                request.force_close()
            return bool(should_close())

        request.should_close = should_close_or_is_unread
        return bool(super().handle_request(request, connection))

    def _make_room(self) -> None:
        if self.nr_conns < self.worker_connections - self.cfg.threads - 1 or not self.pending_conns:
            return
        oldest = self.pending_conns.popleft()
        self.poller.unregister(oldest.sock)
        self.nr_conns -= 1
        oldest.close()


def _has_head(client: socket.socket) -> bool:
    """Return whether a thread may read from the connection: a whole head is there, or its end."""
    try:
        there = client.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True  # the connection is broken: reading from it says so
    has_ended = len(there) < client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)  # woken up, and not by more data
    if has_ended or len(there) == MAX_HEAD_BYTES or b"\r\n\r\n" in there or b"\n\n" in there:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return True
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(there) + 1)  # wake up for more than this only
    return False
