"""The worker of a job: takes its files from the client, has Ray run it on this host, passes on what it says.

The job is one fixed program, Paddle's training; a client sends data and no more. The job hangs on a Unix socket of this
process, which hangs on its host's part in the pool: whatever ends the lease ends the job. No torch is loaded.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import time
import typing
from pathlib import Path

from millpond.pool import ray_jobs, sessions, tls, wire
from millpond.pool.errors import ConnectionLost, WireError
from millpond.pool.lease import torch_version
from millpond.pool.link import Link
from millpond.pool.ray_jobs import RayError, RayJobs
from millpond.pool.worker import Orders, Report

PROGRAM = "millpond.learn.paddle"
"""What a job runs; it is given its directory, and the name of the socket in it."""
SOCKET = "socket"
STOP = b"stop\n"
"""What the job is told when it is to stop."""
START_S = 90.0
"""How long Ray may take to start a job."""
LOOK_S = 0.1
ASK_S = 1.0
"""How often Ray is asked for a job of which nothing is heard."""
MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest line of a job: a checkpoint's position holds every epoch so far."""
WORKSPACE_BYTES = 2 * 1024**3
"""What Python and Paddle may take on a CPU beyond the lease's memory."""


class JobWorker:
    """Serves one lease's job.

    Raises:
        SystemExit: there is no Ray on this host, or none that lets us in.
    """

    def __init__(self, orders: Orders, site: ray_jobs.Site) -> None:
        self.orders = orders
        self.site = site
        self.work = Path(site.work)
        self.ray = RayJobs(site)
        try:
            self.node = self.ray.node_here()
        except RayError as error:
            sys.exit(str(error))
        self.torch_version = torch_version()
        self.security = tls.listener(orders.tls)
        greeting = sessions.Greeting(
            lease=orders.lease,
            token=orders.token,
            torch=self.torch_version,
            device=orders.device,
            memory_bytes=orders.memory_bytes,
            grace_s=orders.grace_s,
            security=self.security,
            sends="from-job",
            receives="to-job",
        )
        self.sessions = sessions.Sessions(greeting, orders.bind, 1, self._run)
        self._job: Job | None = None
        self._sizes: dict[str, int] = {}
        self._last_work = time.monotonic()

    def report(self) -> Report:
        """Return how this worker is."""
        runs = self._job is not None and not self._job.has_ended
        return Report(
            self.sessions.port,
            self.torch_version,
            sessions=len(self.sessions),
            idle_s=0.0 if runs else time.monotonic() - self._last_work,
            certificate=self.security.channel if self.security is not None else b"",
        )

    def _run(self, link: Link) -> None:
        """Run a session; the job ends with it."""
        try:
            while True:
                if self._job is None or self._job.has_ended or link.has_input(LOOK_S):
                    taken = link.take()
                    if taken is not None and self._handle(link, *taken):
                        return
                self._last_work = time.monotonic()
                if self._job is not None:
                    self._pass_on(link, self._job)
        except ConnectionLost as error:
            print(f"worker {self.orders.lease}: ended a session: {error}", file=sys.stderr)  # noqa: T201
        except (WireError, MemoryError) as error:
            why = str(error)[:1000] or "no memory is left for a message"
            print(f"worker {self.orders.lease}: dropped a session: {why}", file=sys.stderr)  # noqa: T201
            sessions.refuse(link.connection, "malformed", why)
        except OSError as error:
            why = f"the files of the job cannot be kept on its host: {error}"[:1000]
            sessions.refuse(link.connection, "lease", why)
        finally:
            if self._job is not None:
                self._job.close()

    def _handle(self, link: Link, message: wire.Message, payload: memoryview) -> bool:
        """Do what the client asks for; return whether it has ended its session."""
        match message:
            case wire.WriteFile(file, offset):
                self._write(file, offset, payload)
            case wire.StartJob():
                if self._job is not None:
                    raise WireError("a lease has one job")
                self._job = Job(self)
            case wire.StopJob():
                if self._job is not None:
                    self._job.stop()
            case wire.ReadFile(file, offset, length):
                self._read(link, file, offset, length)
            case wire.DropFile(file):
                (self.work / file).unlink(missing_ok=True)
            case wire.EndSession():
                return True
            case _:
                raise WireError("a session is attached to once a connection")
        return False

    def _write(self, file: str, offset: int, payload: memoryview) -> None:
        if self._job is not None:
            raise WireError("a job's files are written before it starts")
        if offset != self._sizes.get(file, 0):
            raise WireError(f"{file} has {self._sizes.get(file, 0)} bytes, and is to go on at {offset}")
        if sum(self._sizes.values()) + payload.nbytes > self.site.most_bytes:
            raise WireError(
                f"the files of this job are larger than its host allows ({self.site.most_bytes:,} bytes, its "
                "MILLPOND_POOL_JOB_BYTES)"
            )
        with (self.work / file).open("ab") as out:
            out.write(payload)
        self._sizes[file] = offset + payload.nbytes

    def _read(self, link: Link, file: str, offset: int, length: int) -> None:
        try:
            descriptor = os.open(self.work / file, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            link.send(wire.FilePart(0))
            return
        try:
            total = os.fstat(descriptor).st_size
            part = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        link.send(wire.FilePart(total), memoryview(part))

    def _pass_on(self, link: Link, job: Job) -> None:
        """Tell the client what the job has said, and how it ended."""
        for line in job.lines():
            link.send(wire.JobLine(), memoryview(line))
        if not job.has_ended and (why := job.why_ended()):
            job.has_ended = True
            link.send(wire.JobEnded(why[: wire.MAX_TEXT]))


def command(orders: Orders, site: ray_jobs.Site) -> str:
    """Return the shell's command that is the job: an environment without Ray's secrets, and the one program."""
    # NumPy's threads would begin before the job is confined; it has little to compute.
    variables = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
    threads = str(len(os.sched_getaffinity(0)))
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | variables
    if orders.device == "cpu":
        limit = f"ulimit -d {(orders.memory_bytes + WORKSPACE_BYTES) // 1024} && "
    else:
        limit = ""
        number = int(orders.device.partition(":")[2] or 0)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        # By its place among those that torch saw on this host, which counts them as CUDA does.
        variables["CUDA_VISIBLE_DEVICES"] = visible[number] if any(visible) else str(number)
        variables.setdefault("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
        variables["FLAGS_gpu_memory_limit_mb"] = str(orders.memory_bytes // 2**20)
    environment = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
    return f"{limit}exec {shlex.join([*environment, site.python, '-P', '-m', PROGRAM, site.work, SOCKET])}"


class Job:
    """The one job of a lease."""

    def __init__(self, worker: JobWorker) -> None:
        self.name = ray_jobs.name_of(worker.orders.lease)
        self.has_ended = False
        """Whether its client knows that it has."""
        self._ray = worker.ray
        self._failure = ""
        self._connection: socket.socket | None = None
        self._is_stopped = self._is_silent = False
        self._buffer = bytearray()
        self._began = self._asked = time.monotonic()
        self._listener = _listen(worker.work)
        try:
            self._ray.submit(self.name, command(worker.orders, worker.site), worker.node)
        except RayError as error:
            self._failure = str(error)

    def stop(self) -> None:
        """Tell it to stop; at once, if it is not there yet."""
        self._is_stopped = True
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(STOP)

    def lines(self) -> typing.Iterator[bytes]:
        """Yield what it has said since.

        Raises:
            WireError: a line is too long.
        """
        if self._connection is None and not self._accept():
            return
        assert self._connection is not None
        while not self._is_silent:
            try:
                chunk = self._connection.recv(1024 * 1024)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            self._is_silent = not chunk
            self._buffer += chunk
            *whole, rest = self._buffer.split(b"\n")
            self._buffer = rest
            if len(rest) > MAX_LINE_BYTES:
                raise WireError("the job says a line that does not end")
            yield from map(bytes, whole)

    def why_ended(self) -> str:
        """Return why it has ended; nothing while it has not, or nobody knows yet."""
        if self._failure:
            return self._failure
        now = time.monotonic()
        if (self._connection is not None and not self._is_silent) or now - self._asked < ASK_S:
            return ""
        self._asked = now
        try:
            if why := self._ray.why_ended(self.name):
                return why
        except RayError as error:
            return str(error)
        if self._connection is None and now - self._began > START_S:
            return f"Ray has not started the job within {START_S:g} s"
        return ""

    def close(self) -> None:
        """End it: it does not outlive its end of the connection."""
        self.has_ended = True
        self._listener.close()
        if self._connection is not None:
            self._connection.close()

    def _accept(self) -> bool:
        try:
            self._connection, _ = self._listener.accept()
        except OSError:  # it has not started yet
            return False
        self._connection.setblocking(False)
        self._listener.close()
        if self._is_stopped:
            self.stop()
        return True


def _listen(work: Path) -> socket.socket:
    """Return a socket that listens in a directory, however long the path to it is."""
    listener = socket.socket(socket.AF_UNIX)
    descriptor = os.open(work, os.O_PATH | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{descriptor}/{SOCKET}")
    finally:
        os.close(descriptor)
    listener.listen(1)
    listener.setblocking(False)
    return listener
