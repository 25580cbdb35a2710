"""A relay between clients and a worker, for tests that break what is between them."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time


class Relay:
    """Forwards every connection to `port`; `cut` ends those that there are, `down` refuses new ones meanwhile.

    `swallow` has what comes on them go nowhere; `hold` has nothing pass at all, on new ones neither, until `go_on`.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.cuts = self.carried_bytes = self.swallowed_bytes = 0
        self._swallowing = False
        self._passing = threading.Event()
        self._passing.set()
        self._ends: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.up()

    def up(self) -> None:
        """Accept connections, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def swallow(self) -> None:
        """Take all that comes, and pass none of it on, until the next cut."""
        self.swallowed_bytes = 0
        self._swallowing = True

    def hold(self) -> None:
        """Pass nothing on; nobody is told."""
        self._passing.clear()

    def go_on(self) -> None:
        """Pass on what was held, too."""
        self._passing.set()

    def cut(self) -> None:
        """Break all connections."""
        self.cuts += 1
        with self._lock:
            self._swallowing = False
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def down(self) -> None:
        """Accept no more, and break all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut_often(self, stop: threading.Event, seed: int) -> None:
        """Break connections at random moments, from when the first one is in use until told to stop."""
        chance = random.Random(seed)
        while not stop.is_set() and self.carried_bytes < 10_000:
            time.sleep(0.01)
        while not stop.wait(chance.uniform(0.3, 1.0)):
            self.cut()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as server:
            with self._lock:
                self._ends |= {client, server}
            try:
                to = {client: server, server: client}
                while True:
                    for end in select.select([client, server], [], [], 60)[0]:
                        data = end.recv(1 << 16)
                        if not data:
                            return
                        self._passing.wait()
                        with self._lock:
                            swallowing = self._swallowing
                            self.swallowed_bytes += len(data) * swallowing
                        if swallowing:
                            continue
                        to[end].sendall(data)
                        self.carried_bytes += len(data)
            finally:
                with self._lock:
                    self._ends -= {client, server}
