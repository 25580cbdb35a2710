"""A job on a leased device, as its client has it: takes the lease, sends the files, takes in what the job says.

All that goes over the network is done in a thread, which also keeps the lease: so whoever has the job may take time,
and a Ctrl-C cuts no message in two. The job hangs on the lease, and the lease on this process.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import secrets
import threading
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from millpond.pool import tls, transport, wire
from millpond.pool.errors import ConnectionLost, LeaseError, PoolError, WireError
from millpond.pool.launcher import owner
from millpond.pool.lease import Lease, get_status, torch_version
from millpond.pool.link import Dialler, Link
from millpond.settings import PoolSettings
from millpond.terminal import plain

PART_BYTES = 4 * 1024 * 1024
"""Of a file, at once."""
LOOK_S = 0.1
UNREAD_BYTES = 1024 * 1024
"""Of lines that wait to be read; then the job waits."""
MAX_UNREAD_BYTES = 64 * 1024 * 1024
"""The same while a file is fetched, whose parts come after the lines that were said before."""
LAST_WORD_S = 5.0
"""How long the broker may take to say why a worker is gone: it waits for three seconds for a host to come back."""
JOIN_S = 15.0
"""How long giving everything back may take."""

Action = Callable[[], None]


def check(settings: PoolSettings) -> None:
    """Find out, before any work is done, whether the pool runs jobs.

    Raises:
        PoolError: it does not, or cannot be asked.
    """
    if not any(device.jobs for device in get_status(settings).devices):
        raise LeaseError(
            f"No host of the pool at {settings.address} runs jobs. On a GPU host start Ray, and set "
            "MILLPOND_POOL_RAY_ADDRESS for millpond pool serve or join there."
        )


@contextlib.contextmanager
def lease_job(
    settings: PoolSettings,
    work: Path,
    *,
    memory_bytes: int = 0,
    wait_s: float = 3600.0,
    on_wait: Callable[[str], None] = lambda reason: None,
) -> Iterator[Job]:
    """Take a lease on a device, whole or (`memory_bytes` > 0) a part, for a job whose files are in `work`.

    Raises:
        PoolError: it cannot be had.
    """
    lease = Lease.acquire(
        settings,
        owner(),
        memory_bytes=memory_bytes,
        wait_s=wait_s,
        job=True,
        on_wait=lambda waiting: on_wait(f"{waiting.lease} waits ({waiting.reason})"),
    )
    with lease, _Line(lease) as line:
        yield Job(line, work)


class Job:
    """A job on a leased device."""

    def __init__(self, line: _Line, work: Path) -> None:
        self._line = line
        self._work = work
        self._why = ""

    @property
    def device(self) -> str:
        """Return what the program is to compute on; of GPUs it sees the leased one only."""
        return "cpu" if self._line.welcome.device == "cpu" else "cuda"

    @property
    def where(self) -> str:
        """Return in words where it runs."""
        return f"the pool's {plain(self._line.worker.device)}"

    def start(self) -> None:
        """Send the files, and have the job begin.

        Raises:
            PoolError: the lease is lost, or the host refuses the files.
        """
        for name in typing.get_args(wire.JobInput):
            if (path := self._work / name).exists():
                self._line.do(partial(self._send, name, path))
        self._line.do(lambda: self._line.link.send(wire.StartJob()))

    def readline(self) -> bytes:
        """Wait for the next line; empty when there is none any more: see `why_ended`."""
        if not self._why:
            said = self._line.read()
            if isinstance(said, bytes):
                return said
            self._why = said
        return b""

    def why_ended(self) -> str:
        """Return why there are no more lines."""
        return plain(self._why)

    def stop(self) -> None:
        """Have it stop as soon as it can, and keep what it has."""
        with contextlib.suppress(PoolError):  # which `readline` tells, too
            self._line.do(lambda: self._line.link.send(wire.StopJob()))

    def kill(self) -> None:
        """End it at once. From any thread."""
        self._line.give_up()

    def fetch(self, name: str, most_bytes: int) -> Path:
        """Return where a file of the job is on this side, once it is.

        Raises:
            PoolError: the lease is lost, or the file is not there, or larger than `most_bytes`.
        """
        path = self._work / name
        self._line.do(lambda: self._receive(name, path, most_bytes))
        return path

    def drop(self, name: str) -> None:
        """Delete a file of the job that was fetched, on both sides."""
        (self._work / name).unlink()
        with contextlib.suppress(PoolError):  # which `readline` tells, too
            self._line.do(lambda: self._line.link.send(wire.DropFile(name)))  # type: ignore[arg-type]

    def _send(self, name: str, path: Path) -> None:
        link, offset = self._line.link, 0
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            while offset < len(mapped):
                self._line.keep()
                part = mapped[offset : offset + PART_BYTES]
                link.send(wire.WriteFile(name, offset), memoryview(part))  # type: ignore[arg-type]
                offset += len(part)

    def _receive(self, name: str, path: Path, most_bytes: int) -> None:
        offset = 0
        with path.open("wb") as file:
            while True:
                self._line.keep()
                total, part = self._line.ask(wire.ReadFile(name, offset, PART_BYTES))  # type: ignore[arg-type]
                if not 0 < total <= most_bytes or not 0 < part.nbytes <= total - offset:
                    raise WireError(f"the job's {name} is missing at its host, or not of the size that it should have")
                offset += file.write(part)
                if offset == total:
                    return


class _Line:
    """What leads to the worker of a job, and keeps its lease. `do` has things done in its thread."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.worker = lease.granted.workers[0]
        self._said: queue.SimpleQueue[bytes | str] = queue.SimpleQueue()
        """The job's lines, then why there are no more."""
        self._unread_bytes = 0
        self._actions: queue.SimpleQueue[tuple[Action, Future[None]]] = queue.SimpleQueue()
        self._undone: list[Future[None]] = []
        """Actions that cannot be done any more, and whoever waits for them."""
        self._is_given_up = threading.Event()
        self._why_over = ""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="job", daemon=True)

    def __enter__(self) -> typing.Self:
        attach = wire.Attach(secrets.token_bytes(16))
        connection = self._dial()
        try:
            connection.send(attach)
        except BaseException:
            connection.close()
            raise
        dialler = Dialler(self._dial, attach, self.welcome.grace_s, why_ended=self._why_lost)
        self.link = Link(connection, dialler)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.give_up()
        self._thread.join(JOIN_S)
        self.link.close()

    def do(self, action: Action) -> None:
        """Have something done, and wait for it.

        Raises:
            PoolError: it cannot be.
        """
        done: Future[None] = Future()
        with self._lock:
            if self._why_over:
                raise ConnectionLost(self._why_over)
            self._actions.put((action, done))
        done.result()

    def read(self) -> bytes | str:
        """Wait for the job's next line, or why there are no more."""
        said = self._said.get()
        with self._lock:
            self._unread_bytes -= len(said)
        return said

    def give_up(self) -> None:
        """End the session, and the job with it. From any thread."""
        self._is_given_up.set()

    def keep(self) -> None:
        """Keep the lease; in the thread.

        Raises:
            PoolError: it is lost, or given up.
        """
        if why := self._why_lost():
            raise LeaseError(why)

    def ask(self, message: wire.ReadFile) -> tuple[int, memoryview]:
        """Return the total that an answer gives, and its payload; in the thread."""
        self.link.send(message)
        while True:
            self.keep()
            if not self.link.has_input(LOOK_S) or (taken := self.link.take()) is None:
                continue
            if isinstance(taken[0], wire.FilePart):
                return taken[0].total, taken[1]
            self._take(*taken)
            if self._unread_bytes > MAX_UNREAD_BYTES:
                raise WireError("the job says more than can be read while a file of it is fetched")

    def _dial(self) -> transport.Connection:
        worker = self.worker
        connection, self.welcome = transport.connect(
            worker.host,
            worker.port,
            worker.token,
            torch_version(),
            sends="to-job",
            receives="from-job",
            security=tls.caller(self.lease.settings),
        )
        return connection

    def _why_lost(self) -> str:
        if self._is_given_up.is_set():
            return "it was given up"
        lost = self.lease.keep()
        return f"{self.lease.granted.lease} on {self.worker.device} is lost: {lost}" if lost else ""

    def _run(self) -> None:
        why = ""
        try:
            while True:
                self.keep()
                with contextlib.suppress(queue.Empty):
                    self._act(*self._actions.get_nowait())
                    continue
                if self._unread_bytes > UNREAD_BYTES:
                    self._is_given_up.wait(LOOK_S)
                elif self.link.has_input(LOOK_S) and (taken := self.link.take()) is not None:
                    self._take(*taken)
        except ConnectionLost as error:
            why = self._last_word() or str(error)
        except (PoolError, OSError) as error:
            why = str(error)
        finally:
            with contextlib.suppress(PoolError):
                self.link.connection.send(wire.EndSession())
            self._end(why)

    def _last_word(self) -> str:
        """Return why the lease is lost, if it is known in time: where the worker is gone, the broker knows why."""
        deadline = time.monotonic() + LAST_WORD_S
        while not (why := self._why_lost()) and time.monotonic() < deadline:
            self._is_given_up.wait(LOOK_S)
        return why

    def _act(self, action: Action, done: Future[None]) -> None:
        try:
            action()
        except Exception as error:
            if isinstance(error, ConnectionLost | LeaseError):  # why will be known when this thread ends
                self._undone.append(done)
                raise
            done.set_exception(error)
        else:
            done.set_result(None)

    def _take(self, message: wire.Message, payload: memoryview) -> None:
        if isinstance(message, wire.JobLine):
            self._say(bytes(payload))
        elif isinstance(message, wire.JobEnded):
            self._say(message.why or "the job has ended")
        elif isinstance(message, wire.Refused):
            raise LeaseError(message.message)
        else:
            raise WireError("the job's worker answers what was not asked")

    def _say(self, said: bytes | str) -> None:
        with self._lock:
            self._unread_bytes += len(said)
        self._said.put(said)

    def _end(self, why: str) -> None:
        """Have nobody wait for what does not come any more."""
        with self._lock:
            self._why_over = why = why or "the job has ended"
        with contextlib.suppress(queue.Empty):
            while True:
                self._undone.append(self._actions.get_nowait()[1])
        for done in self._undone:
            done.set_exception(ConnectionLost(why))
        self._say(why)
