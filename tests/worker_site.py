"""A worker process as the broker starts it, for tests of the device and of what hostile clients do to it."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millpond import confine
from millpond.pool import attach, tls, transport, wire
from millpond.pool.errors import ConnectionLost
from millpond.pool.host import WORKER_COMMAND
from millpond.pool.worker import Introduction, Orders, Report

GIB = 1024**3
TOKEN = "the lease's token"
PEER_TOKEN = "the token of the lease's workers among themselves"


class SessionConnection(transport.Connection):
    """A session over the one connection that it began on: it says what has come in, and passes over what it is told."""

    received = 0

    def receive(self, *args: Any, **kwargs: Any) -> tuple[wire.Message, memoryview]:
        while isinstance((taken := super().receive(*args, **kwargs))[0], wire.Received):
            pass
        self.received += 1
        if len(taken[1]):
            self.send(wire.Received(self.received))
        return taken

    def close(self) -> None:
        with contextlib.suppress(ConnectionLost):
            self.send(wire.EndSession())
        super().close()


class WorkerProcess:
    """A worker started as the broker starts it."""

    def __init__(
        self,
        memory_bytes: int = GIB,
        *,
        log: Path,
        peer_token: str = "",
        files: tls.Files | None = None,
        grace_s: float = 30.0,
        command: Sequence[str] = WORKER_COMMAND,
        device: str = "CPU (2 cores)",  # as a host without a GPU calls it
    ) -> None:
        self.log = log
        self.device = device
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=confine.environment(os.environ),
            )
        assert self.process.stdin is not None
        files = files or tls.Files()
        orders = Orders("lease-1", TOKEN, "127.0.0.1", "cpu", memory_bytes, os.getpid(), grace_s, peer_token, files)
        self.process.stdin.write(msgspec.json.encode(orders) + b"\n")
        self.process.stdin.flush()
        self.memory_bytes = memory_bytes

    @functools.cached_property
    def first_report(self) -> Report:
        """Where it listens."""
        return self.next_report()

    @property
    def port(self) -> int:
        return self.first_report.port

    def next_report(self) -> Report:
        """Wait for the worker's next report."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended: {self.log.read_text()}"
        return msgspec.json.decode(line, type=Report)

    @property
    def address(self) -> wire.WorkerAddress:
        """As the broker would tell a client."""
        return wire.WorkerAddress("127.0.0.1", self.port, TOKEN, self.process.pid, self.device, self.memory_bytes)

    def environment(self) -> dict[str, str]:
        """The environment of a program under this lease."""
        return environment(self)

    def run(self, program: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a Python program on the device to its end."""
        return run(program, self.environment(), timeout_s)

    def introduce(self, own: int, peers: list[wire.PeerAddress]) -> None:
        """Tell it, as the broker does, who the lease's workers are."""
        assert self.process.stdin is not None
        introduction = Introduction(own, peers)
        self.process.stdin.write(msgspec.json.encode(introduction) + b"\n")
        self.process.stdin.flush()

    def connect(self, token: str = TOKEN) -> transport.Connection:
        """Open a session."""
        connection = SessionConnection(self.dial(token).socket, sends="to-worker", receives="from-worker")
        connection.send(wire.Attach(secrets.token_bytes(16)))
        return connection

    def dial(self, token: str = TOKEN) -> transport.Connection:
        """Connect and greet, no more."""
        connection, _ = transport.connect(
            "127.0.0.1", self.port, token, "2.13.0", sends="to-worker", receives="from-worker"
        )
        return connection

    def close(self) -> None:
        """Kill the worker."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Workers:
    """The workers of a lease of several devices; `route` may say by which port each is reached by the others."""

    def __init__(
        self,
        count: int = 2,
        memory_bytes: int = GIB,
        *,
        log: Path,
        files: tls.Files | None = None,
        grace_s: float = 30.0,
        route: Callable[[int], int] = lambda port: port,
    ) -> None:
        self.each = [
            WorkerProcess(
                memory_bytes,
                log=log.with_suffix(f".{place}.log"),
                peer_token=PEER_TOKEN,
                files=files,
                grace_s=grace_s,
            )
            for place in range(count)
        ]
        reports = [worker.first_report for worker in self.each]
        peers = [wire.PeerAddress("127.0.0.1", route(report.peer_port), report.certificate) for report in reports]
        for place, worker in enumerate(self.each):
            worker.introduce(place, peers)

    def environment(self) -> dict[str, str]:
        """The environment of a program under this lease."""
        return environment(*self.each)

    def run(self, program: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a Python program on the devices to its end."""
        return run(program, self.environment(), timeout_s)

    def close(self) -> None:
        """Kill them."""
        for worker in self.each:
            worker.close()


def environment(*workers: WorkerProcess) -> dict[str, str]:
    """Return the environment of a program under a lease."""
    return {**os.environ, **attach.environment("lease-1", [worker.address for worker in workers])}


def run(program: str, environ: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end."""
    return subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=timeout_s, check=False
    )
