"""A lease's worker process: `python -m millpond.pool.worker`, started by the broker.

It reads its orders (one JSON line, secrets included) from stdin, and later in another who its peers are; it listens on
a port of its own, runs sessions, and reports on stdout: first where it listens, then every second how it is. It ends
with its broker (or its host's agent), whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from millpond import confine
from millpond.pool import ray_jobs, tls, wire
from millpond.pool.errors import ConnectionLost, WireError
from millpond.pool.link import Link
from millpond.pool.sessions import MAX_GREETING, Greeting, Sessions, refuse
from millpond.process import die_with_parent
from millpond.settings import PoolSettings, load

if TYPE_CHECKING:
    from millpond.pool.job_worker import JobWorker

REPORT_S = 1.0
MAX_SESSIONS = 64
"""Sessions of one lease at a time."""
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
    grace_s: float = 0.0
    peer_token: str = ""
    """Secret of the lease's workers among themselves; empty: this is the only one."""
    tls: tls.Files = tls.Files()
    """The certificate that it shows is its host's; with authorities, its callers must show one too."""
    job: ray_jobs.Site | None = None
    """Where its job is to run; None: it computes for torch."""


class Introduction(msgspec.Struct, frozen=True):
    """What the broker tells each worker of a lease once all are ready: the workers, in the order of their devices."""

    own: int
    peers: list[wire.PeerAddress]


class Report(msgspec.Struct, frozen=True):
    """What a worker tells its broker."""

    port: int
    torch: str
    used_bytes: int = 0
    sessions: int = 0
    idle_s: float = 0.0
    peer_port: int = 0
    certificate: bytes = b""
    """SHA-256 of the certificate that it shows; empty: it speaks no TLS."""


class Worker:
    """Serves the sessions of one lease."""

    def __init__(self, orders: Orders) -> None:
        import torch

        from millpond.pool.executor import Memory
        from millpond.pool.peers import Peers

        self.orders = orders
        self.torch_version = str(torch.__version__)
        self.device = torch.device(orders.device)
        self.memory = Memory(orders.memory_bytes)
        self.last_work = time.monotonic()
        self._working: set[object] = set()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, orders.memory_bytes / total), self.device)
            torch.zeros(1, device=self.device)  # the context is made before a client waits for it
        else:
            threads = MAX_SESSIONS + MAX_GREETING + 2 * (os.cpu_count() or 1)
            _limit_data(orders.memory_bytes + WORKSPACE_BYTES + threads * STACK_BYTES)
        self.security = tls.listener(orders.tls)
        greeting = Greeting(
            lease=orders.lease,
            token=orders.token,
            torch=self.torch_version,
            device=orders.device,
            memory_bytes=orders.memory_bytes,
            grace_s=orders.grace_s,
            security=self.security,
            sends="from-worker",
            receives="to-worker",
        )
        self.sessions = Sessions(greeting, orders.bind, MAX_SESSIONS, self._run)
        self.peers = (
            Peers(orders.peer_token, orders.bind, self.memory, self.torch_version, orders.tls, orders.grace_s)
            if orders.peer_token
            else None
        )

    def report(self) -> Report:
        """Return how this worker is."""
        if self.peers is not None:
            self.peers.arrivals.expire()
        return Report(
            self.sessions.port,
            self.torch_version,
            self.memory.used_bytes,
            len(self.sessions),
            0.0 if self._working else time.monotonic() - self.last_work,
            self.peers.port if self.peers is not None else 0,
            self.security.channel if self.security is not None else b"",
        )

    def _run(self, link: Link) -> None:
        import torch

        from millpond.pool.peers import PeerExecutor

        executor = PeerExecutor(self.device, self.memory, self.peers)
        try:
            with torch.inference_mode():
                while True:
                    message, payload = link.receive(executor.destination)
                    if isinstance(message, wire.EndSession):
                        return
                    if not isinstance(message, wire.Batch):
                        raise WireError("a session is attached to once a connection")
                    self._working.add(executor)
                    for answer, data in executor.run(message, payload):
                        link.send(answer, data)
                    self.last_work = time.monotonic()
                    self._working.discard(executor)
        except ConnectionLost as error:
            print(f"worker {self.orders.lease}: ended a session: {error}", file=sys.stderr)  # noqa: T201
        except (WireError, MemoryError) as error:
            why = str(error)[:1000] or "no memory is left for a message"
            print(f"worker {self.orders.lease}: dropped a session: {why}", file=sys.stderr)  # noqa: T201
            refuse(link.connection, "malformed", why)
        finally:
            executor.close()
            self._working.discard(executor)


def main() -> None:
    """Run a worker until its broker ends."""
    line = sys.stdin.buffer.readline()
    orders = msgspec.json.decode(line, type=Orders)
    die_with_parent(orders.parent)
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the reports
    worker: Worker | JobWorker
    if orders.job is None:
        _confine(orders)
        worker = Worker(orders)
    else:
        from millpond.pool.job_worker import JobWorker

        worker = JobWorker(orders, orders.job)
    _send_report(reports, worker)
    threading.Thread(target=_keep_reporting, args=(reports, worker), name="reports", daemon=True).start()
    threading.Thread(target=_follow_stdin, args=(worker,), name="stdin", daemon=True).start()
    if isinstance(worker, Worker) and worker.peers is not None:
        threading.Thread(target=worker.peers.serve, name="peers", daemon=True).start()
    worker.sessions.serve()


def _confine(orders: Orders) -> None:
    """Take from this process what it does not need, before there is a thread or a library that would keep it."""
    if not load(PoolSettings).confine:
        return
    files = filter(None, (orders.tls.cert, orders.tls.key, orders.tls.ca))
    lacking = confine.confine(gpu=orders.device != "cpu", connects=bool(orders.peer_token), files=files)
    if lacking:
        print(f"worker {orders.lease}: not kept from its host's files and programs: {lacking}", file=sys.stderr)  # noqa: T201


def _send_report(reports: BinaryIO, worker: Worker | JobWorker) -> None:
    reports.write(msgspec.json.encode(worker.report()) + b"\n")


def _keep_reporting(reports: BinaryIO, worker: Worker | JobWorker) -> None:
    while True:
        time.sleep(REPORT_S)
        try:
            _send_report(reports, worker)
        except OSError:
            os._exit(0)


def _follow_stdin(worker: Worker | JobWorker) -> None:
    """Take in what the broker says after the orders: who the lease's other workers are; end when it has ended."""
    with contextlib.suppress(ValueError):  # the broker's word is no peer's: what cannot be read ends this worker
        for line in sys.stdin.buffer:
            if isinstance(worker, Worker) and worker.peers is not None:
                worker.peers.introduce(msgspec.json.decode(line, type=Introduction))
    os._exit(0)


def _limit_data(size: int) -> None:
    """Have the kernel refuse this process more than `size` bytes beyond what it has: a cap whatever an op does."""
    import psutil

    used = psutil.Process().memory_info().data  # VmData and VmStk
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = used + size
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    main()
