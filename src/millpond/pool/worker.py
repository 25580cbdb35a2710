"""A lease's worker process: `python -m millpond.pool.worker`, started by the broker.

It reads its orders (one JSON line, secrets included) from stdin, listens on a port of its own, runs sessions, and
reports on stdout: first where it listens, then every second how it is. It ends with its broker, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import threading
import time
from typing import BinaryIO

import msgspec

from millpond.pool import transport, wire
from millpond.pool.errors import ConnectionLost, HandshakeError, WireError
from millpond.process import die_with_parent

REPORT_S = 1.0
MAX_SESSIONS = 64
"""Sessions of one lease at a time."""
MAX_GREETING = 64
"""Callers that have not yet proved who they are; a further one displaces the oldest."""
WORKSPACE_BYTES = 512 * 1024 * 1024
"""What kernels and Python may take beyond the lease's memory."""
STACK_BYTES = 8 * 1024 * 1024
"""The kernel counts a thread's whole stack as soon as it starts."""


class Orders(msgspec.Struct, frozen=True):
    """What the broker tells a new worker."""

    lease: str
    token: str
    bind: str
    device: str
    """`cpu`, or `cuda:N`."""
    memory_bytes: int
    parent: int


class Report(msgspec.Struct, frozen=True):
    """What a worker tells its broker."""

    port: int
    torch: str
    used_bytes: int = 0
    sessions: int = 0
    idle_s: float = 0.0


class Worker:
    """Serves the sessions of one lease."""

    def __init__(self, orders: Orders) -> None:
        import torch

        from millpond.pool.executor import Memory

        self.orders = orders
        self.torch_version = str(torch.__version__)
        self.device = torch.device(orders.device)
        self.memory = Memory(orders.memory_bytes)
        self.last_work = time.monotonic()
        self._working: set[object] = set()
        self._greeting: dict[socket.socket, None] = {}
        self._sessions = 0
        self._lock = threading.Lock()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, orders.memory_bytes / total), self.device)
            torch.zeros(1, device=self.device)  # the context is made before a client waits for it
        else:
            threads = MAX_SESSIONS + MAX_GREETING + 2 * (os.cpu_count() or 1)
            _limit_data(orders.memory_bytes + WORKSPACE_BYTES + threads * STACK_BYTES)
        self.listener = transport.listen(orders.bind, 0)

    def report(self) -> Report:
        """Return how this worker is."""
        return Report(
            self.listener.getsockname()[1],
            self.torch_version,
            self.memory.used_bytes,
            self._sessions,
            0.0 if self._working else time.monotonic() - self.last_work,
        )

    def serve(self) -> None:
        """Accept sessions for ever."""
        while True:
            sock, _ = self.listener.accept()
            with self._lock:
                while len(self._greeting) >= MAX_GREETING:
                    oldest = next(iter(self._greeting))
                    del self._greeting[oldest]
                    _hang_up(oldest)
                self._greeting[sock] = None
            threading.Thread(target=self._attend, args=(sock,), name="session", daemon=True).start()

    def _attend(self, sock: socket.socket) -> None:
        try:
            connection, _ = transport.accept(
                sock,
                self.orders.token,
                self.torch_version,
                sends="from-worker",
                receives="to-worker",
                device=_name(self.orders.device),
                memory_bytes=self.orders.memory_bytes,
            )
        except (ConnectionLost, WireError, HandshakeError, TimeoutError, OSError) as error:
            print(f"worker {self.orders.lease}: refused a caller: {error}", file=sys.stderr)  # noqa: T201
            return
        finally:
            with self._lock:
                self._greeting.pop(sock, None)
        with connection:
            self._session(connection)

    def _session(self, connection: transport.Connection) -> None:
        import torch

        from millpond.pool.graphs import GraphExecutor

        with self._lock:
            full = self._sessions >= MAX_SESSIONS
            self._sessions += not full
        if full:
            connection.send(wire.Refused("busy", f"this lease has {MAX_SESSIONS} sessions already; end some"))
            return
        executor = GraphExecutor(self.device, self.memory)
        try:
            with torch.inference_mode():
                while True:
                    batch, payload = connection.receive(None, executor.destination)
                    self._working.add(executor)
                    for answer, data in executor.run(batch, payload):  # type: ignore[arg-type]
                        connection.send(answer, data)
                    self.last_work = time.monotonic()
                    self._working.discard(executor)
        except ConnectionLost:
            pass
        except WireError as error:
            print(f"worker {self.orders.lease}: dropped a session: {error}", file=sys.stderr)  # noqa: T201
            with contextlib.suppress(ConnectionLost):
                connection.send(wire.Refused("malformed", str(error)[:1000]))
        finally:
            executor.close()
            self._working.discard(executor)
            with self._lock:
                self._sessions -= 1


def main() -> None:
    """Run a worker until its broker ends."""
    line = sys.stdin.buffer.readline()
    orders = msgspec.json.decode(line, type=Orders)
    die_with_parent(orders.parent)
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the reports
    worker = Worker(orders)
    _send_report(reports, worker)
    threading.Thread(target=_keep_reporting, args=(reports, worker), name="reports", daemon=True).start()
    threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    worker.serve()


def _send_report(reports: BinaryIO, worker: Worker) -> None:
    reports.write(msgspec.json.encode(worker.report()) + b"\n")


def _keep_reporting(reports: BinaryIO, worker: Worker) -> None:
    while True:
        time.sleep(REPORT_S)
        try:
            _send_report(reports, worker)
        except OSError:
            os._exit(0)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _limit_data(size: int) -> None:
    """Have the kernel refuse this process more than `size` bytes beyond what it has: a cap whatever an op does."""
    import psutil

    used = psutil.Process().memory_info().data  # VmData and VmStk
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = used + size
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _name(device: str) -> str:
    if device == "cpu":
        return "CPU"
    import torch

    return torch.cuda.get_device_name(torch.device(device))[:100]


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
