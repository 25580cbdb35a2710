"""For tests of the pool's control plane: a real broker in a process of its own, with light stand-ins for its workers.

The stand-in keeps the worker's contract (orders by stdin, reports by stdout, ends with its broker) but loads no torch,
so that a lease takes milliseconds. A device's torch name says how its worker behaves: `serves`, `fails`, `idles`.
Run as a program, this file is that broker (`broker NAME:GIB …`), a host that joins one (`join HOST NAME:GIB …`) or that
worker (`worker`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from millpond.pool import agent, broker, handshake, lease, transport, wire
from millpond.pool.errors import PoolError
from millpond.pool.scheduler import Device
from millpond.pool.worker import Orders, Report
from millpond.process import die_with_parent
from millpond.settings import PoolSettings, load
from waiting import wait_for

GIB = 2**30
DEADLINE_S = 20.0
TOKEN = "the pool's token"

T = TypeVar("T")


class BrokerProcess:
    """A broker; `devices` are NAME:GIB, or none for the real devices and workers of `millpond pool serve`."""

    def __init__(self, home: Path, *devices: str, port: int = 0, **environ: str) -> None:
        self.home = home
        self.log = home / "broker.log"
        home.mkdir(exist_ok=True)
        ours = [sys.executable, __file__, "broker", *devices]
        command = ours if devices else [sys.executable, "-m", "millpond", "pool", "serve"]
        self.environ = {
            **os.environ,
            "MILLPOND_HOME": str(home / "state"),
            "MILLPOND_POOL_PORT": str(port),
            "MILLPOND_POOL_TOKEN": TOKEN,
            **environ,
        }
        with self.log.open("ab") as log:
            start = log.tell()
            parent = os.getpid()
            self.process = subprocess.Popen(
                command, env=self.environ, stdout=log, stderr=log, preexec_fn=lambda: die_with_parent(parent)
            )
        line = wait_for(lambda: self._listening(start), 60)
        self.address = line.split()[-1]
        self.environ["MILLPOND_POOL_ADDRESS"] = self.address
        self.settings = load(PoolSettings, self.environ)

    def _listening(self, start: int) -> str:
        assert self.process.poll() is None, f"the broker ended: {self.log.read_text()}"
        lines = self.log.read_bytes()[start:].decode().splitlines()
        return next((line for line in lines if line.startswith("millpond pool: listening on ")), "")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def acquire(self, owner: str = "ann", **options: Any) -> lease.Lease:
        """Take a lease in this process."""
        return lease.Lease.acquire(self.settings, owner, **options)

    def connect(self) -> transport.Connection:
        """Connect and greet, no more."""
        return lease.connect(self.settings, "test")

    def raw(self) -> socket.socket:
        """Connect, without a word."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)

    def status(self) -> wire.Status:
        return lease.get_status(self.settings)

    def lease_status(self, lease_id: str) -> wire.LeaseStatus:
        return next(known for known in self.status().leases if known.lease == lease_id)

    def wait_ended(self, lease_id: str, deadline_s: float = DEADLINE_S) -> wire.LeaseStatus:
        """Return a lease's record once it has ended and its devices are free."""
        wait_for(lambda: self.lease_status(lease_id).state not in {"pending", "granted", "active"}, deadline_s)
        wait_for(lambda: not self.workers(), deadline_s)
        return self.lease_status(lease_id)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it as an operator does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(DEADLINE_S)


def greet(broker: BrokerProcess) -> socket.socket:
    """Return the bare socket of a caller who knows the token."""
    sock = broker.raw()
    opening = read_message(sock)
    assert isinstance(opening, wire.Challenge)
    sock.sendall(wire.encode(handshake.answer(opening, TOKEN, "2.13")))
    assert isinstance(read_message(sock), wire.Welcome)
    return sock


def read_message(sock: socket.socket) -> wire.Message:
    header_bytes, _ = wire.measure(sock.recv(wire.PREFIX.size, socket.MSG_WAITALL))
    header = sock.recv(header_bytes, socket.MSG_WAITALL)
    try:
        return wire.decode(header, "greeting")
    except PoolError:
        return wire.decode(header, "from-broker")


def frame(header: bytes) -> bytes:
    return wire.PREFIX.pack(len(header), 0) + header


def is_hung_up(sock: socket.socket) -> bool:
    """Read to the end; it must come well before any limit on silence."""
    sock.settimeout(5)
    try:
        while sock.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


class HostProcess:
    """A host that has joined a broker's pool; `devices` as for a broker."""

    def __init__(self, site: BrokerProcess, name: str, *devices: str, wait: bool = True, **environ: str) -> None:
        self.name = name
        self.log = site.home / f"{name}.log"
        ours = [sys.executable, __file__, "join", name, *devices]
        command = ours if devices else [sys.executable, "-m", "millpond", "pool", "join", "--name", name]
        parent = os.getpid()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**site.environ, **environ},
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent),
            )
        if wait:
            wait_for(lambda: self.name in {device.host for device in site.status().devices}, 60)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it as an operator does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(DEADLINE_S)


STAND_IN = [sys.executable, __file__, "worker"]


def stand_ins(devices: list[str]) -> list[Device]:
    parsed = [device.rpartition(":") for device in devices]
    return [Device(i, f"stand-in {i}", name, int(size) * GIB) for i, (name, _, size) in enumerate(parsed)]


def run_broker(devices: list[str]) -> None:
    broker.serve(load(PoolSettings), devices=stand_ins(devices), worker_command=STAND_IN)


def run_host(name: str, devices: list[str]) -> None:
    agent.join(load(PoolSettings), name, devices=stand_ins(devices), worker_command=STAND_IN)


def run_worker() -> None:
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=Orders)
    die_with_parent(orders.parent)
    if orders.device == "fails":
        sys.exit("the device is on fire")
    listener = transport.listen(orders.bind, 0)
    started = time.monotonic()
    while True:
        idle_s = time.monotonic() - started if orders.device == "idles" else 0.0
        port = listener.getsockname()[1]
        report = Report(port, "2.13", used_bytes=7 * 2**20, idle_s=idle_s, peer_port=port if orders.peer_token else 0)
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.flush()
        time.sleep(0.05)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["worker"]:
            run_worker()
        case ["broker", *devices]:
            run_broker(devices)
        case ["join", name, *devices]:
            run_host(name, devices)
